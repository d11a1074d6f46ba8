"""What an experiment found: every number of every arm and seed, and a verdict on every claim."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.evals.results import as_json
from trivium.evals.statistics import CONFIDENCE, Interval, holm, normal_quantile, t_below, t_quantile
from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import read_json, write_json, write_text
from trivium.kit.metrics import read_metrics
from trivium.kit.numbers import short
from trivium.kit.seals import read_record
from trivium.lab.compute_curves import curve, summary
from trivium.lab.experiment_page import page
from trivium.lab.formatting import ends, figure
from trivium.lab.ladder import climbed
from trivium.lab.ladder import table as ladder_table
from trivium.recipe.experiment import Claim, Experiment, Measure

SUPPORTED, NOT_SHOWN, NOT_FAILED = "supported", "not shown", "control did not fail"
Folders = Mapping[tuple[str, int], Mapping[str, Path]]
"""For every arm and seed, the folder of each stage."""


@dataclass(frozen=True)
class Number:
    """A number, and the standard error its questions leave: endless where they bound nothing."""

    value: float
    error: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval, and how likely chance alone takes it as far from the bound."""

    interval: Interval
    p_value: float

    def passes(self, claim: Claim) -> bool:
        """Whether it lies beyond the claim's bound, further than chance takes it."""
        return claim.sign * (self.interval.value - claim.bound) > 0 and self.p_value < 1 - CONFIDENCE


def conclude(name: str, experiment: Experiment, folders: Folders, place: Path) -> dict[str, Any]:
    """Judge, and write `experiment.json` and the page made of nothing but it."""
    found = {"recipe": name, **judged(experiment, folders)}
    write_json(place / "experiment.json", found)
    write_text(place / "experiment.html", page(found))
    return found


def judged(experiment: Experiment, folders: Folders) -> dict[str, Any]:
    """Numbers, intervals and verdicts, ready for JSON."""
    seeds = list(dict.fromkeys(seed for _, seed in folders))
    numbers = {
        label: {
            arm: [_number(measure, folders[arm, seed]) for seed in seeds]
            for arm in experiment.arms
            if _has(measure, folders[arm, seeds[0]])
        }
        for label, measure in experiment.measure.items()
    }
    return {
        "question": experiment.question,
        "seeds": seeds,
        "arms": {arm: _cost(folders, arm, seeds) for arm in experiment.arms},
        "measures": {
            label: {
                **measure.model_dump(),
                "arms": {
                    arm: {
                        "values": [one.value for one in values],
                        "errors": [one.error if math.isfinite(one.error) else None for one in values],
                        "interval": as_json(over_seeds(values).interval),
                    }
                    for arm, values in numbers[label].items()
                },
            }
            for label, measure in experiment.measure.items()
        },
        "claims": verdicts(experiment.claims, numbers),
        "compute": _compute(experiment, folders, seeds),
        "ladder": None if experiment.ladder is None else climbed(experiment.ladder, folders, seeds),
    }


def _compute(experiment: Experiment, folders: Folders, seeds: Sequence[int]) -> dict[str, Any] | None:
    """The curves over FLOPs, where the experiment asks for them."""
    wish = experiment.compute
    if wish is None:
        return None

    def line(arm: str, seed: int) -> list[Path]:
        return [folders[arm, seed][one] for one in wish.stages if one in folders[arm, seed]]

    curves = {arm: [curve(line(arm, seed), wish.take) for seed in seeds] for arm in experiment.arms}
    return summary(curves, wish.targets, wish.take)


def over_seeds(values: Sequence[Number], bound: float = 0.0) -> Estimate:
    """The mean with a t interval over seeds, never narrower than the questions asked in each allow."""
    n = len(values)
    mean = sum(one.value for one in values) / n
    asked = math.sqrt(sum(one.error**2 for one in values)) / n
    if n < 2:
        return Estimate(Interval(mean, -math.inf, math.inf, n), 1.0)
    spread = math.sqrt(sum((one.value - mean) ** 2 for one in values) / (n - 1) / n)
    if spread <= 1e-12 * abs(mean):
        # Seeds that all say the same show no spread: what their questions leave stands in for it.
        spread = asked
    if spread == 0 or math.isinf(asked):
        return Estimate(Interval(mean, -math.inf, math.inf, n), 1.0)
    tail = 0.5 + CONFIDENCE / 2
    half = max(t_quantile(tail, n - 1) * spread, normal_quantile(tail) * asked)
    distance = abs(mean - bound)
    by_seeds = 2 * (1 - t_below(distance / spread, n - 1))
    by_items = math.erfc(distance / asked / math.sqrt(2)) if asked > 0 else 0.0
    return Estimate(Interval(mean, mean - half, mean + half, n), max(by_seeds, by_items))


def verdicts(
    claims: Sequence[Claim], numbers: Mapping[str, Mapping[str, list[Number]]]
) -> list[dict[str, Any]]:
    """A claim needs its effect, and more of it than its control; Holm's correction is over all claims."""
    estimates = []
    for claim in claims:
        arms = numbers[claim.on]
        over_control = over_seeds(_differences(arms[claim.arm], arms[claim.control]))
        estimates.append((_effect(claim, claim.arm, arms), _effect(claim, claim.control, arms), over_control))
    corrected = holm([max(effect.p_value, over.p_value) for effect, _, over in estimates])
    found = []
    for claim, (effect, control, over), p_value in zip(claims, estimates, corrected):
        apart = claim.sign * over.interval.value > 0
        beyond = claim.sign * (effect.interval.value - claim.bound) > 0
        if control.passes(claim):
            verdict = NOT_FAILED
        else:
            verdict = SUPPORTED if beyond and apart and p_value < 1 - CONFIDENCE else NOT_SHOWN
        found.append(
            {
                **claim.model_dump(),
                "effect": as_json(effect.interval),
                "control_effect": as_json(control.interval),
                "over_control": as_json(over.interval),
                "corrected_p": p_value,
                "verdict": verdict,
            }
        )
    return found


