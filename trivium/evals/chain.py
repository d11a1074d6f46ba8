"""A chain of trainings seen as a whole: what each step gained here and lost there, skill by skill."""

from collections.abc import Sequence

from trivium.evals.evaluate import Comparison, compare
from trivium.evals.results import Results

VERDICTS = {True: "gained", False: "lost", None: "kept"}
"""`kept` says that no difference is shown, not that there is none."""


def chain_table(steps: Sequence[Results]) -> list[list[str]]:
    """Every headline of every step, and what the last step did to it; the first row is the heading."""
    assert len(steps) > 1, "a chain has two ends"
    now, before = steps[-1], steps[-2]
    latest, whole = _headlines(compare(before, now)), _headlines(compare(steps[0], now))
    ends = [
        (f"since {before.model} (95 %)", latest),
        *([(f"since {steps[0].model} (95 %)", whole)] if len(steps) > 2 else []),
    ]
    rows = [["skill", *(step.model for step in steps), *(name for title, _ in ends for name in (title, ""))]]
    for label, task in now.tasks.items():
        for metric in task.headline:
            key = (label, metric)
            if all(key not in found for _, found in ends):
                continue
            told = [piece for _, found in ends for piece in _told(found.get(key))]
            rows.append([f"{label}: {metric}", *(_value(step, *key) for step in steps), *told])
    return rows


def _headlines(found: Sequence[Comparison]) -> dict[tuple[str, str], Comparison]:
    return {(one.task, one.metric): one for one in found if one.headline}


def _told(one: Comparison | None) -> list[str]:
    if one is None:
        return ["", ""]
    inside = one.difference.interval
    return [f"{inside.value:+.3g} ({inside.low:+.3g} to {inside.high:+.3g})", VERDICTS[one.better]]


def _value(step: Results, label: str, metric: str) -> str:
    task = step.tasks.get(label)
    measures = {} if task is None else task.measures()
    return f"{measures[metric].value:.3g}" if metric in measures else ""
