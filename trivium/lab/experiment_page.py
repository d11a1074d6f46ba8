"""The page of an experiment: made of the JSON beside it alone, without a script."""

from collections.abc import Mapping
from typing import Any

from trivium.lab.charts import Row, Rows, Table, axis, render
from trivium.lab.compute_curves import drawn
from trivium.lab.formatting import ends, figure
from trivium.lab.ladder import drawn as ladder_drawn

CLASSES = {"supported": "yes", "not shown": "open", "control did not fail": "no"}


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    many = len(found["seeds"])
    claims = [
        {**claim, "class": CLASSES[claim["verdict"]], "sentence": sentence(claim, many)}
        for claim in found["claims"]
    ]
    measures = [
        {"label": label, **measure, "chart": _chart(measure), "table": _table(label, measure, found["seeds"])}
        for label, measure in found["measures"].items()
    ]
    title = f"{found['recipe']}: an experiment"
    compute = drawn(found["compute"]) if found.get("compute") else None
    ladder = ladder_drawn(found["ladder"]) if found.get("ladder") else None
    shown = {"ladder": ladder, "claims": claims, "measures": measures, "compute": compute}
    return render("experiment.jinja", title=title, found=found, **shown) + "\n"


def sentence(claim: Mapping[str, Any], many: int) -> str:
    """What a verdict rests on; it never says more than the intervals do."""
    arm, control = claim["arm"], claim["control"]
    against = f" minus {claim['against']}" if claim["against"] else ""
    on = claim["on"]
    bound = (
        f"above {figure(claim['above'])}" if claim["above"] is not None else f"below {figure(claim['below'])}"
    )
    effect = f"‘{on}’ of {arm}{against} is {_with_ci(claim['effect'])}; the claim needs it {bound}"
    if claim["against"] == control:
        beside = f"The control is {control} itself, and {arm} has to differ from it"
    else:
        beside = f"The control must not do that: {control}{against} is {_with_ci(claim['control_effect'])}"
        beside += f", and {arm} minus {control} is {_with_ci(claim['over_control'])}"
    return f"{effect}. {beside}. {_why(claim, many)}"


def _why(claim: Mapping[str, Any], many: int) -> str:
    bound, sign = (claim["above"], 1) if claim["above"] is not None else (claim["below"], -1)
    if claim["verdict"] == "control did not fail":
        return "The control does it too, so what is said to matter is not what matters."
    if claim["verdict"] == "supported":
        return f"Chance seldom does this (p = {figure(claim['corrected_p'])}, corrected for all claims)."
    if sign * (claim["effect"]["value"] - bound) <= 0:
        return "That is on the other side, so the claim is not shown."
    if many == 1:
        return "One seed says nothing about other seeds, so the claim is not shown."
    if claim["effect"]["low"] is None or claim["over_control"]["low"] is None:
        return (
            "Nothing bounds what chance does here: seeds agree to the last digit, or a number's own interval "
            "is open. So the claim is not shown."
        )
    return "Chance could do this, so the claim is not shown."


def _with_ci(found: Mapping[str, Any]) -> str:
    return f"{figure(found['value'])} ({ends(found)})"


def _chart(measure: Mapping[str, Any]) -> Rows:
    """A row an arm: its seeds as dots, and the interval of their mean."""
    values = [value for one in measure["arms"].values() for value in one["values"]]
    low, high = min(values), max(values)
    # Room for intervals, but a wide one does not squeeze the dots.
    room = (high - low) * 0.35 or abs(high) * 0.1 or 1.0
    scale = axis([max(low - room, 0.0) if low >= 0 else low - room, high + room])
    rows = [Row(arm, one["interval"], one["values"]) for arm, one in measure["arms"].items()]
    return Rows("", rows, scale)


def _table(label: str, measure: Mapping[str, Any], seeds: list[int]) -> Table:
    rows = [
        [arm, figure(one["interval"]["value"]), ends(one["interval"]), *map(figure, one["values"])]
        for arm, one in measure["arms"].items()
    ]
    return Table(["arm", "mean", "95 % interval", *(f"seed {seed}" for seed in seeds)], rows, label)