def _effect(claim: Claim, arm: str, arms: Mapping[str, list[Number]]) -> Estimate:
    """The arm's own numbers, or seed by seed how they differ from those it is compared with."""
    values = arms[arm]
    if claim.against == arm:
        # The control is what the arm is compared with: it differs from itself by nothing.
        return Estimate(Interval(0.0, 0.0, 0.0, len(values)), 1.0 if claim.bound == 0 else 0.0)
    if claim.against is not None:
        values = _differences(values, arms[claim.against])
    return over_seeds(values, claim.bound)


def _differences(first: Sequence[Number], second: Sequence[Number]) -> list[Number]:
    return [
        Number(a.value - b.value, math.hypot(a.error, b.error)) for a, b in zip(first, second, strict=True)
    ]


def _has(measure: Measure, stages: Mapping[str, Path]) -> bool:
    return measure.stage in stages and (measure.since is None or measure.since in stages)


def _number(measure: Measure, stages: Mapping[str, Path]) -> Number:
    number = taken(stages[measure.stage], measure.take)
    if measure.since is None:
        return number
    return _differences([number], [taken(stages[measure.since], measure.take)])[0]


def _cost(folders: Folders, arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """What an arm's training costs on the average of its seeds; what arms share counts in each."""
    found = [cost(folders[arm, seed].values()) for seed in seeds]
    return {key: sum(one[key] for one in found) / len(found) for key in found[0]}


def tables(found: Mapping[str, Any]) -> list[list[list[str]]]:
    """What `conclude` found as two tables for a person: all numbers, then the claims."""
    numbers = [["measure", "arm", "mean", "95 % interval", "seeds", "tokens"]]
    for label, measure in found["measures"].items():
        for arm, one in measure["arms"].items():
            inside = one["interval"]
            numbers.append([
                label, arm, figure(inside["value"]), ends(inside),
                " ".join(figure(value) for value in one["values"]), short(found["arms"][arm]["tokens"]),
            ])  # fmt: skip
            label = ""
    claims = [["claim", "verdict", "effect (95 %)", "the control's", "over the control"]]
    for one in found["claims"]:
        claims.append([
            one["says"], one["verdict"],
            *(f"{figure(one[key]['value'])} ({ends(one[key])})"
              for key in ("effect", "control_effect", "over_control")),
        ])  # fmt: skip
    ladder = found.get("ladder")
    verdict = [] if ladder is None else [ladder_table(ladder)]
    return [*(table for table in (numbers, claims) if len(table) > 1), *verdict]


EARLIER = {
    "right": "accuracy",
    "chosen": "multiple-choice accuracy",
    "gave way": "flip rate",
    "mended by a true hint": "accepts correction",
    "prefers flattery": "prefers sycophancy",
    "surer than right": "overconfidence",
}
"""Earlier names of measures, each with the present one."""


def taken(folder: Path, take: str) -> Number:
    """The number called so: of the report the stage wrote, of its summary, or the last one in its log."""
    report = folder / "report" / "results.json"
    found = _reported(read_json(report)) if report.is_file() else _logged(folder)
    take = _present(take)
    if take not in found:
        raise TriviumError(
            f"{folder.name} has no number `{take}`{nearest(take, found) or f'; it has {_listed(found)}.'}"
        )
    return found[take]


EARLIER_LABELS = {"sums at once": "sums (direct answer)"}


def _present(take: str) -> str:
    """The present name of a number that a recipe calls by an earlier one."""
    label, colon, measure = take.partition(": ")
    label = EARLIER_LABELS.get(label, label)
    name, comma, group = measure.partition(", ")
    return f"{label}{colon}{EARLIER.get(name, name)}{comma}{group}"


def cost(folders: Iterable[Path]) -> dict[str, float]:
    """The tokens that a line of stages learnt from, the seconds it took, and its FLOPs."""
    records = [read_record(folder) for folder in folders]
    models = [one.get("summary") or {} for one in records if one["produces"] == "model"]
    return {
        "tokens": float(sum(one.get("tokens", 0) for one in models)),
        "seconds": float(sum(one["seconds"] for one in records)),
        "flops": float(sum(one.get("flops") or 0.0 for one in records)),
    }


def _reported(summary: Mapping[str, Any]) -> dict[str, Number]:
    """`task: measure`, and `task: measure, group=value` for every group there is."""
    found: dict[str, Number] = {}
    for label, task in summary["tasks"].items():
        for name, interval in task["measures"].items():
            found[f"{label}: {name}"] = _within(interval)
        for axis, values in task["groups"].items():
            for value, measures in values.items():
                for name, interval in measures.items():
                    found[f"{label}: {name}, {axis}={value}"] = _within(interval)
    return found


def _within(interval: Mapping[str, Any]) -> Number:
    low, high = interval["low"], interval["high"]
    width = high - low if low is not None and high is not None else math.inf
    return Number(interval["value"], width / 2 / normal_quantile(0.5 + CONFIDENCE / 2))


def _logged(folder: Path) -> dict[str, Number]:
    """The last value of every column of the log, and what the summary says."""
    found: dict[str, Number] = {}
    for row in [*read_metrics(folder / "metrics.jsonl"), read_record(folder).get("summary") or {}]:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = Number(float(value))
            elif isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
                found[name] = _within(value)
    return found


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:30]) + (" ..." if len(names) > 30 else "")
