"""Walk the graph: reuse what is done, resume what was cut off, run the rest."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from trivium import __version__
from trivium.generate.exactness import typical
from trivium.grade.rewards import RewardFailedError
from trivium.grade.sandbox.client import announced, permitting_unsafe
from trivium.kit import processes
from trivium.kit.code import package_code
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import remove_parts
from trivium.kit.kernels import kernels
from trivium.kit.machine import describe, forget_peak_memory, peak_memory
from trivium.kit.metrics import MetricsLog
from trivium.kit.numbers import short
from trivium.kit.progress import Progress, duration
from trivium.kit.seals import RECORD
from trivium.kit.stopping import StopRequested, requested
from trivium.kit.trackers import Tracked, check, tracking
from trivium.lab.compare_stages import PLAN_FILE
from trivium.lab.experiments import conclude
from trivium.learn.settings import Parallel
from trivium.model.arithmetic import counted
from trivium.model.gguf.read import is_gguf
from trivium.model.hub import resolve
from trivium.pipeline import measured
from trivium.pipeline.accepted import same_as
from trivium.pipeline.cards import write_card
from trivium.pipeline.index import write_index
from trivium.pipeline.jobs import SideBySide, crew, plain
from trivium.pipeline.lock import locked
from trivium.pipeline.sharing import SharedStore, obtain
from trivium.pipeline.store import Entry, Store, last_row, now
from trivium.pipeline.watch import note_graph
from trivium.recipe import graph
from trivium.recipe.graph import Node
from trivium.recipe.outside import Checksums, is_on_the_hub, locate
from trivium.recipe.revisions import Revisions
from trivium.recipe.schema import Recipe, load
from trivium.stages.parts.stage import Stage, Work

if TYPE_CHECKING:
    from trivium.pipeline.layouts import Chosen

PAGE = ".page"
"""What is locked while the page of a recipe is made."""


@dataclass
class Run:
    """A recipe's run: what became of each stage, and where it lies."""

    recipe: Recipe
    nodes: Mapping[str, Node]
    store: Store
    shared: SharedStore | None = None
    """The store that other machines reach, too, where one was named."""
    layouts: Mapping[str, "Chosen"] = field(default_factory=dict)
    """How several processes share the trainings that do not say it themselves."""
    became: dict[str, str] = field(default_factory=dict)
    concluded: dict[str, Any] | None = None
    """What an experiment found, once all of it ran."""
    reported: tuple[Path, list[list[str]]] | None = None
    """The page on any other recipe, once all of it ran, and its headline numbers."""

    def entry(self, stage: str) -> Entry:
        return self.store.entry(self.nodes[stage])

    def pending(self, stage: str, written: str) -> str | None:
        """The stage behind a name in the settings of another, where it is still to be made."""
        parent = self.nodes[stage].parents.get(written)
        return parent.stage if parent is not None and self.entry(parent.stage).state != "done" else None

    def place_of(self, stage: str, written: str) -> Path | None:
        """Where the thing behind a name in a stage's settings lies; a folder of a model as it is opened."""
        parent = self.nodes[stage].parents.get(written)
        place = locate(written, self.recipe.base) if parent is None else self.entry(parent.stage).output
        return place if place is None or not (place.is_dir() or is_gguf(place)) else resolve(place)


def prepare(
    recipe: str | Path,
    runs: str | Path,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    shared: SharedStore | None = None,
) -> Run:
    """Read and check a recipe and say what each stage's result is called; nothing runs."""
    valid = load(recipe, overrides)
    for notice in valid.notices if processes.world().leads else ():
        print(notice, file=sys.stderr)
    store = Store(Path(runs))
    checksums = Checksums(store.folder / "checksums.json")
    revisions = Revisions(store.folder / "revisions.json", None if shared is None else shared.place)
    nodes = graph.build(valid, checksums, revisions, same_as(store.folder))
    _refuse_others_stages(valid, store)
    return Run(valid, nodes, store, shared)


