"""How far a long piece of work is: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

from trivium.kit.numbers import short
from trivium.kit.processes import world

if TYPE_CHECKING:
    from rich.live import Live

_PLAIN_SECONDS = 5.0
_RELAY_SECONDS = 0.25
_relay: Callable[[dict[str, Any]], None] | None = None


def relay_to(send: Callable[[dict[str, Any]], None]) -> None:
    """Hand all lines of this process to another one, which shows the progress of several: `{"say": ...}`."""
    global _relay
    _relay = send


_WINDOW = 50


class _View:
    """Lines that stay, and below them, on a terminal, some that change."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, *lines: str) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        group = Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
        if self._live is None:
            self._live = Live(group, console=Console(file=self._stream), refresh_per_second=8)
            self._live.start()
        else:
            self._live.update(group)


class Progress(_View):
    """One line that says how far, how fast and for how long yet; only the first process speaks."""

    def __init__(self, title: str = "", stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.title = title
        self._speaks = world().leads
        self._seen: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._last_plain = time.monotonic()

    def say(self, text: str) -> None:
        if not self._speaks:
            return
        if _relay is not None:
            _relay({"say": text})
        else:
            super().say(text)

    def update(
        self, done: float, total: float | None, unit: str = "tokens", speed: str = "", **facts: Any
    ) -> None:
        """Show that `done` of `total` is done; facts such as loss=2.31 stand behind it.

        `speed` says how fast, where units in a second tell little.
        """
        if not self._speaks:
            return
        now = time.monotonic()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        finished = total is not None and done >= total
        if _relay is not None:
            if finished or now - self._last_plain >= _RELAY_SECONDS:
                self._last_plain = now
                _relay({"update": self._line(done, total, unit, speed, facts, bar=True)})
        elif self._stream.isatty():
            self._show(self._line(done, total, unit, speed, facts, bar=True))
        elif finished or now - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = now
            print(self._line(done, total, unit, speed, facts, bar=False), file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen and forget it."""
        super().close()
        self._seen.clear()
        self._last_plain = time.monotonic()

    def _line(
        self, done: float, total: float | None, unit: str, speed: str, facts: dict[str, Any], bar: bool
    ) -> str:
        parts = [self.title] if self.title else []
        if total:
            share = min(done / total, 1.0)
            if bar:
                filled = round(20 * share)
                parts.append("━" * filled + "╌" * (20 - filled))
            parts.append(f"{share:4.0%}")
            parts.append(f"{short(done)}/{short(total)} {unit}")
        else:
            parts.append(f"{short(done)} {unit}")
        rate = self._rate()
        if speed or rate:
            parts.append(speed or f"{short(rate)} {unit}/s")
        parts += [f"{name} {_fact(value)}" for name, value in facts.items()]
        if rate and total and done < total:
            parts.append(f"{duration((total - done) / rate)} left")
        return "  ".join(parts)

    def _rate(self) -> float:
        (first, low), (last, high) = self._seen[0], self._seen[-1]
        return (high - low) / (last - first) if last > first else 0.0


class Board(_View):
    """One view of several pieces of work: lines that stay, and below them how far each is."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._shown: tuple[list[str], float] = ([], time.monotonic())

    def show(self, lines: Sequence[str], total: str) -> None:
        """Show how far each is, and all together; when piped, the lines that changed, now and then."""
        if self._stream.isatty():
            self._show(*lines, total)
        elif time.monotonic() - self._shown[1] >= _PLAIN_SECONDS:
            for line in lines:
                if line not in self._shown[0]:
                    print(line, file=self._stream, flush=True)
            self._shown = (list(lines), time.monotonic())


def duration(seconds: float) -> str:
    """A time span for people: 42 s, 3 min 20 s, 2 h 05 min, 12.5 days."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours} h {minutes:02d} min"
    days = seconds / 86400
    return f"{days:.3g} days" if days < 1000 else f"{days / 365.25:,.0f} years"


def _fact(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
