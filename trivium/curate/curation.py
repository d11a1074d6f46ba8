"""The whole of a curation: sources in, a folder of kept and one of dropped documents out, and the funnel."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from trivium.curate import engines
from trivium.curate.passes import DONE, READ, Pass, decide, is_done, passes_of, run_shard, shard_name, tallies
from trivium.curate.read import SHARD_BYTES, read_shards
from trivium.curate.step import Step
from trivium.curate.tally import Tally
from trivium.data.sources import Source
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_text

FUNNEL = "funnel.json"
_FEW = 100


@dataclass
class Curation:
    """What is curated, how, and where the work and the results lie."""

    steps: Sequence[Step]
    sources: Sequence[tuple[str, Source]]
    """Each with its name in the recipe."""
    scratch: Path
    kept: Path
    dropped: Path
    funnel: Path
    where: Mapping[str, Path] = field(default_factory=dict)
    """Where what the steps mention lies."""
    answers: Sequence[Path] = ()
    """Files of answers that models gave to other stages, for steps that ask one."""
    workers: int = 1
    engine: engines.Engine = "local"
    most_lost: float | None = None
    shard_bytes: int = SHARD_BYTES
    said: Callable[[int, str], None] = lambda documents, unit: None
    """Called with the number of documents done in the running pass."""

    def run(self) -> dict[str, Any]:
        """Do what is left to do; returns the funnel."""
        if self.kept.is_dir() and self.funnel.is_file():
            return dict(json.loads(self.funnel.read_text(encoding="utf-8")))
        engines.check(self.engine)
        self._prepare()
        tally, decisions = Tally(), {}
        before: Path | None = None
        shards = 0
        plan = passes_of(self.steps)
        with engines.Workers(self.engine, self.workers) as workers:
            for one in plan:
                folder = self.scratch / f"pass-{one.number}"
                folder.mkdir(parents=True, exist_ok=True)
                shards = self._pass(one, folder, before, shards, workers)
                if not shards:
                    raise TriviumError("There is no document to curate; look at `data`.")
                for counts in tallies(folder, shards):
                    tally.merge(counts)
                self._stop_if_lost(tally)
                if one.whole is not None:
                    decisions[one.whole[0]] = decide(one, folder, shards, workers)
                if before is not None:
                    _forget_kept(before)
                before = folder
        assert before is not None
        return self._finish(tally, decisions, before, plan, shards)

    def _prepare(self) -> None:
        """Let every step write what its processes need."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        for number, step in enumerate(self.steps, start=1):
            step.check()
            step._place = (self.scratch / f"step-{number:02d}").absolute()
            step._answers = self.answers
            if not step._place.exists():
                step.prepare(step._place, self.where)

    def _pass(
        self, one: Pass, folder: Path, before: Path | None, shards: int, workers: engines.Workers
    ) -> int:
        """Work on every shard that is not whole yet; returns how many there are."""
        done = folder / DONE
        if done.is_file():
            return int(json.loads(done.read_text(encoding="utf-8"))["shards"])
        counted = documents = 0
        if before is None:
            tasks = self._read(one, folder)
        else:
            decisions = before / "decision"
            tasks = (
                (one, folder, number, before / f"{shard_name(number)}.kept.parquet", decisions)
                for number in range(shards) if not is_done(folder, number)
            )  # fmt: skip
        for left in workers.results(run_shard, tasks):
            documents += left
            self.said(documents, f"documents left in pass {one.number + 1}")
        counted = len(list(folder.glob("[0-9]*.json"))) if before is None else shards
        write_text(done, json.dumps({"shards": counted}))
        return counted

    def _read(self, one: Pass, folder: Path) -> Iterator[tuple[Any, ...]]:
        raw = bool(self.steps) and self.steps[0].needs_raw
        for shard in read_shards(self.sources, raw, self.shard_bytes):
            if not is_done(folder, shard.number):
                yield one, folder, shard.number, shard, None

    def _stop_if_lost(self, tally: Tally) -> None:
        """Stop where a source loses more than it may."""
        if self.most_lost is None:
            return
        last = tally.steps[max(tally.steps)]["sources"]
        for source, (documents, *_) in tally.steps.get(READ, {"sources": {}})["sources"].items():
            left = last.get(source, [0, 0, 0, 0])[2]
            if documents >= _FEW and 1 - left / documents > self.most_lost:
                share, most = f"{100 * (1 - left / documents):.1f} %", f"`most_lost: {self.most_lost:g}`"
                raise TriviumError(
                    f"{source} loses {share} of its {documents:,} documents, more than {most} "
                    f"({_reasons(tally)}); look at the steps, or raise it."
                )

    def _finish(
        self, tally: Tally, decisions: Mapping[str, Any], last: Path, plan: Sequence[Pass], shards: int
    ) -> dict[str, Any]:
        whole = [number for number in range(shards) if _rows(last, number)]
        if not whole:
            raise TriviumError(f"No document is left ({_reasons(tally)}); look at `data` and the steps.")
        funnel = {
            "steps": [{"key": key, **tally.steps[key]} for key in sorted(tally.steps)],
            "decisions": dict(decisions),
            "scores": tally.scores,
            "documents": sum(_rows(last, number) for number in whole),
        }
        with whole_folder(self.dropped) as folder:
            for one in plan:
                for number in range(shards):
                    path = self.scratch / f"pass-{one.number}" / f"{shard_name(number)}.dropped.parquet"
                    if path.is_file() and parquet.read_metadata(path).num_rows:
                        _place(path, folder / f"{one.number}-{shard_name(number)}.parquet")
        write_text(self.funnel, json.dumps(funnel))
        with whole_folder(self.kept) as folder:
            for number in whole:
                _place(last / f"{shard_name(number)}.kept.parquet", folder / f"{shard_name(number)}.parquet")
        return funnel


def _rows(folder: Path, number: int) -> int:
    return int(parquet.read_metadata(folder / f"{shard_name(number)}.kept.parquet").num_rows)


def _reasons(tally: Tally) -> str:
    """The commonest reasons in a few words."""
    counts = {
        f"{step['title']}: {rule}": count
        for step in tally.steps.values()
        for rule, count in step["rules"].items()
    }
    ranked = sorted(counts.items(), key=lambda one: -one[1])[:4]
    return ", ".join(f"{rule} {count:,}" for rule, count in ranked) or "nothing was read"


def _forget_kept(folder: Path) -> None:
    """Free what the next pass has read; its counts and what it dropped stay."""
    for path in folder.glob("*.kept.parquet"):
        path.unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _place(path: Path, to: Path) -> None:
    """The same file under another name, without a copy where the file system can."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)
