"""What a quality classifier learns from, how, and what it says of itself."""

from __future__ import annotations

from typing import Any

from fake_endpoint import FakeEndpoint, started
from lines import moves
from tiny_run import Seen

from trivium.curate.classifier import Classifier
from trivium.kit.files import read_json

KIND = ["quality_classifier"]


def facts(seen: Seen) -> dict[str, Any]:
    return read_json(seen.folder / "classifier" / "report.json")


def fitted(seen: Seen) -> Classifier:
    return Classifier.load(seen.folder / "classifier")


def judged(seen: Seen) -> list[str]:
    return [one["text"] for one in facts(seen)["disagreements"]]


def learnt_otherwise(before: Seen, after: Seen) -> None:
    one, other = fitted(before).weights, fitted(after).weights
    assert one.shape != other.shape or not one.equal(other)


def fewer(before: Seen, after: Seen) -> None:
    assert facts(after)["trained_on"] < facts(before)["trained_on"]


def other_texts(before: Seen, after: Seen) -> None:
    assert set(judged(before)) != set(judged(after))


def divided(before: Seen, after: Seen) -> None:
    assert any("|" in text for text in judged(before))
    assert not any("|" in text for text in judged(after))


def reading(setting: str, file: str, both: dict[str, Any]) -> None:
    """How the documents behind one of the two settings are read."""

    def line(
        name: str, value: Any, old: dict[str, Any], new: dict[str, Any], check: Any, **more: Any
    ) -> None:
        moves(f"{setting}.{name}", value, kinds=KIND, both={**both, setting: [old]},
              beside={setting: [new]}, moved=False, **more)(check)  # fmt: skip

    plain, damaged = {"path": f"{file}.jsonl"}, {"path": f"damaged-{file}.jsonl"}
    skipped = {**damaged, "on_bad": "skip"}
    line("path", f"damaged-{file}.jsonl", plain, skipped, lambda before, after: None)
    line("limit", 30, plain, {**plain, "limit": 30}, fewer)
    line("columns", {"text": "other"}, plain, {**plain, "columns": {"text": "other"}}, other_texts)
    halves = {"path": f"halves-{file}"}
    line("split", "test", halves, {**halves, "split": "test"}, other_texts)
    line("subset", "en", plain, {**plain, "subset": "en"}, None, refused="names a part of a data set")
    line("on_bad", "skip", plain, skipped, lambda before, after: None)
    line("on_bad", "stop", skipped, damaged, None, refused=f"damaged-{file}.jsonl:")


reading("data", "texts", {})
reading("against", "others", {"labels": "contrast"})
NOTES = [{"path": "notes.txt", "separator": separator} for separator in ("\n\n", "|")]
moves("data.separator", "|", kinds=KIND,
      both={"labels": "contrast", "against": ["others.jsonl"], "data": NOTES[:1]},
      beside={"data": NOTES[1:]}, moved=False)(divided)  # fmt: skip
moves("against.separator", "|", kinds=KIND, both={"labels": "contrast", "against": NOTES[:1]},
      beside={"against": NOTES[1:]}, moved=False)(divided)  # fmt: skip


def at_least(characters: int) -> list[dict[str, Any]]:
    off = dict.fromkeys(("mean_line", "longest_line", "letters", "encoded"))
    return [{"filters": {"preset": "code", "rules": {**off, "characters": [characters, 1000]}}}]


@moves("labels", "rules", kinds=KIND, both={"rules": at_least(17)})
def what_rules_keep(before: Seen, after: Seen) -> None:
    labels = {one["text"]: one["label"] for one in facts(after)["disagreements"]}
    assert all((len(text) >= 17) == label for text, label in labels.items())


@moves("labels", "contrast", kinds=KIND, beside={"against": ["others.jsonl"]})
def contrast(before: Seen, after: Seen) -> None:
    assert all((" rises" not in one["text"]) == one["label"] for one in facts(after)["disagreements"])


def verdict(prompt: str, seed: int) -> str:
    """A text between the lines has 0 points, or 5 if it is long."""
    return f"Score: {5 if len(prompt.split('-----')[1]) > 18 else 0}"


JUDGE = FakeEndpoint(answer=verdict)
started(JUDGE)
# It ranks texts otherwise than their column does, which is refused unless said to be right.
ASKED = {"judge": {"endpoint": {"url": JUDGE.url, "model": "fake"}, "rows": 60, "bounds": {"accuracy": 0}}}


@moves("labels", ASKED, kinds=KIND)
def labels_of_a_judge(before: Seen, after: Seen) -> None:
    said = facts(after)["judge"]
    assert said["labelled"] <= 60
    assert {one["label"] for one in facts(after)["disagreements"]} <= {0, 1}


moves("rules", at_least(16), kinds=KIND, both={"labels": "rules", "rules": at_least(17)})(learnt_otherwise)
moves("label", "hard", kinds=KIND, refused="a number as `hard`")(None)
moves("ngrams", [1], kinds=KIND)(learnt_otherwise)
moves("buckets", 2048, kinds=KIND)(learnt_otherwise)
moves("shuffled", True, kinds=KIND)(learnt_otherwise)
moves("penalty", 0.1, kinds=KIND)(learnt_otherwise)
moves("held_out", 0.7, kinds=KIND)(fewer)
moves("documents", 40, kinds=KIND)(fewer)
moves("seed", 2, kinds=KIND)(other_texts)


@moves("scale", [0, 9], kinds=KIND, both={"scale": [0, 6]})
def scale(before: Seen, after: Seen) -> None:
    assert (fitted(before).scale, fitted(after).scale) == ((0, 6), (0, 9))


@moves("model", "base", kinds=KIND)
def model(before: Seen, after: Seen) -> None:
    assert fitted(after).features == "hidden"
    assert len(fitted(after).weights) == 32
