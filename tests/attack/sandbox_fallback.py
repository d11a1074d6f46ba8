"""The same programs and attempts on a kernel that allows no namespaces."""

from pathlib import Path

from attack.frame import attack, sections
from attack.sandbox import ATTEMPTS, reached, run_hostile
from trivium.grade.sandbox import client
from trivium.grade.sandbox.client import Sandbox

_GROUP = "sandbox without namespaces"
_WITHOUT = frozenset({"namespaces"})


def _use_fallback() -> None:
    """Have this process's sandbox be the weaker one."""
    box = client._open.get(False)
    if box is None or box.process.poll() is not None:
        client._open[False] = Sandbox(without=_WITHOUT)


@attack(_GROUP, "hostile program", cases=sections("grade/hostile/programs.py.txt"))
def hostile_program(scratch: Path, source: str) -> None:
    """A hostile program without namespaces."""
    _use_fallback()
    run_hostile(scratch, source)


@attack(_GROUP, "attempt", cases=ATTEMPTS)
def attempt(scratch: Path, name: tuple[str, str]) -> None:
    """One attempt of the probe without namespaces."""
    assert name not in reached(_WITHOUT)


@attack(_GROUP, "what the attempts leave behind")
def damage(scratch: Path) -> None:
    """No bait was changed and no process of the user ended."""
    assert not [what for group, what in reached(_WITHOUT) if group == "damage"]
