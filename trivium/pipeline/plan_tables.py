"""Plans as tables: the parts of one on a machine, two side by side, one setting at several values."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.lab.planner.estimate import Estimate
from trivium.pipeline.plan import Planned, planned
from trivium.pipeline.run import prepare
from trivium.recipe.graph import Node

GIB = 2**30
SWEPT = {"context": ("pretrain", "midtrain", "sft", "preference", "reward")}
"""Settings that `--sweep` moves in every stage of these kinds."""


def machine_table(found: Planned) -> list[list[str]]:
    """For every stage that computes: layout, memory of a device by part, share of the peak, time, money."""
    parts = ("weights", "gradients", "optimiser", "activations", "cache", "logits", "runtime")
    rows = [["stage", "tokens", "FLOPs", "layout", "GiB", *parts, "peak", "time", "cost"]]
    for one in found.estimates:
        if not one.flops.total:
            continue
        memory = asdict(one.memory)
        rows.append([
            one.job.stage, short(one.job.tokens), short(one.flops.total), _layout(one),
            f"{one.memory.total / GIB:.1f}", *(f"{memory[part] / GIB:.1f}" for part in parts),
            f"{one.share:.0%}", duration(one.seconds), _dollars(one.dollars),
        ])  # fmt: skip
        if len(one.phases) > 1:
            rows += [
                [f"  {name}", short(phase["tokens"]), short(phase["flops"]), *[""] * 10,
                 duration(phase["seconds"]), ""]
                for name, phase in one.phases.items()
            ]  # fmt: skip
    return rows


def _layout(one: Estimate) -> str:
    text = one.layout.described()
    if not one.fits:
        text += ": does not fit"
    if one.busy < one.machine.devices:
        text += f"; {one.machine.devices - one.busy} idle"
    return text


def _dollars(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars else ""


def side_by_side(plans: Mapping[str, Planned]) -> list[list[str]]:
    """Every stage of every plan: tokens, FLOPs, memory, time and cost."""
    names = list(plans)
    rows = [["stage", "", *names]]
    stages: dict[str, dict[str, Estimate]] = {}
    for name, plan in plans.items():
        for one in plan.estimates:
            if one.flops.total:
                stages.setdefault(one.job.stage, {})[name] = one
    says: dict[str, Any] = {
        "tokens": lambda one: short(one.job.tokens),
        "FLOPs": lambda one: short(one.flops.total),
        "in attention": lambda one: f"{one.flops.attention / one.flops.total:.1%}",
        "GiB a device": lambda one: f"{one.memory.total / GIB:.1f}",
        "layout": _layout,
        "time": lambda one: duration(one.seconds),
        "cost": lambda one: _dollars(one.dollars),
    }
    for stage, by_plan in stages.items():
        for place, (label, say) in enumerate(says.items()):
            cells = [say(by_plan[name]) if name in by_plan else "" for name in names]
            if any(cells):
                rows.append([stage if place == 0 else "", label, *cells])
    totals = {name: plan.as_json()["total"] for name, plan in plans.items()}
    rows.append(["all", "FLOPs", *(short(totals[name]["flops"]) for name in names)])
    rows.append(["", "time", *(duration(totals[name]["seconds"]) for name in names)])
    if any(one["cost"] for one in totals.values()):
        rows.append(["", "cost", *(_dollars(totals[name]["cost"]) for name in names)])
    return rows


def swept(
    recipe: str | Path,
    runs: str | Path,
    overrides: Iterable[str] | Mapping[str, Any],
    sweep: str,
    **wishes: Any,
) -> dict[str, Planned]:
    """A plan for each value of `setting=value,value`; a bare setting is moved in every stage that has it."""
    setting, _, values = sweep.partition("=")
    listed = [value.strip() for value in values.split(",") if value.strip()]
    if not setting or not listed:
        raise TriviumError(f"--sweep {sweep}: write a setting and its values, such as context=2k,8k,32k.")
    nodes = prepare(recipe, runs, overrides).nodes
    found = {}
    for value in listed:
        found[f"{setting}={value}"] = planned(
            recipe, runs, _with(overrides, _moved(nodes, setting, value)), **wishes
        )
    return found


def _moved(nodes: Mapping[str, Node], setting: str, value: str) -> list[str]:
    """The overrides that move a setting: of the stage it names, else of every stage of its kinds."""
    if "." in setting:
        key = setting if setting.startswith(("stages.", "report.", "experiment.")) else f"stages.{setting}"
        return [f"{key}={value}"]
    kinds = SWEPT.get(setting)
    named = [
        name for name, node in nodes.items()
        if setting in type(node.stage).model_fields and (kinds is None or node.stage.kind in kinds)
        and (kinds is None or getattr(node.stage, setting) is not None)
    ]  # fmt: skip
    if not named:
        raise TriviumError(f"--sweep: no stage has a setting `{setting}`; name one, such as base.{setting}.")
    found = []
    for name in named:
        present = getattr(nodes[name].stage, setting)
        nested = setting == "context" and hasattr(present, "longest")
        found.append(f"stages.{name}.{setting}{'.length' if nested else ''}={value}")
    return found


def _with(overrides: Iterable[str] | Mapping[str, Any], more: list[str]) -> Any:
    if isinstance(overrides, Mapping):
        return {**overrides, **dict(one.split("=", 1) for one in more)}
    return [*overrides, *more]
