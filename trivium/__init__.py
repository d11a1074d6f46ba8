"""Trivium takes a language model through its whole education and shows what each stage did."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The public names and the rooms they live in; a room is imported when one of its names is first used,
# so that `import trivium` stays instant and never loads torch.
_PUBLIC: dict[str, str] = {
    "load": "trivium.api",
    "run": "trivium.api",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'trivium' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
