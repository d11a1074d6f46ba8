"""The funnel of a curation: what every step kept, why it left documents out, and some of them to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.curate.curation import FUNNEL
from trivium.kit.files import read_object
from trivium.kit.numbers import short
from trivium.lab.charts import Axis, Line, Panel, Table, axis
from trivium.lab.formatting import figure
from trivium.lab.gather import Seen

_BYTES_PER_TOKEN = 4
_LISTED = 30


def curations(stages: Sequence[Seen]) -> list[dict[str, Any]]:
    """What the stages that curated, or learned to, left behind."""
    found = []
    for stage in stages:
        for kind, path in (("funnel", FUNNEL), ("classifier", "classifier/report.json")):
            if (stage.folder / path).is_file():
                found.append({"stage": stage.name, "kind": kind, **read_object(stage.folder / path)})
    return found


def shown(raw: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A part of the section for each stage; nothing where none curated."""
    parts = {"funnel": _funnel, "classifier": _classifier}
    return [parts[one["kind"]](one) for one in raw.get("curation", [])] or None


def _funnel(one: Mapping[str, Any]) -> dict[str, Any]:
    rows, reasons, examples = [], [], []
    for step in one["steps"]:
        given, given_bytes, left, left_bytes = (
            sum(row[place] for row in step["sources"].values()) for place in range(4)
        )
        rows.append([
            step["title"], f"{given:,}", f"{left:,}", figure(left / given if given else None, "share"),
            short(given_bytes), short(left_bytes), short(left_bytes / _BYTES_PER_TOKEN),
        ])  # fmt: skip
        for rule, count in sorted(step["rules"].items(), key=lambda item: -item[1]):
            reasons.append([f"{step['title']}: {rule}", f"{count:,}"])
            kept = step["examples"][rule]
            cases = [{"id": name, "reason": why, "text": text} for _, name, why, text in kept]
            examples.append({"rule": f"{step['title']}: {rule}", "count": count, "cases": cases})
    heading = ["step", "documents in", "out", "kept", "bytes in", "out", "about tokens"]
    return {
        "stage": one["stage"], "kind": "funnel", "documents": one["documents"],
        "read": sum(row[0] for row in one["steps"][0]["sources"].values()),
        "steps": Table(heading, rows, "The funnel", "The funnel"),
        "sources": Table(["source", "read", "kept", "kept of it", "share of the result"], _sources(one),
                         "Sources and their realised shares", "Sources and their realised shares"),
        "reasons": Table(["step: rule", "documents"], reasons, "Documents by reason", "Documents by reason"),
        "examples": examples,
        "panels": _histograms(one["scores"]),
        "lines": _noted(one, "line: ", "most repeated lines", "line"),
        "items": _noted(one, "item: ", "examination items found in documents", "item"),
        "decisions": _decisions(one),
    }  # fmt: skip


def _sources(one: Mapping[str, Any]) -> list[list[str]]:
    first, last = one["steps"][0]["sources"], one["steps"][-1]["sources"]
    size = sum(row[3] for row in last.values())
    rows = []
    for source, row in first.items():
        left = last.get(source, [0, 0, 0, 0])
        rows.append([
            source, f"{row[0]:,}", f"{left[2]:,}", figure(left[2] / row[0] if row[0] else None, "share"),
            figure(left[3] / size if size else None, "share"),
        ])  # fmt: skip
    return rows


def _histograms(scores: Mapping[str, Sequence[int]]) -> list[Panel]:
    panels = []
    for name, counts in scores.items():
        bins = len(counts)
        points = [((place + 0.5) / bins, float(count), None, None) for place, count in enumerate(counts)]
        panels.append(
            Panel(name.replace("_", " "), [Line(name, points)], Axis(0, 1, (0, 0.5, 1), "score"),
                  axis(counts, "documents", zero=True))
        )  # fmt: skip
    return panels


def _noted(one: Mapping[str, Any], sign: str, title: str, column: str) -> Table | None:
    notes = [
        (name.removeprefix(sign), count)
        for step in one["steps"] for name, count in step["notes"].items() if name.startswith(sign)
    ]  # fmt: skip
    ranked = sorted(notes, key=lambda note: (-note[1], note[0]))[:_LISTED]
    heading = f"{len(notes)} {title}"
    rows = [[name, f"{count:,}"] for name, count in ranked]
    return Table([column, "times"], rows, heading, heading) if notes else None


def _decisions(one: Mapping[str, Any]) -> Table:
    titles = {step["key"]: step["title"] for step in one["steps"]}
    rows = [
        [f"{titles.get(key, key)}: {name}", figure(value) if isinstance(value, int | float) else str(value)]
        for key, facts in one["decisions"].items() for name, value in facts.items()
    ]  # fmt: skip
    return Table(["decision", "value"], rows, "What steps decided on all documents",
                 "What steps decided on all documents")  # fmt: skip


def _classifier(one: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [figure(row["threshold"]), figure(row["kept"], "share"), figure(row["precision"], "share"),
         figure(row["recall"], "share")]
        for row in one["thresholds"]
    ]  # fmt: skip
    bins = [(row["said"], row["is"], None, None) for row in one["calibration"]]
    across, up = (Axis(0, 1, (0, 0.5, 1), label) for label in ("score", "label"))
    cases = []
    for row in one["disagreements"]:
        reason = f"score {row['score']:.2f}, label {row['label']:.2f}"
        cases.append({"id": row["id"], "reason": reason, "text": row["text"]})
    title = "Precision and recall by threshold"
    return {
        "stage": one["stage"], "kind": "classifier", "documents": one["documents"],
        "auc": figure(one["auc"]), "error": figure(one["calibration_error"]),
        "agreement": figure(one.get("agreement"), "share"), "kappa": figure(one.get("kappa")),
        "judge": _judge(one["judge"]) if "judge" in one else None,
        "thresholds": Table(["score at least", "kept", "precision", "recall"], rows, title, title),
        "panels": [Panel("calibration", [Line("labels", bins)], across, up, diagonal=True)],
        "examples": [{"rule": "where score and label differ most", "count": len(cases), "cases": cases}],
    }  # fmt: skip


def _judge(one: Mapping[str, Any]) -> Table:
    """Who gave the labels, and what that judge was worth where scores were known."""
    rows = [
        ["judge", one["judge"]], ["rubric", one["rubric"]],
        ["scale", f"{one['scale'][0]} to {one['scale'][1]}"],
        ["texts labelled", f"{one['labelled']:,}"], ["texts without a score", f"{one['without a score']:,}"],
    ]  # fmt: skip
    tried = one["calibration"]
    if tried is None:
        rows.append(["tried on known scores", "no: too few texts have one"])
    else:
        right = tried["accuracy"]
        ends = f"{figure(right['low'], 'share')} to {figure(right['high'], 'share')}"
        rows.append(
            [f"ranks {tried['pairs']} pairs of known score", f"{figure(right['value'], 'share')} ({ends})"]
        )
        rows.append(["bias towards longer texts", figure(tried["length_bias"])])
    return Table(["labels from a judge", "value"], rows, "The judge", "The judge")