def _refuse_others_stages(recipe: Recipe, store: Store) -> None:
    """A recipe names what another one made by its path; verbs take the name of such a stage as well."""
    for name, stage in recipe.stages.items():
        for reference in stage.references():
            other = store.runs / reference.name
            if reference.name in recipe.stages or not is_on_the_hub(reference.name):
                continue
            if locate(reference.name, recipe.base) is None and (other / "stage.yaml").is_file():
                said = ["stages", name.partition(".")[0], *reference.setting.split(".")]
                raise TriviumError(
                    f"{recipe.written.place(said)}: {reference.name} is a stage of another recipe; write "
                    f"its path seen from the recipe, {other.absolute()}."
                )


def run(
    recipe: str | Path,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
    wait: bool = True,
    unsafe_sandbox: bool = False,
    store: str | None = None,
    jobs: int | None = None,
    workers: list[Popen[str]] | None = None,
) -> Run:
    """Bring a recipe's stages to completion, each after what it stands on.

    `store` is the address of a shared store: what is there is pulled, what is made here is pushed.
    `jobs` stages that do not need each other are made side by side, each in a process of its own, of which
    `workers` have been started already (`jobs.crew`).
    `unsafe_sandbox` runs programs that a model wrote even where the kernel cannot isolate them.
    """
    with permitting_unsafe(unsafe_sandbox), crew(jobs if workers is None else None) as begun:
        world = processes.start()
        if jobs is not None and world.size > 1:
            raise TriviumError("--jobs starts processes of its own; leave it out under torchrun.")
        shared = None if store is None else SharedStore(store)
        prepared = prepare(recipe, runs, overrides, shared)
        chosen = graph.needed(prepared.nodes, only)
        check(prepared.recipe.track)
        if world.leads:
            entries = {name: prepared.entry(name) for name in prepared.nodes}
            note_graph(prepared.store.runs / prepared.recipe.name, prepared.nodes, entries)
        if jobs is not None:
            order = {"recipe": str(recipe), "runs": str(runs), "overrides": plain(overrides), "store": store}
            order["unsafe_sandbox"] = unsafe_sandbox
            SideBySide(prepared, chosen, jobs, workers or begun, order, partial(lead, wait=wait), wait).run()
        if world.leads and world.size > 1:
            from trivium.pipeline.layouts import layouts_for

            prepared.layouts = layouts_for(recipe, runs, overrides, only)
        for name in chosen if jobs is None else ():
            if world.leads:
                prepared.became[name] = lead(prepared, name, wait)
            else:
                _follow(prepared, name)
        if world.leads and len(chosen) == len(prepared.nodes):
            # Runs that share the work reach this point together; the second finds what the first one asked.
            with locked(prepared.store.runs / prepared.recipe.name / PAGE, lambda _: None):
                if prepared.recipe.expanded is not None:
                    prepared.concluded = _concluded(prepared, prepared.recipe.expanded.cells)
                else:
                    from trivium.pipeline.report import report

                    prepared.reported = report(prepared)
            write_index(prepared.store.runs)
        return prepared


def _concluded(prepared: Run, cells: Mapping[tuple[str, int], Mapping[str, str]]) -> dict[str, Any]:
    """Judge the experiment from the folders of every arm and seed."""
    assert prepared.recipe.experiment is not None
    folders = {
        cell: {stage: prepared.entry(name).folder for stage, name in stages.items()}
        for cell, stages in cells.items()
    }
    place = prepared.store.runs / prepared.recipe.name
    return conclude(prepared.recipe.name, prepared.recipe.experiment, folders, place)


def lead(prepared: Run, name: str, wait: bool) -> str:
    """Reuse or make one stage; the processes that follow are told what to do about it."""
    node, entry = prepared.nodes[name], prepared.store.entry(prepared.nodes[name])
    if requested() and entry.state != "done":
        processes.broadcast("stop")
        raise StopRequested
    with Progress(name) as progress:
        became = "reused"
        if entry.state != "done":
            with locked(entry.folder, progress.say, wait) as may:
                # Another process may have finished it while this one waited.
                if entry.state != "done":
                    make = partial(_make, prepared, node, entry, progress, may)
                    if prepared.shared is None:
                        became = make()
                    else:
                        shared, store = prepared.shared, prepared.store
                        became = obtain(shared, store, entry, node.fingerprint, make, progress.say, wait)
        prepared.store.link(prepared.recipe.name, name, entry)
        if became == "reused":
            entry.verify()
            entry.tidy()
            entry.expose()
            progress.say(f"{name}: done before, reused")
            if (
                prepared.shared is not None
                and prepared.shared.push(entry, node.fingerprint).became == "pushed"
            ):
                progress.say(f"{name}: pushed to {prepared.shared.place.url}")
        if became in ("reused", "pulled") or not node.stage.together:
            processes.broadcast("done")
    return became


