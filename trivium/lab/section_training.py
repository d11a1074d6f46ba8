"""The stages as a tree with their cost, and the curves of their training."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from trivium.kit.numbers import short
from trivium.lab.charts import Axis, Line, Panel, Table, axis, log_axis
from trivium.lab.formatting import figure, with_ci
from trivium.model.rank import has_risen

LABELS = {
    "loss": "loss (nats per token)",
    "bits_per_byte": "validation bits per byte",
    "validation_loss": "validation loss",
    "reward": "reward",
    "pass@1": "pass@1",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "tokens per answer",
    "frac_reward_zero_std": "prompts that taught nothing",
    "kl": "KL from the reference",
    "rewards/accuracies": "accuracy on pairs",
    "rewards/margins": "margin between answers",
    "accuracy": "accuracy on pairs",
}
SHOWN = {
    "reward": ("reward", "completions/mean_length", "entropy"),
    "rewards/accuracies": ("rewards/accuracies", "rewards/margins", "loss"),
    "accuracy": ("accuracy", "loss"),
    "loss": ("loss", "bits_per_byte"),
}
"""The curves drawn of a stage, chosen by the first of these keys that it logged."""


def stages(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Every stage with its branch of the tree and its cost, and what each inherited or derived."""
    by_name = {stage["name"]: stage for stage in raw["stages"]}
    costs = {row["stage"]: row for row in numbers["cost"]}
    rows = [
        {
            **by_name[name],
            "branch": branch,
            "share": costs[name]["seconds share"],
            "reads": [one for one in by_name[name]["parents"] if one != _parent(by_name[name])]
            + list(by_name[name]["outside"]),
        }
        for name, branch in _tree(by_name)
    ]
    settings = [
        [stage["name"], str(row["change"]), _text(row["before"]), _text(row["after"])]
        for stage in raw["stages"]
        for row in stage["changes"]
    ]
    title = "Inherited and derived settings"
    return {
        "rows": rows,
        "settings": Table(["stage", "setting", "before", "after"], settings, title, title),
        "planned": planned_and_spent(raw["stages"]),
        "grown": new_weights(raw["stages"]),
    }


def planned_and_spent(stages: Sequence[Mapping[str, Any]]) -> Table | None:
    """What `trivium plan` expected of each stage beside what it took."""
    rows = []
    for stage in stages:
        planned = stage.get("planned")
        if not planned:
            continue
        cells = [stage["name"]]
        for key, spent in (
            ("tokens", "tokens"), ("flops", "flops"), ("seconds", "seconds"),
            ("memory_bytes", "peak_memory"),
        ):  # fmt: skip
            expected, took = planned.get(key), stage.get(spent)
            cells += [short(expected) if expected else "", short(took) if took else "",
                      f"{took / expected - 1:+.0%}" if expected and took else ""]  # fmt: skip
        rows.append(cells)
    if not rows:
        return None
    heading = ["stage"]
    for name in ("tokens", "FLOPs", "seconds", "bytes at peak"):
        heading += [f"{name}, planned", "spent", "apart"]
    return Table(heading, rows, "Planned and spent", "Planned and spent")


def new_weights(stages: Sequence[Mapping[str, Any]]) -> Table | None:
    """How many directions the matrices that growth added use, as a share of all, before and after training.

    Copies that were not made to differ stay copies, and their rank where it was.
    """
    rows = []
    for stage in stages:
        found = stage.get("new_weights")
        if not found or not found["after"]:
            continue
        before, after = found["before"], found["after"]
        cells = [stage["name"], str(after["matrices"])]
        for name in ("rank", "effective_rank"):
            cells += [figure(before[name] if before else None, "share"), figure(after[name], "share")]
        verdict = "has risen" if has_risen(before, after) else "has not risen: copies stayed copies"
        rows.append([*cells, verdict])
    heading = ["stage", "new matrices", "rank, grown", "trained", "effective rank, grown", "trained", "rank"]
    title = "Rank of the weights that growth added"
    return Table(heading, rows, title, title) if rows else None


def _text(value: Any) -> str:
    return figure(value, "setting") if isinstance(value, int | float) else str(value)


def _parent(stage: Mapping[str, Any]) -> str | None:
    """The stage that another hangs below: the one its model comes from, else the last it needs."""
    found: str | None = stage["from"] or (stage["parents"][-1] if stage["parents"] else None)
    return found


