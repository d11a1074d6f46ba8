"""The index page: every recipe with its results, verdicts, what it cost, and the base of every model."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.kit.files import write_text
from trivium.lab.charts import render
from trivium.lab.experiment_page import CLASSES
from trivium.pipeline.listing import COST, costs, date, results, total, verdicts

HEADING = ["result", "kind", "state", "started"]
PAGES = ("report.html", "experiment.html")


def write_index(runs: str | Path, to: Path | None = None, price: float | None = None) -> Path:
    """Write the page (`runs/index.html` unless another file is named), and return its place."""
    place = to or Path(runs) / "index.html"
    write_text(place, page(Path(runs), results(runs, price=price), place.parent))
    return place


def page(runs: Path, found: list[dict[str, Any]], beside: Path) -> str:
    """The page's text; links lead from the folder `beside`."""
    stages = {one["entry"]: one["stage"] for one in found}
    recipes = []
    cost = COST if any(one["cost"] is not None for one in found) else COST[:-1]
    for name in dict.fromkeys(one["recipe"] for one in found):
        some = [one for one in found if one["recipe"] == name]
        claims = [{**claim, "class": CLASSES.get(claim["verdict"], "open")} for claim in verdicts(runs, name)]
        pages = [
            (file.partition(".")[0], _link(runs / name / file, beside))
            for file in PAGES
            if (runs / name / file).is_file()
        ]
        rows = [_row(one, stages, len(cost)) for one in some]
        sums = costs(total(some))[: len(cost)]
        rows.append(["all together", "", "", "", *sums, ""])
        recipes.append({"name": name, "claims": claims, "pages": pages, "rows": rows, "costs": sums})
    whole = ["all recipes", *costs(total(found))[: len(cost)]]
    return (
        render(
            "index.jinja", title="Results", recipes=recipes, count=len(stages),
            heading=[*HEADING, *cost, "descends from"], whole=whole, cost=cost,
            made=time.strftime("%Y-%m-%d %H:%M"),
        )
        + "\n"
    )  # fmt: skip


def _row(one: Mapping[str, Any], stages: Mapping[str, Any], columns: int) -> list[str]:
    state = f"{one['state']}, earlier settings" if one["earlier_settings"] else str(one["state"])
    state += ", code changed since" if one["code_changed"] else ""
    shown = one["name"] if one["earlier_settings"] else str(one["name"]).partition("/")[2]
    bases = ", ".join(f"{stages.get(base) or base}" for base in one["bases"])
    return [shown, one["kind"], state, date(one["started"]), *costs(one)[:columns], bases]


def _link(file: Path, beside: Path) -> str:
    return Path(os.path.relpath(file, beside)).as_posix()