def _make(prepared: Run, node: Node, entry: Entry, progress: Progress, *may: Callable[[], None]) -> str:
    """Make one stage's result in its folder of the store, which this process holds the lock of.

    Each of `may` raises if the work has been taken over meanwhile, and the result must not appear.
    """
    remove_parts(entry.folder)
    resume = (entry.folder / RECORD).is_file()
    try:
        before = entry.record
    except DamagedError as error:
        progress.say(f"{error} It is written again; only the time it took so far is lost.")
        before = {}
    record = _record(prepared, node)
    record["started"] = before.get("started", record["started"])
    record["seconds"], record["flops"] = before.get("seconds", 0.0), before.get("flops", 0.0)
    moved = _moved(before.get("machine") or {}, record["machine"])
    record["moved"] = [*before.get("moved", []), *moved]
    entry.note(record)
    prepared.store.link(prepared.recipe.name, node.name, entry)
    for sentence in moved:
        progress.say(sentence)
    progress.say(f"{node.name}: {'going on where it was cut off' if resume else node.stage.kind}")
    work = _work(prepared, node, entry, progress, resume)
    layout = _layout(prepared, node, before, record, progress)
    if node.stage.together:
        processes.broadcast({"layout": layout})
    start = time.monotonic()
    forget_peak_memory()
    tracked = Tracked(prepared.recipe.name, entry.folder.name, prepared.store.runs, record["settings"])
    with counted() as tally, announced(work.say) as layers:
        try:
            with tracking(work.log, prepared.recipe.track, tracked, progress.say) as work.log:
                record["summary"] = _laid_out(node, layout).run(work)
        except RewardFailedError as error:
            raise RewardFailedError(f"Stage `{node.name}`: {error}") from error
        finally:
            record["seconds"] = round(record["seconds"] + time.monotonic() - start, 3)
            # Processes share the work evenly; what was computed and then cut off was computed all the same.
            record["flops"] += tally.operations * (processes.world().size if node.stage.together else 1)
            record["peak_memory"] = max(before.get("peak_memory") or 0, peak_memory() or 0) or None
            if layers:
                record["sandbox"] = layers
            entry.note(record)
    write_card(entry.folder, record, last_row(entry))
    for still_held in may:
        still_held()
    entry.complete()
    measured.note(prepared.store.folder, record, prepared.store.runs / prepared.recipe.name / PLAN_FILE)
    if node.stage.together:
        processes.barrier()
    return "resumed" if resume else "ran"


def _layout(
    prepared: Run, node: Node, before: Mapping[str, Any], record: dict[str, Any], progress: Progress
) -> dict[str, Any] | None:
    """How processes share a stage that leaves it open: as it was begun by as many, else as planned."""
    if (chosen := prepared.layouts.get(node.name)) is None:
        return None
    begun = before.get("layout") if before.get("processes") == processes.world().size else None
    if begun is None:
        progress.say(f"parallel: {chosen.parallel.described() or 'whole copies'}, as {chosen.why}")
    record["layout"] = begun or chosen.parallel.model_dump()
    found: dict[str, Any] = record["layout"]
    return found


def _laid_out(node: Node, layout: dict[str, Any] | None) -> Stage:
    """A stage whose layout was left open, with the one that was chosen."""
    if layout is None:
        return node.stage
    return node.stage.model_copy(update={"parallel": Parallel(**layout)})


