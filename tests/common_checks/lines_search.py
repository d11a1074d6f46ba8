"""Settings of a search for answers, as `evaluate` asks for it."""

from __future__ import annotations

from typing import Any

from lines import moves, refuses
from tiny_run import Seen

from trivium.evals.results import answers_path
from trivium.kit.metrics import read_metrics

KIND = ["evaluate"]
BEAM = {
    "on": [{"task": "own", "data": "problems.jsonl"}], "asking.max_new_tokens": 24,
    "asking.search": {"method": "beam", "n": 4, "width": 2, "separator": " "},
}  # fmt: skip
WHOLE = {**BEAM, "asking.search": {"method": "best_of", "n": 4, "temperature": 1.0}}
TREE = {**BEAM, "asking.search": {"method": "mcts", "n": 6, "width": 3, "separator": " "}}


def searches(seen: Seen) -> list[dict[str, Any]]:
    """What every search came to."""
    rows = read_metrics(answers_path(seen.folder / "report" / "results.json"))
    return [row["answers"][0]["search"] for row in rows]


def texts(seen: Seen) -> list[list[str]]:
    """The nodes of every tree."""
    return [[node["text"] for node in one["tree"]] for one in searches(seen)]


def drawn(seen: Seen) -> int:
    """All tokens that were drawn."""
    return sum(one["tokens"] for one in searches(seen))


@moves("asking.search.method", "majority", "weighted", "beam", "dvts", "mcts", "backtrack", kinds=KIND,
       both={**WHOLE, "asking.search": {"method": "best_of", "n": 4, "separator": " "}})  # fmt: skip
def method(before: Seen, after: Seen, value: str) -> None:
    assert {one["settings"]["method"] for one in searches(after)} == {value}
    if value in ("majority", "weighted"):
        assert texts(before) == texts(after)
    else:
        assert texts(before) != texts(after)


@moves("asking.search.n", 6, kinds=KIND, both=WHOLE)
def solutions(before: Seen, after: Seen) -> None:
    assert [sum(node["drawn"] for node in one["tree"]) for one in searches(before)] == [4, 4]
    assert [sum(node["drawn"] for node in one["tree"]) for one in searches(after)] == [6, 6]


@moves("asking.search.width", 4, kinds=KIND, both=BEAM)
def width(before: Seen, after: Seen) -> None:
    """Two nodes with two next steps each, or one with four."""
    for seen, most in ((before, 2), (after, 4)):
        for one in searches(seen):
            below = [node["parent"] for node in one["tree"] if node["parent"]]
            assert max((below.count(parent) for parent in below), default=0) <= most
    assert texts(before) != texts(after)


@moves("asking.search.scorer", "steps", kinds=KIND, both=BEAM)
def scorer(before: Seen, after: Seen) -> None:
    """A rule that finds no step in nonsense, in place of the model's own probability."""
    assert all(node["score"] > 0 for one in searches(before) for node in one["tree"])
    assert all(node["score"] == 0 for one in searches(after) for node in one["tree"])


@moves("asking.search.read_out", "majority", "weighted", "best", kinds=KIND, both=WHOLE)
def read_out(before: Seen, after: Seen, value: str) -> None:
    assert texts(before) == texts(after)
    for one in searches(after):
        best = max(one["tree"], key=lambda node: node["score"])
        assert (one["score"] == best["score"]) or value != "best"


refuses("asking.search.read_out", "best", "a read-out itself", kinds=KIND,
        both={**WHOLE, "asking.search": {"method": "majority"}})  # fmt: skip


@moves("asking.search.separator", "e", kinds=KIND, both=BEAM)
@moves("asking.search.temperature", 1.5, kinds=KIND, both=WHOLE)
@moves("asking.search.top_p", 0.3, kinds=KIND, both=WHOLE)
@moves("asking.search.seed", 2, kinds=KIND, both=WHOLE)
def other_draws(before: Seen, after: Seen) -> None:
    assert texts(before) != texts(after)


@moves("asking.search.max_new_tokens", 5, kinds=KIND, both=WHOLE)
def max_new_tokens(before: Seen, after: Seen) -> None:
    assert max(node["tokens"] for one in searches(after) for node in one["tree"]) == 5
    assert max(node["tokens"] for one in searches(before) for node in one["tree"]) > 5


@moves("asking.search.max_steps", 1, kinds=KIND, both=BEAM)
def max_steps(before: Seen, after: Seen) -> None:
    assert all(node["parent"] == 0 and node["finished"] for one in searches(after) for node in one["tree"])
    assert any(node["parent"] for one in searches(before) for node in one["tree"])


@moves("asking.search.token_budget", 8, kinds=KIND, both=TREE)
def token_budget(before: Seen, after: Seen) -> None:
    assert drawn(after) < drawn(before)


@moves("asking.search.lookahead", 1, kinds=KIND, both=BEAM)
def lookahead(before: Seen, after: Seen) -> None:
    """It costs tokens that are in no tree."""
    for one in searches(before):
        assert one["tokens"] == sum(node["tokens"] * node["drawn"] for node in one["tree"])
    assert any(
        one["tokens"] > sum(node["tokens"] * node["drawn"] for node in one["tree"]) for one in searches(after)
    )


GREEDY = {"method": "mcts", "n": 9, "width": 3, "separator": " ", "exploration": 0.0}


@moves("asking.search.exploration", 50, kinds=KIND, both={**TREE, "asking.search": GREEDY})
def exploration(before: Seen, after: Seen) -> None:
    """What was drawn often is visited, whatever its value."""
    visits = [
        [[node["visits"] for node in one["tree"]] for one in searches(seen)] for seen in (before, after)
    ]
    assert visits[0] != visits[1]


PATIENT = {"method": "backtrack", "n": 6, "separator": " ", "threshold": 0.99}


@moves("asking.search.threshold", 0.0, kinds=KIND, both={**BEAM, "asking.search": PATIENT})
def threshold(before: Seen, after: Seen) -> None:
    """Whatever is drawn passes, so nothing is drawn again."""
    for one in searches(after):
        parents = [node["parent"] for node in one["tree"]]
        assert len(parents) == len(set(parents))
    assert texts(before) != texts(after)
