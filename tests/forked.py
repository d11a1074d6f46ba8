"""The command `trivium`, or a call, as a process of its own that need not import everything again."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from trivium.cli import main


def forked(*words: str | Path, env: Mapping[str, str] | None = None, **how: Any) -> subprocess.Popen[str]:
    """Begin `trivium WORDS` in a copy of this process; else as `subprocess.Popen`."""
    arguments = [*map(str, words)]
    return copied(lambda: main(arguments), ["trivium", *arguments], env=env, **how)


def copied(
    call: Callable[[], object],
    argv: Sequence[str] = ("-c",),
    *,
    env: Mapping[str, str] | None = None,
    text: bool = True,
    **how: Any,
) -> subprocess.Popen[Any]:
    """Begin a call in a copy of this process, with its own working directory, streams and signals.

    To start Python anew and to import torch takes longer than what most tests have it do; what happens at
    the start itself, other tests look at.
    """
    inside = dict(os.environ if env is None else env)

    def become() -> NoReturn:
        # The parent waits for its end of a pipe to close, as it does when a program is started.
        os.closerange(3, 4096)
        status = 1
        try:
            for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
                setattr(sys, name, open(number, mode, buffering=1, closefd=False))  # noqa: SIM115
            os.environ.clear()
            os.environ.update(inside)
            sys.argv = [*argv]
            torch.set_num_threads(1)
            call()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    return subprocess.Popen([sys.executable], preexec_fn=become, text=text, **how)
