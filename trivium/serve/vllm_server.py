"""`trivium serve --engine vllm`: a model of ours in vLLM's own server, which speaks OpenAI's protocol too."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.generate.vllm_engine import check_vllm
from trivium.kit.errors import TriviumError
from trivium.model.named import RUNS, find_model, find_stage
from trivium.serve.models import short_names
from trivium.serve.server import KEY_VARIABLE

UNDERSTOOD = frozenset({"models", "runs", "host", "port", "api_key", "allow_origins", "engine"})
"""The options of `serve` that mean something to vLLM."""


def vllm_command(
    models: Sequence[str],
    *,
    runs: str = RUNS,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_origins: Sequence[str] = (),
) -> list[str]:
    """The words that start vLLM's server (0.32.0) on one model under its short name."""
    names = short_names(models)
    if len(names) > 1:
        raise TriviumError(
            "`--engine vllm` serves one model a process: name one, or leave the option out for several."
        )
    [(name, place)] = names.items()
    folder = find_model(str(find_stage(place, runs) or place), runs)
    origins = ["--allowed-origins", json.dumps(list(allow_origins))] if allow_origins else []
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder),
        "--served-model-name", name, "--host", host, "--port", str(port), *origins,
    ]  # fmt: skip


def serve_with_vllm(
    models: Sequence[str], said: Mapping[str, str], *, api_key: str | None = None, **settings: Any
) -> None:
    """Become vLLM's server; `said` is what was given: names, a few of which it understands, as written."""
    check_vllm()
    for name, option in said.items():
        if name not in UNDERSTOOD:
            raise TriviumError(f"{option} is an option of our engine; leave it out with `--engine vllm`.")
    command = vllm_command(models, **settings)
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    # Not among the words, which every user of the machine can read.
    environment = os.environ | ({"VLLM_API_KEY": key} if key else {})
    sys.stdout.flush()
    os.execve(command[0], command, environment)
