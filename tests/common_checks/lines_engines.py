"""The setting `engine` of every kind that generates: what is not here, or does not fit, is refused."""

from __future__ import annotations

from typing import Any

from lines import ROLLOUTS, refuses
from lines_online import ONLINE

ENDPOINT = {"kind": "endpoint", "url": "http://127.0.0.1:9/v1", "model": "m", "settings": {"retries": 0}}
NO_WEIGHTS = "takes no new weights and gives no log-probabilities"
WHERE: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = [
    ("engine", ("evaluate",), "no answer after 1 attempts", {}),
    ("engine", ("synthesize",), "the teacher is `from` or `endpoint`", {}),
    ("engine", ROLLOUTS, NO_WEIGHTS, {}),
    ("online.engine", ("preference",), NO_WEIGHTS, ONLINE),
]
"""Where the setting is, in which kinds, how an endpoint ends, and what else they need."""

for place, kinds, ends, needed in WHERE:
    refuses(f"{place}.kind", "vllm", "needs vLLM and a GPU", kinds=kinds, both=needed)
    refuses(f"{place}.kind", "endpoint", "needs a `url` and a `model`", kinds=kinds, both=needed)
    refuses(f"{place}.kind", "own", "belongs to", kinds=kinds, both=needed,
            beside={f"{place}.url": ENDPOINT["url"]})  # fmt: skip
    refuses(f"{place}.url", ENDPOINT["url"], ends, kinds=kinds, moved=False, both=needed,
            beside={place: ENDPOINT})  # fmt: skip
    refuses(f"{place}.model", "m", "belongs to", kinds=kinds, both=needed)
    refuses(f"{place}.settings", {"concurrency": 0}, "concurrency", kinds=kinds, moved=False, both=needed,
            beside={place: {**ENDPOINT, "settings": {"concurrency": 0}}})  # fmt: skip
    refuses(f"{place}.key_env", "KEY", "belongs to", kinds=kinds, both=needed)
refuses("engine.key_env", "NO_SUCH_KEY", "NO_SUCH_KEY, which `key_env` names", kinds=["evaluate"],
        beside={"engine": ENDPOINT})  # fmt: skip
