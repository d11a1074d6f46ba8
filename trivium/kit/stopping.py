"""When a run is to stop before it is done: at a time that a scheduler sets, or once a stop file appears.

Both are asked for through the environment, so that a script can set them for all processes of a run, and a
process that torchrun restarts keeps them. A training that stops this way saves its state first.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivium.kit.errors import TriviumError

STOP_AT = "TRIVIUM_STOP_AT"
"""Seconds since 1970 at which the run stops, as `date +%s` prints them."""
STOP_FILE = "TRIVIUM_STOP_FILE"
"""A path; once something is there the run stops."""
GO_ON_FILE = "TRIVIUM_GO_ON_FILE"
"""A path at which a run that stopped leaves a file: torchrun does not pass on exit statuses."""
GO_ON_STATUS = 75
"""The exit status of a run that stopped as it was asked to; the same command goes on (EX_TEMPFAIL)."""
_LOOK_SECONDS = 1.0
_looked: tuple[float, bool] = (0.0, False)


class StopRequested(KeyboardInterrupt):
    """The run stopped at its time limit or because of its stop file; the same command goes on."""


def seconds(written: str) -> int:
    """The seconds of a time span: 90m, 1h30m, 2d, or as SLURM writes it, 24:00:00 or 2-12:00:00."""
    parts = re.fullmatch(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", written.strip())
    parts = parts or re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", written.strip())
    if parts is None:
        raise TriviumError(f"'{written}' is no time span; write 90m, 1h30m or 24:00:00.")
    days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def ask(after: str | None, file: str | None) -> None:
    """Ask this process, and those it starts, to stop after a time span or once a file appears."""
    if after is not None:
        os.environ[STOP_AT] = str(int(time.time()) + seconds(after))
    if file is not None:
        os.environ[STOP_FILE] = file


def requested() -> bool:
    """Whether this process has reached its time, or sees its stop file (looked for once a second)."""
    return _is_late() or _sees_file()


def _is_late() -> bool:
    written = os.environ.get(STOP_AT, "")
    if not written:
        return False
    try:
        return time.time() >= float(written)
    except ValueError:
        raise TriviumError(
            f"{STOP_AT}={written} is no time; write seconds since 1970, such as $(($(date +%s) + 3600))."
        ) from None


def _sees_file() -> bool:
    global _looked
    named = os.environ.get(STOP_FILE, "")
    if not named:
        return False
    now = time.monotonic()
    # On a file system that many machines share, every look is a message.
    if now - _looked[0] >= _LOOK_SECONDS:
        _looked = (now, Path(named).exists())
    return _looked[1]


def leave_word() -> None:
    """Leave the file that tells a script to go on, where one is named."""
    named = os.environ.get(GO_ON_FILE, "")
    if named:
        Path(named).parent.mkdir(parents=True, exist_ok=True)
        Path(named).touch()


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM stops as Ctrl-C does, and leaves word for a script that named a file for it.

    A scheduler that takes a job away sends it to the processes, and torchrun then ends as if they had failed.
    """

    def note(number: int, frame: object) -> None:
        leave_word()
        raise KeyboardInterrupt

    if GO_ON_FILE not in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped_as_asked() -> int:
    """Leave the file that tells a script to go on, where one is named; returns the exit status."""
    leave_word()
    # To torchrun all else is a failure, after which it starts the processes again.
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else GO_ON_STATUS


def without_requests(environment: dict[str, str]) -> dict[str, str]:
    """An environment for a child process that another process stops."""
    return {name: value for name, value in environment.items() if name not in (STOP_AT, STOP_FILE)}