def _moved(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A sentence where work that was cut off goes on with kernels that may round otherwise."""
    if "kernels" not in before or _rounding(before) == _rounding(here):
        return []
    return [
        f"Resumed with other kernels ({_rounding(before)} -> {_rounding(here)}): the rest agrees with an "
        "uninterrupted run up to rounding, not bit for bit."
    ]


def _rounding(machine: Mapping[str, Any]) -> str:
    """What decides the last bits on the device that a record names."""
    if machine["device"] == "cpu":
        return str(machine["kernels"])
    return f"{machine['device_name']}, torch {machine['torch']}"


def _follow(prepared: Run, name: str) -> None:
    """Work along with the first process, or wait until it is done; where it fails, torchrun ends us all."""
    node = prepared.nodes[name]
    said = processes.broadcast(None)
    if said == "stop":
        raise StopRequested
    if said != "done":
        work = _work(prepared, node, prepared.store.entry(node), Progress(name), resume=True)
        _laid_out(node, said["layout"]).run(work)
        processes.barrier()


def _work(prepared: Run, node: Node, entry: Entry, progress: Progress, resume: bool) -> Work:
    # One process compares for all: torchrun ends the others where it stops.
    inputs = {name: path for name, path, _ in _inputs(prepared, node, verify=processes.world().leads)}
    assert node.stage.seed is not None
    log = MetricsLog(entry.folder / "metrics.jsonl")
    return Work(node.name, entry.folder, inputs, node.stage.seed, log, progress, prepared.recipe.base, resume)


def _inputs(prepared: Run, node: Node, verify: bool = False) -> Iterator[tuple[str, Path, str]]:
    """Each thing a stage names: as written, where it lies, and how `stage.yaml` records it."""
    for written, parent in node.parents.items():
        entry = prepared.entry(parent.stage)
        recorded = entry.folder.name
        if parent.checkpoint is not None:
            recorded += f"@{parent.checkpoint[0]}={parent.checkpoint[1]}"
        place = prepared.store.product(recorded)
        if verify:
            entry.verify(place)
        yield written, place, recorded
    for written in node.outside:
        place = locate(written, prepared.recipe.base) or Path(node.pinned.get(written, written))
        # Where the recipe was named by a relative path, the record says the whole one.
        yield written, place, str(place.absolute() if place.exists() else place)


def _record(prepared: Run, node: Node) -> dict[str, Any]:
    """What `stage.yaml` keeps: enough to make the result again and to doubt it."""
    inputs = list(_inputs(prepared, node))
    return {
        "stage": node.name,
        "kind": node.stage.kind,
        **({"kind_from": node.stage.file} if node.stage.file is not None else {}),
        "recipe": prepared.recipe.name,
        "fingerprint": node.fingerprint,
        "produces": node.stage.produces,
        "seed": node.stage.seed,
        "settings": node.stage.settings(),
        "parents": {name: recorded for name, _, recorded in inputs if name in node.parents},
        "outside": {name: recorded for name, _, recorded in inputs if name in node.outside},
        "data": dict(node.outside),
        **({"code": node.stage.code} if node.stage.code is not None else {}),
        "versions": {"trivium": __version__, "stage": node.stage.version, "code": package_code()},
        "machine": {**asdict(describe()), "kernels": str(kernels()), "generation": typical().promise},
        "processes": processes.world().size,
        "started": now(),
    }


def table(prepared: Run) -> list[list[str]]:
    """The rows of the table that closes a run: what became of each stage, in numbers."""
    rows = [["stage", "", "tokens", "loss", "time", "where"]]
    for name, became in prepared.became.items():
        rows.append(
            [
                name,
                became,
                *facts(prepared.entry(name)),
                str(prepared.store.runs / prepared.recipe.name / name),
            ]
        )
    return rows


def facts(entry: Entry) -> list[str]:
    """Tokens, loss and wall time of a stage as far as it has come."""
    record = entry.record
    summary = record.get("summary") or {}
    last = last_row(entry)
    tokens = summary.get("tokens", last.get("tokens"))
    loss = summary.get("loss", last.get("loss"))
    seconds = record.get("seconds")
    return [
        short(tokens) if tokens is not None else "",
        f"{loss:.3f}" if isinstance(loss, float) else "",
        duration(seconds) if seconds else "",
    ]
