"""A log that no client can fill: of lines from one place in the code only so many in a minute."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

BURST = 10
PERIOD = 60.0


@dataclass
class _Place:
    since: float
    written: int = 0
    left_out: int = 0


class Sparing(logging.Filter):
    """Lets `BURST` records of a kind pass in `PERIOD` seconds; the next that passes says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple, _Place] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written. A kind is a place in the code and a type of error, not a text."""
        error = record.exc_info[0] if record.exc_info else None
        kind = (record.name, record.levelno, record.pathname, record.lineno, error)
        now = time.monotonic()
        with self._lock:
            place = self._places.setdefault(kind, _Place(now))
            if now - place.since > PERIOD:
                place.since, place.written = now, 0
            if place.written >= BURST:
                place.left_out += 1
                return False
            place.written += 1
            left_out, place.left_out = place.left_out, 0
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more like it were left out)"
            record.args = ()
        return True
