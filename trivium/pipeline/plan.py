"""What a run would do and cost, and what it would refuse, before minutes are spent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trivium.kit import trackers
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object, write_json
from trivium.kit.numbers import with_unit
from trivium.kit.progress import duration
from trivium.lab.compare_stages import PLAN_FILE
from trivium.lab.planner.advice import advised
from trivium.lab.planner.catalogue import HERE, Machine, shared
from trivium.lab.planner.catalogue import machine as catalogued
from trivium.lab.planner.estimate import Estimate, estimate, total
from trivium.lab.planner.work import Job
from trivium.learn.settings import Parallel
from trivium.learn.sharding import refuse_indivisible, refuse_indivisible_experts, refuse_short
from trivium.model.lora import targeted
from trivium.model.transformer import Transformer
from trivium.model.unfilled import unfilled
from trivium.pipeline import costs
from trivium.pipeline.checks import PREFERENCES, PROMPTED, Checked, check, check_disk, check_rows, is_online
from trivium.pipeline.encoders import modalities_of
from trivium.pipeline.measured import here
from trivium.pipeline.portions import Reader
from trivium.pipeline.run import Run, prepare
from trivium.pipeline.workload import job_of
from trivium.recipe import graph
from trivium.stages.grow import PROBE

PACKED = ("pretrain", "midtrain", *costs.EXAMPLES)
ANSWERING = ("rlvr", "ppo", "evaluate", "compare", "preference", "synthesize", "label_steps")
VOCABULARY = 4096


@dataclass
class Planned:
    """A table of every stage, the numbers each will run with, and what a person should know."""

    rows: list[list[str]]
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prepared: Run | None = None
    estimates: list[Estimate] = field(default_factory=list)
    """What each stage costs, in the order of the rows; of those that are reused, what they would."""

    def as_json(self) -> dict[str, Any]:
        """One object for each stage, and what is left to do in total."""
        assert self.prepared is not None
        stages = [{**one.as_json(), "will": _will(self.prepared, one.job.stage)} for one in self.estimates]
        left = [one for one, stage in zip(self.estimates, stages) if stage["will"] != "reuse"]
        return {
            "recipe": self.prepared.recipe.name, "machine": self.machine, "stages": stages,
            "total": total(left), "notes": self.notes,
        }  # fmt: skip

    machine: dict[str, Any] = field(default_factory=dict)
    """What the plan was made for."""


def plan(
    recipe: str | Path,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
) -> list[list[str]]:
    """A table: every stage, whether it runs or is reused, what it may cost, and the numbers that follow."""
    return planned(recipe, runs, overrides, only).rows


def planned(
    recipe: str | Path,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
    on: str | None = None,
    machines: Path | None = None,
    node: int | None = None,
) -> Planned:
    """The plan; what a stage would refuse when its turn comes is refused here.

    `on` names a machine of the catalogue, as `h100:8`; `machines` a file whose entries are laid over it.
    Of several processes here `node` are on one machine, all where it is left out.
    """
    prepared = prepare(recipe, runs, overrides)
    chosen = graph.needed(prepared.nodes, only)
    trackers.check(prepared.recipe.track)
    elsewhere = on is not None and on.partition(":")[0] != HERE
    checked = Checked(here=not elsewhere)
    derived: dict[str, dict[str, Any]] = {}
    for name in chosen:
        derived[name] = _numbers(prepared, name, derived, checked)
    if not elsewhere:
        check_disk(prepared, derived)
    jobs = [job_of(prepared, name, derived, checked) for name in chosen]
    for job in jobs:
        if getattr(prepared.nodes[job.stage].stage, "adapter", None) is not None and job.trained_parameters:
            derived[job.stage]["trained by the adapter"] = round(job.trained_parameters)
        _check_layout(prepared.nodes[job.stage].stage, job, derived[job.stage])
    if not elsewhere:
        sizes = {one.kind: one.parameters for one in jobs if one.parameters}
        machine = here(prepared.store, sizes)
        if on is not None:
            machine = shared(machine, catalogued(on, machines).devices, node)
    else:
        assert on is not None
        machine = catalogued(on, machines)
    estimates = [estimate(advised(job, prepared.nodes[job.stage].stage), machine) for job in jobs]
    rows = [["stage", "kind", "will", "cost", "derived"]]
    for name, found in zip(chosen, estimates):
        will = _will(prepared, name)
        if found.flops.total:
            derived[name]["flops"] = found.flops.total
        # Whatever is computed costs something: on a fast machine the least is shown, not nothing.
        cost = _cost(found) if found.seconds and will != "reuse" else ""
        if will != "reuse" and _is_unknown(prepared.nodes[name].stage, found):
            cost = "unknown"
            missing = "its model is on this machine" if found.job.config is None else "`tokens` are given"
            checked.notes.append(f"{name}: its cost is unknown until {missing}")
        rows.append([name, prepared.nodes[name].stage.kind, will, cost, costs.in_one_line(derived[name])])
    left = [found for name, found in zip(chosen, estimates) if _will(prepared, name) != "reuse"]
    unknown = any(_is_unknown(prepared.nodes[one.job.stage].stage, one) for one in left)
    rows.append(
        ["all", "", "", _whole_cost(left) + (" and what is unknown" if unknown else ""), _on(machine)]
    )
    described = {
        "name": machine.name, "key": machine.key, "devices": machine.devices,
        "peak": machine.peak[machine.precision], "precision": machine.precision,
        "dollars_per_hour": machine.dollars * machine.devices, "source": machine.source,
    }  # fmt: skip
    return Planned(rows, derived, checked.notes, prepared, estimates, described)


def keep_plan(
    recipe: str | Path, runs: str | Path, overrides: Iterable[str] | Mapping[str, Any], only: Iterable[str]
) -> None:
    """Write what is planned for this machine beside the recipe's stages, to be held against what is spent.

    What is done already keeps the plan it had. What cannot be planned, the run itself refuses or finds out.
    """
    try:
        found = planned(recipe, runs, overrides, only)
    except TriviumError:
        return
    write_plan(found)


def write_plan(found: Planned) -> None:
    """The plan of each stage by its fingerprint, with those of stages that were planned earlier."""
    assert found.prepared is not None
    place = found.prepared.store.runs / found.prepared.recipe.name / PLAN_FILE
    before = read_object(place) if place.is_file() else {}
    stages: dict[str, Any] = {}
    for one in found.estimates:
        name = one.job.stage
        entry = found.prepared.entry(name).folder.name
        if before.get(name, {}).get("entry") == entry:
            stages[name] = before[name]
        elif _will(found.prepared, name) != "reuse":
            told = one.as_json()
            stages[name] = {"entry": entry} | {key: told[key] for key in PLAN_KEEPS}
    if stages:
        write_json(place, stages)


def _check_layout(stage: Any, job: Job, numbers: dict[str, Any]) -> None:
    """Name how several processes share a training, and refuse what its matrices cannot be divided by, and
    adapters for layers that the model does not have."""
    adapter = getattr(stage, "adapter", None)
    if job.config is not None and adapter is not None and adapter.targets:
        with unfilled():
            model = Transformer(job.config)
        try:
            targeted(model, adapter.targets)
        except TriviumError as error:
            raise TriviumError(f"{job.stage}: {error}") from error
    wish = getattr(stage, "parallel", None)
    if not isinstance(wish, Parallel) or not (described := wish.described()):
        return
    numbers["parallel"] = described
    if wish.context > 1 and stage.kind in (*PREFERENCES, *PROMPTED):
        raise TriviumError(
            f"{job.stage}: `parallel.context` cannot divide answers that share a prompt, as those of a "
            f"{stage.kind} stage; divide by `shard` or `tensor`."
        )
    if job.config is not None:
        try:
            if wish.tensor > 1:
                refuse_indivisible(job.config, wish.tensor)
            if wish.pipeline > 1:
                refuse_short(job.config, wish.pipeline)
            if wish.expert > 1:
                refuse_indivisible_experts(job.config, wish.expert)
        except TriviumError as error:
            raise TriviumError(f"{job.stage}: {error}") from error


PLAN_KEEPS = ("tokens", "flops", "seconds", "formula_seconds", "memory_bytes")


def _cost(found: Estimate) -> str:
    text = f"about {duration(max(found.seconds, 0.1))}"
    return f"{text}, ${found.dollars:,.2f}" if found.machine.dollars else text


def _is_unknown(stage: Any, found: Estimate) -> bool:
    """Whether a stage starts from a model not known here, or its kind does not say how long it trains."""
    if not isinstance(getattr(stage, "start", None), str):
        return False
    return found.job.config is None or (hasattr(stage, "learning_rate") and not found.seconds)


def _whole_cost(left: list[Estimate]) -> str:
    text = f"about {duration(sum(max(one.seconds, 0.1) for one in left if one.seconds))}"
    dollars = sum(one.dollars for one in left)
    return f"{text}, ${dollars:,.2f}" if dollars else text


def _on(machine: Machine) -> str:
    best = with_unit(machine.peak[machine.precision] * machine.devices, "FLOP/s")
    if machine.local:
        return f"on this machine, {best} at best"
    return f"on {machine.described()}, {best} at best in {machine.precision}"


def _will(prepared: Run, name: str) -> str:
    state = prepared.entry(name).state
    return {"done": "reuse", "running": "wait", "cut off": "resume", "absent": "run"}[state]


def _numbers(
    prepared: Run, name: str, derived: Mapping[str, dict[str, Any]], checked: Checked
) -> dict[str, Any]:
    """The numbers that follow from a stage's settings, its parents and the first rows of its data."""
    node = prepared.nodes[name]
    stage: Any = node.stage
    numbers = {**costs.inherited(prepared, name, derived), **stage.plan(_inputs(prepared, name, derived))}
    everything = {**derived, name: numbers}
    vocabulary = int(numbers.get("vocabulary", VOCABULARY))
    prompt = partial(costs.prompt_tokens, prepared, name, checked, vocabulary)
    if _will(prepared, name) != "reuse":
        stage.check_machine()
        check(prepared, name, everything, checked)
    if _will(prepared, name) == "reuse":
        return numbers | (costs.corpus_numbers(prepared, name, []) if stage.kind == "corpus" else {})
    reads = modalities_of(prepared, name)
    forms = None if reads is None else reads.forms
    tokenizer = costs.tokenizer_of(prepared, name)
    check_rows(prepared, name, tokenizer, numbers, checked)
    known = Reader(prepared, checked, everything).portions(name, tokenizer, vocabulary, forms)
    if stage.kind == "corpus":
        numbers |= costs.corpus_numbers(prepared, name, known)
    if stage.kind in PACKED:
        numbers |= costs.training_numbers(prepared, name, known, numbers)
        costs.check_repeats(name, stage, numbers.get("epochs", {}))
    elif is_online(stage):
        numbers |= costs.online_numbers(stage, _rows(name, checked), prompt())
    elif stage.kind in PREFERENCES and known:
        numbers |= costs.pair_numbers(prepared, name, checked, numbers)
        if getattr(stage, "process", False):
            numbers |= costs.solution_numbers(prepared, name, checked, vocabulary)
    elif stage.kind in PROMPTED:
        numbers |= costs.policy_numbers(stage, numbers, _rows(name, checked), prompt())
    elif stage.kind == "synthesize":
        length = float(np.concatenate([one.lengths for one in known]).mean()) if known else 0.0
        numbers |= costs.synthesis_numbers(stage, _rows(name, checked), length)
    elif stage.kind in ("quality_classifier", "curate"):
        numbers |= costs.judging_numbers(stage, checked.sources.get(name, {}))
    elif stage.kind in ("compare", "label_steps") and _rows(name, checked):
        numbers |= {"questions": _rows(name, checked), "prompt tokens": prompt()}
    elif stage.kind == "grow":
        numbers |= {} if tokenizer is None else {"probe tokens": len(tokenizer.encode(PROBE))}
    if getattr(stage, "sycophancy", 0):
        numbers |= costs.sycophancy_numbers(prepared, name, vocabulary)
    if stage.kind in ANSWERING:
        numbers |= costs.answer_numbers(prepared, name, checked, vocabulary)
    _note_held_out(prepared, name, numbers, derived, checked)
    return numbers | costs.measured_numbers(stage, known, numbers)


