"""What a run looks like right now, from the files it leaves behind."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, write_json
from trivium.lab.formatting import figure
from trivium.lab.watch import Tail, serve, thinned
from trivium.pipeline.last_step import progress_of
from trivium.pipeline.store import Entry
from trivium.recipe.graph import Node
from trivium.recipe.schema import load

GRAPH = "graph.json"


def note_graph(place: Path, nodes: Mapping[str, Node], entries: Mapping[str, Entry]) -> None:
    """Leave the graph of a run that begins, so that those who watch see what is still to come."""
    stages = {
        name: {
            "kind": node.stage.kind,
            "parents": sorted({parent.stage for parent in node.parents.values()}),
            "entry": entries[name].folder.name,
        }
        for name, node in nodes.items()
    }
    write_json(place / GRAPH, {"started": time.time(), "stages": stages})


class Watched:
    """A recipe's run, or the newest of all under `runs`."""

    def __init__(self, runs: Path, recipe: str | None = None) -> None:
        self.runs = runs
        self.recipe = recipe
        self._tails: dict[Path, Tail] = {}
        self._records: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._one_at_a_time = threading.Lock()

    def state(self, stage: str | None = None, beside: str | None = None) -> dict[str, Any]:
        """All stages as they are, and the curves of one: that asked for, the one at work, or the last.

        `beside` is one of `others`, whose curves are drawn over them.
        """
        with self._one_at_a_time:
            place = self._place()
            stages = {
                name: self._stage(name, planned)
                for name, planned in read_json(place / GRAPH)["stages"].items()
            }
            shown = stage if stage is not None and stage in stages else _at_work(stages)
            tail = self._tail(stages[shown]["entry"])
            others = self._others(shown, stages[shown])
            over = self._tail(others[beside]).columns if beside in others else {}
            return {
                "recipe": place.name,
                "stages": list(stages.values()),
                "shown": shown,
                "columns": {name: thinned(points) for name, points in tail.columns.items()},
                "changes": tail.changes,
                "others": list(others),
                "beside": beside if beside in others else None,
                "beside_columns": {name: thinned(points) for name, points in over.items()},
            }

    def _others(self, name: str, stage: Mapping[str, Any]) -> dict[str, str]:
        """Other results of this kind of stage by name: those of recipes, and those of earlier settings."""
        found: dict[str, str] = {}
        for graph in sorted(self.runs.glob(f"*/{GRAPH}")):
            for other, planned in read_json(graph)["stages"].items():
                if planned["kind"] == stage["kind"]:
                    found[f"{graph.parent.name}/{other}"] = planned["entry"]
        for path in sorted((self.runs / "store").glob(f"{name}-*/metrics.jsonl")):
            if path.parent.name not in found.values():
                found[path.parent.name] = path.parent.name
        store = self.runs / "store"
        return {
            other: entry
            for other, entry in found.items()
            if entry != stage["entry"] and (store / entry / "metrics.jsonl").is_file()
        }

    def _place(self) -> Path:
        if self.recipe is not None:
            if not (self.runs / self.recipe / GRAPH).is_file():
                raise TriviumError(f"{self.recipe} has not begun under {self.runs}; waiting for it.")
            return self.runs / self.recipe
        begun = sorted(self.runs.glob(f"*/{GRAPH}"), key=lambda path: path.stat().st_mtime)
        if not begun:
            raise TriviumError(f"Nothing has begun under {self.runs}; waiting for `trivium run`.")
        return begun[-1].parent

    def _stage(self, name: str, planned: Mapping[str, Any]) -> dict[str, Any]:
        entry = Entry(self.runs / "store" / planned["entry"])
        record, tail = self._record(entry), self._tail(planned["entry"])
        settings, summary = record.get("settings") or {}, record.get("summary") or {}
        goals = (("steps", "step"), ("tokens", "tokens"))
        share = [tail.last[done] / settings[whole] for whole, done in goals
                 if settings.get(whole) and done in tail.last]  # fmt: skip
        state = entry.state
        seconds = record.get("seconds")
        rate = tail.last.get("tokens_per_second") if state == "running" else None
        progress = progress_of(tail.last)
        loss = summary.get("loss", tail.last.get("loss"))
        first = next(iter(progress.items()), None)
        return {
            "name": name,
            "kind": planned["kind"],
            "parents": planned["parents"],
            "entry": planned["entry"],
            "state": "pending" if state == "absent" else state,
            "share": 1.0 if state == "done" else min(1.0, share[0]) if share else None,
            "step": tail.last.get("step"),
            "tokens": summary.get("tokens", tail.last.get("tokens")),
            "loss": loss,
            "telling": " ".join(first) if first else "" if loss is None else f"loss {figure(loss)}",
            "progress": progress,
            "seconds": seconds if state == "done" else None,
            "rate": rate,
            "mfu": tail.last.get("mfu") if state == "running" else None,
            "memory": tail.last.get("memory_bytes") if state == "running" else None,
            "left": tail.last["tokens"] * (1 / share[0] - 1) / rate if rate and share and share[0] else None,
        }

    def _tail(self, entry: str) -> Tail:
        path = self.runs / "store" / entry / "metrics.jsonl"
        tail = self._tails.setdefault(path, Tail(path))
        tail.update()
        return tail

    def _record(self, entry: Entry) -> dict[str, Any]:
        """What `stage.yaml` says, read again only when it changed."""
        path = entry.folder / "stage.yaml"
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        known = self._records.get(path)
        if known is None or known[0] != changed:
            known = (changed, entry.record)
            self._records[path] = known
        return known[1]


def watch(runs: str | Path, recipe: str | None, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until somebody stops it; a recipe is a file or the name it runs under."""
    name = load(recipe).name if recipe is not None and not (Path(runs) / recipe).is_dir() else recipe
    serve(Watched(Path(runs), name).state, port, say)


def _at_work(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The stage at work; else the last that was begun; else the first."""
    for wanted in ("running", "cut off"):
        for name, stage in stages.items():
            if stage["state"] == wanted:
                return name
    measured = [name for name, stage in stages.items() if stage["state"] == "done" and stage["step"]]
    return measured[-1] if measured else next(iter(stages))
