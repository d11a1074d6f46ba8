"""Settings of label_steps: who solves, who grades, and what the labels say."""

from __future__ import annotations

from typing import Any

from lines import moves
from tiny_run import Seen

from trivium.kit.metrics import read_metrics

KIND = ["label_steps"]


def rows(seen: Seen) -> list[dict[str, Any]]:
    """The labelled solutions."""
    return read_metrics(seen.folder / "data" / "train.jsonl")


def known(row: dict[str, Any]) -> list[Any]:
    """The labels of a solution; where a step leaves no room for a roll-out there is none."""
    return [label for label in row["labels"] if label is not None]


def labels(seen: Seen) -> list[Any]:
    """All labels, solution by solution."""
    return [label for row in rows(seen) for label in known(row)]


def texts(seen: Seen) -> list[str]:
    """All solutions."""
    return [" ".join(row["completions"]) for row in rows(seen)]


@moves("from", "second", kinds=KIND)
@moves("temperature", 1.5, kinds=KIND)
@moves("seed", 2, kinds=KIND)
@moves("prompt_template", "Q: {prompt} A:", kinds=KIND)
def other_solutions(before: Seen, after: Seen) -> None:
    assert texts(before) != texts(after)


@moves("scorer", "mine.py:shortness", kinds=KIND)
def scorer(before: Seen, after: Seen) -> None:
    """It is never above the threshold."""
    assert before.summary["right_solutions"] > after.summary["right_solutions"] == 0
    assert before.summary["rollouts"] < after.summary["rollouts"]


@moves("threshold", 0, kinds=KIND)
def threshold(before: Seen, after: Seen) -> None:
    """Everything is right, so nothing is rolled out."""
    assert before.summary["right_solutions"] < after.summary["right_solutions"] == 1
    assert before.summary["rollouts"] > after.summary["rollouts"] == 0


@moves("rollouts", 4, kinds=KIND)
def rollouts(before: Seen, after: Seen) -> None:
    assert before.summary["rollouts"] % 2 == after.summary["rollouts"] % 4 == 0
    assert texts(before) == texts(after)


@moves("labels", "soft", "exact", "outcome", kinds=KIND, both={"rollouts": 3})
def kinds_of_labels(before: Seen, after: Seen, value: str) -> None:
    assert texts(before) == texts(after)
    assert set(labels(before)) <= {True, False}
    if value == "soft":
        assert {round(one * 3) for one in labels(after)} >= {1, 2}
    elif value == "outcome":
        assert [row["labels"][-1] for row in rows(after)] == [row["right"] for row in rows(after)]
        assert all(set(row["labels"][:-1]) <= {None} for row in rows(after))
    else:
        assert after.summary["rollouts"] == 0


@moves("locate", "every_step", kinds=KIND)
def every_step(before: Seen, after: Seen) -> None:
    """A step after a wrong one may be right again, and right solutions are rolled out, too."""
    assert after.summary["rollouts"] > before.summary["rollouts"]
    assert all(known(row) == sorted(known(row), reverse=True) for row in rows(before))
    assert any(known(row) != sorted(known(row), reverse=True) for row in rows(after))


@moves("least_share", 0.5, kinds=KIND, both={"locate": "every_step", "rollouts": 4})
def least_share(before: Seen, after: Seen) -> None:
    """Half of the roll-outs or fewer is not enough."""
    assert texts(before) == texts(after)
    assert sum(labels(before)) > sum(labels(after))


@moves("num_generations", 3, kinds=KIND)
def num_generations(before: Seen, after: Seen) -> None:
    assert {row["id"].rpartition("/")[2] for row in rows(before)} == {"0", "1"}
    assert {row["id"].rpartition("/")[2] for row in rows(after)} == {"0", "1", "2"}


@moves("max_new_tokens", 4, kinds=KIND)
def max_new_tokens(before: Seen, after: Seen) -> None:
    assert after.summary["solution_tokens"] <= 4 * 24 < before.summary["solution_tokens"]


@moves("separator", "e", kinds=KIND)
def separator(before: Seen, after: Seen) -> None:
    assert not any(" " in step for row in rows(before) for step in row["completions"])
    assert not any("e" in step for row in rows(after) for step in row["completions"])


@moves("shuffled", True, kinds=KIND)
def shuffled(before: Seen, after: Seen) -> None:
    assert labels(before) != labels(after)
    assert sorted(labels(before)) == sorted(labels(after))


@moves("stop", ["1"], kinds=KIND)
def stop(before: Seen, after: Seen) -> None:
    assert any("1" in text for text in texts(before))
    assert not any("1" in text for text in texts(after))


@moves("max_rows", 3, kinds=KIND)
def max_rows(before: Seen, after: Seen) -> None:
    """Nothing but the speed."""
    assert rows(before) == rows(after)
