"""What the server counts, in the text format Prometheus scrapes."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

HELP = {
    "trivium_requests_total": "Requests answered, by route and HTTP status.",
    "trivium_prompt_tokens_total": "Prompt tokens asked.",
    "trivium_reused_prompt_tokens_total": "Prompt tokens that were cached already.",
    "trivium_generated_tokens_total": "Tokens generated.",
    "trivium_drafted_tokens_total": "Tokens guessed ahead.",
    "trivium_accepted_draft_tokens_total": "Tokens guessed ahead that were right.",
    "trivium_draft_acceptance": "The share of the guessed tokens that were right.",
    "trivium_drafting": "1 while drafts make the engine faster, 0 while they are switched off.",
    "trivium_generations_total": "Generations ended, by how.",
    "trivium_searches_total": "Searches ended with an answer, by method.",
    "trivium_search_tokens_total": "Tokens that searches drew.",
    "trivium_first_token_seconds": "Time from a request's arrival at the engine to its first token.",
    "trivium_generation_seconds": "Time from a request's arrival at the engine to its last token.",
    "trivium_samples_inside": "Samples that hold or wait for a row of the engine.",
    "trivium_rows": "Rows the engine can hold.",
    "trivium_cache_bytes": "Memory that keys and values have now.",
    "trivium_promise": "1 for what holds of a seeded answer whatever else is in the batch.",
    "trivium_connections": "Connections that are open.",
    "trivium_connections_refused_total": "Connections that were refused, for all others were being answered.",
    "trivium_connections_dropped_total": "Connections without a complete request that had to make room.",
}

Labels = tuple[tuple[str, str], ...]


class Measures:
    """Counters and histograms that many threads may feed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[str, dict[Labels, list[float]]] = defaultdict(dict)
        self._watched: dict[str, tuple[str, list[tuple[Labels, Callable[[], float]]]]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name][tuple(labels.items())] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Put one duration into a histogram."""
        with self._lock:
            row = self._histograms[name].setdefault(tuple(labels.items()), [0.0] * (len(SECONDS) + 2))
            row[bisect_left(SECONDS, seconds)] += 1
            row[-1] += seconds

    def watch(self, name: str, kind: str, read: Callable[[], float], **labels: str) -> None:
        """Register a counter or gauge to be read when someone looks."""
        self._watched.setdefault(name, (kind, []))[1].append((tuple(labels.items()), read))

    def text(self) -> str:
        """Everything, as Prometheus reads it."""
        with self._lock:
            counters = {name: dict(rows) for name, rows in self._counters.items()}
            histograms = {
                name: {key: list(row) for key, row in rows.items()} for name, rows in self._histograms.items()
            }
        lines: list[str] = []
        for name, rows in sorted(counters.items()):
            lines += _heading(name, "counter")
            lines += [f"{name}{_labels(key)} {_number(value)}" for key, value in sorted(rows.items())]
        for name, durations in sorted(histograms.items()):
            lines += _heading(name, "histogram")
            for key, row in sorted(durations.items()):
                lines += _histogram(name, key, row)
        for name, (kind, readers) in sorted(self._watched.items()):
            lines += _heading(name, kind)
            lines += [f"{name}{_labels(key)} {_number(read())}" for key, read in readers]
        return "\n".join(lines) + "\n"


def _heading(name: str, kind: str) -> list[str]:
    return [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}"]


def _number(value: float) -> str:
    """Every digit, for a counter that is rounded seems to stand still."""
    return repr(float(value)).removesuffix(".0")


def _labels(pairs: Iterable[tuple[str, str]]) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inner = ",".join(f'{name}="{quoted(value)}"' for name, value in pairs)
    return f"{{{inner}}}" if inner else ""


def _histogram(name: str, key: Labels, row: list[float]) -> list[str]:
    lines, running = [], 0.0
    for edge, amount in zip((*map(str, SECONDS), "+Inf"), row[:-1]):
        running += amount
        lines.append(f"{name}_bucket{_labels((*key, ('le', edge)))} {_number(running)}")
    return [
        *lines,
        f"{name}_sum{_labels(key)} {_number(row[-1])}",
        f"{name}_count{_labels(key)} {_number(running)}",
    ]
