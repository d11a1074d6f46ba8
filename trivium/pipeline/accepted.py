"""Results that a person accepts as unchanged by a change of code, and the record of who said so and why.

A stage's fingerprint counts the version of its kind and the code of a kind outside the package. Where such a
change cannot matter, the new fingerprint is written down as standing for the result of the old one; whatever
hangs below is found as before.
"""

import getpass
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.seals import read_sealed, write_sealed

FILE = "accepted.json"
_REMEDY = "delete it, and accept again what you accepted."


def acceptances(store: Path) -> dict[str, dict[str, Any]]:
    """By new fingerprint: the entry it stands for, why, who said so and when."""
    path = store / FILE
    return read_sealed(path, _REMEDY) if path.is_file() else {}


def same_as(store: Path) -> dict[str, str]:
    """For every accepted fingerprint, that of the result it stands for."""
    return {new: str(one["entry"]).rpartition("-")[2] for new, one in acceptances(store).items()}


def note(store: Path, fingerprint: str, entry: str, because: str, facts: Mapping[str, Any]) -> None:
    """Write down that a fingerprint stands for an entry."""
    if not because.strip():
        raise TriviumError("--because is empty; say in a few words why the change cannot matter.")
    try:
        person = getpass.getuser()
    except (KeyError, OSError):
        person = "someone"
    said = {"entry": entry, "because": because.strip(), "by": f"{person}@{socket.gethostname()}", **facts}
    write_sealed(store / FILE, {**acceptances(store), fingerprint: said})