def _rows(name: str, checked: Checked) -> int:
    """How many rows the sources of a stage have, as far as they are known."""
    return sum(looked.documents or 0 for looked in checked.sources.get(name, {}).values())


def _note_held_out(
    prepared: Run, name: str, numbers: dict[str, Any], derived: Mapping[str, dict[str, Any]], checked: Checked
) -> None:
    """Say where nothing is held out, and refuse to measure on nothing."""
    node = prepared.nodes[name]
    stage: Any = node.stage
    counts: list[int | None] = []
    for source, looked in checked.sources.get(name, {}).items():
        portion = stage.data.get(source) if isinstance(getattr(stage, "data", None), dict) else None
        if stage.kind == "corpus":
            share = stage.validation
        elif portion is not None and stage.kind in (*PACKED, *PREFERENCES) and not is_online(stage):
            share = portion.validation
        else:
            continue
        counts.append(looked.held_out(share))
        if counts[-1] == 0 and share > 0:
            checked.notes.append(
                f"{name}: `validation: {share:g}` holds out none of the {looked.documents} documents of "
                f"{source}, so there is no validation loss; a share of "
                f"{min(0.5, max(0.1, 3 / len(looked.rows))):.2g} would hold some out"
            )
    for parent in node.parents.values():
        held = derived.get(parent.stage, {}).get("held out")
        if held is not None:
            counts.append(held)
    if stage.kind == "corpus" and counts:
        numbers["held out"] = None if None in counts else sum(count or 0 for count in counts)
    wants = "validation" in stage.model_fields_set and stage.kind in PACKED
    if wants and counts and all(count == 0 for count in counts):
        raise TriviumError(
            f"{name}: `validation` is asked for and nothing is held out of its data; hold out a larger share "
            "where the data is named, as in `validation: 0.1`."
        )


def _inputs(
    prepared: Run, name: str, derived: Mapping[str, dict[str, Any]]
) -> dict[str, Path | Mapping[str, Any]]:
    """For every thing a stage names its folder, or the planned numbers of what is not made yet."""
    node = prepared.nodes[name]
    inputs: dict[str, Path | Mapping[str, Any]] = {}
    for written, parent in node.parents.items():
        entry = prepared.entry(parent.stage)
        inputs[written] = entry.output if entry.state == "done" else derived[parent.stage]
    return inputs | {written: prepared.place_of(name, written) or Path(written) for written in node.outside}