def _tree(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The names in the order of a tree, each with the branches drawn before it."""
    children: dict[str | None, list[str]] = {}
    for name, stage in stages.items():
        parent = _parent(stage)
        children.setdefault(parent if parent in stages else None, []).append(name)

    def walk(name: str, lead: str, branch: str) -> Iterator[tuple[str, str]]:
        yield name, lead + branch
        below = children.get(name, [])
        inner = lead + {"": "", "├ ": "│ ", "└ ": "  "}[branch]
        for child in below:
            yield from walk(child, inner, "└ " if child == below[-1] else "├ ")

    for root in children.get(None, []):
        yield from walk(root, "", "")


Points = Sequence[tuple[int, float]]


def curve(
    name: str,
    points: Points,
    title: str = "",
    *,
    settled: bool = False,
    logarithmic: bool = False,
    validation: Points = (),
    beside: Points = (),
) -> Panel:
    """One logged number from step to step, its validation, and the same number of another result.

    `settled` leaves the first tenth of a loss out of the scale; `logarithmic` acts where all values are
    above zero.
    """
    every = [*points, *validation, *beside]
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    steps = Axis(first, last, (first, last), "optimiser step")
    drawn = [(name, points, "main"), ("validation", validation, "other"), ("beside", beside, "faint")]
    lines = [
        Line(label, [(step, value, None, None) for step, value in some], look, dots=len(some) <= 12)
        for label, some, look in drawn
        if some
    ]
    # The first steps of a loss would flatten all that follows.
    settles = settled and name.startswith(("loss", "validation", "bits", "grad_norm"))
    skipped = first + (last - first) / 10 if settles and len(points) >= 10 else first
    values = [value for step, value in every if step >= skipped]
    if logarithmic and min(value for _, value in every) > 0:
        scale = log_axis(values)
    else:
        scale = axis(values)
    cut = any(not scale.low <= value <= scale.high for _, value in every)
    note = "▲▼ values outside the scale" if cut else ""
    label = title or label_of(name)
    return Panel(label, lines, steps, scale, latest=figure(points[-1][1], "setting"), note=note)


def label_of(name: str, logged: Collection[str] = ()) -> str:
    """What a curve is called; the loss of a stage that logs rewards or accuracy is no mean over tokens."""
    if name == "loss" and not {"reward", "rewards/accuracies", "accuracy"}.isdisjoint(logged):
        return "loss"
    if name.startswith("rewards/") and name.endswith("/mean"):
        return f"reward {name.split('/')[1]}"
    return LABELS.get(name, name.replace("_", " "))


def curves(raw: Mapping[str, Any]) -> dict[str, Any]:
    """For each stage that trained: the number it optimised and its validation."""
    panels = [
        curve(key, found[key], f"{name}: {label_of(key, found)}")
        for name, found in raw["curves"].items()
        for key in _chosen(found)
    ]
    rows = [
        [
            f"{name}: {key}",
            *(figure(one, "setting") for one in (values[0], min(values), max(values), values[-1])),
        ]
        for name, found in raw["curves"].items()
        for key, points in found.items()
        for values in [[value for _, value in points]]
    ]
    measured = [
        [f"{stage['name']}: {name}", with_ci(one), str(one.get("n", ""))]
        for stage in raw["stages"]
        for name, one in stage["measured"].items()
    ]
    own = "Measured by the stages when they were done, with 95 % intervals"
    return {
        "panels": panels,
        "first_and_last": _first_and_last(raw["curves"]),
        "table": Table(
            ["curve", "first", "least", "most", "last"], rows, "First and last values of the curves"
        ),
        "measured": Table(["stage", "value", "n"], measured, own, own),
    }


def _chosen(found: Mapping[str, Any]) -> list[str]:
    for sign, names in SHOWN.items():
        if sign in found:
            return [name for name in names if name in found]
    return []


def _first_and_last(curves: Mapping[str, Any]) -> list[str]:
    telling = ("bits_per_byte", "reward", "rewards/accuracies", "accuracy", "loss")
    found = []
    for name, logged in curves.items():
        key = next((one for one in telling if one in logged), None)
        if key is not None and len(logged[key]) > 1:
            first, last = logged[key][0][1], logged[key][-1][1]
            found.append(f"{name}: {label_of(key, logged)} {figure(first)} → {figure(last)}")
    return found
