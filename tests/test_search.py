"""Search over steps: methods against plain re-implementations, read-outs against formulas, a real engine."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from tuning import own, small_model

from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling
from trivium.generate.search.explore import Explorer, of_answers, of_texts, own_probability
from trivium.generate.search.methods import _most_promising
from trivium.generate.search.read_out import Solution, chosen
from trivium.generate.search.run import SearchResult, drive, search_all, walk
from trivium.generate.search.settings import search_settings
from trivium.generate.search.tree import Node, Tree
from trivium.grade.scorer import Score
from trivium.kit.errors import TriviumError

END = 0
LETTERS, DEPTH = "abc", 3


class Letters:
    """A tokenizer of letters."""

    stop_ids = frozenset({END})

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def in_turn(requests: list[Request]) -> list[list[Completion]]:
    """A model that writes one letter a line, `DEPTH` of them: the samples of a request are a, b, c, a, ..."""
    found = []
    for request in requests:
        begun = request.prompt[1:]
        done = begun.count(ord("\n"))
        whole = "\n" not in request.sampling.stop
        completions = []
        for sample in range(request.n):
            tokens: list[int] = []
            for step in range(done, DEPTH if whole else done + 1):
                letter = (
                    LETTERS[(sample + (request.sampling.seed if whole else 0) + step) % 3]
                    if whole
                    else (LETTERS[sample % 3])
                )
                tokens += [ord(letter), ord("\n") if step < DEPTH - 1 else END]
            completions.append(Completion("", tokens, [-0.5] * len(tokens), "stop", len(request.prompt)))
        found.append(completions)
    return found


def searched(score: Any, generate: Any = in_turn, **settings: Any) -> SearchResult:
    explorer = Explorer([1], search_settings(settings), of_texts(score), Letters(), 100)  # type: ignore[arg-type]
    (result,) = drive([walk(explorer, lambda text: text.replace("\n", ""))], generate)
    return result


def values(seed: int = 0) -> dict[str, float]:
    """A value for every partial text, at random."""
    random = np.random.default_rng(seed)
    names = [
        "".join(some) for size in range(1, DEPTH + 1) for some in itertools.product(LETTERS, repeat=size)
    ]
    return dict(zip(names, random.random(len(names)).tolist(), strict=True))


def scorer_of(known: dict[str, float]) -> Any:
    return lambda text: known.get(text.replace("\n", ""), 0.0)


def test_read_outs_are_their_formulas():
    random = np.random.default_rng(3)
    for _ in range(30):
        scores, answers = random.random(12), random.choice([*"xyz", None], 12)
        times = random.integers(1, 4, 12)
        nodes = [
            Node(place, None, [], "", score=score, drawn=int(times[place]))
            for place, score in enumerate(scores)
        ]
        drawn = [Solution(node, answer) for node, answer in zip(nodes, answers, strict=True)]
        assert chosen(drawn, "best").score == scores.max()
        counts: Counter[str] = Counter()
        for answer, several in zip(answers, times, strict=True):
            counts[answer] += several if answer is not None else 0
        del counts[None]
        majority = chosen(drawn, "majority")
        assert counts[majority.answer] == max(counts.values())
        assert majority.score == max(scores[answers == majority.answer])
        sums = {one: (times * scores)[answers == one].sum() for one in counts}
        assert chosen(drawn, "weighted").answer == max(sums, key=sums.get)
    assert chosen([], "best") is None
    assert chosen([Solution(nodes[0], None)], "majority").answer is None


def test_every_request_is_sent_its_own_completions():
    def search(first: int) -> Any:
        found = []
        for size in (2, 1):
            found.append((yield [Request([first + place], Sampling()) for place in range(size)]))
        return found

    results = drive([search(10), search(20)], lambda requests: [one.prompt for one in requests])
    assert results == [[[[10], [11]], [[10]]], [[[20], [21]], [[20]]]]


@pytest.mark.parametrize("seed", range(4))
def test_beam_is_a_beam_search(seed):
    known = values(seed)
    result = searched(scorer_of(known), method="beam", n=6, width=3)
    alive = list(LETTERS)
    leaves = []
    for _ in range(DEPTH - 1):
        kept = sorted(alive, key=lambda one: -known[one])[:2]
        grown = [one + letter for one in kept for letter in LETTERS]
        alive = [one for one in grown if len(one) < DEPTH]
        leaves += [one for one in grown if len(one) == DEPTH]
    assert sorted(one.answer for one in result.solutions) == sorted(leaves)
    assert result.answer == max(leaves, key=known.get)
    # Two tokens a step: three steps drawn twice each, then two nodes with three next steps, twice.
    assert result.tokens == 2 * 6 * DEPTH


@pytest.mark.parametrize("seed", range(4))
def test_dvts_searches_subtrees_that_do_not_compete(seed):
    known = values(seed)
    result = searched(scorer_of(known), method="dvts", n=6, width=3)
    leaves = []
    # Six first steps a b c a b c become three nodes drawn twice, dealt out to two subtrees.
    for some in (["a", "c"], ["b"]):
        while len(best := max(some, key=known.get)) < DEPTH:
            some = [best + letter for letter in LETTERS]
        leaves += some
    assert sorted(one.answer for one in result.solutions) == sorted(leaves)
    assert {one.node.subtree for one in result.solutions} == {0, 1}


@pytest.mark.parametrize("seed", range(4))
def test_mcts_finds_what_exhaustive_search_finds(seed):
    known = values(seed)
    # The best leaf lies below the step that looks worst.
    trap = min(LETTERS, key=known.get)
    known[trap + "bb"] = 1.5
    leaves = {name: value for name, value in known.items() if len(name) == DEPTH}
    best = max(leaves, key=leaves.get)
    result = searched(scorer_of(known), method="mcts", n=200, width=3)
    assert result.answer == best == trap + "bb"
    # When all is exhausted it stops: 13 inner nodes and 27 leaves were visited, each once.
    assert result.tree.root.visits == 40
    assert result.tokens == 2 * 13 * 3
    few = searched(scorer_of(known), method="mcts", n=6, width=3)
    assert few.tree.root.visits == 6
    assert few.solutions
    for node in result.tree.nodes[1:]:
        below = [one for one in result.tree.nodes[1:] if node in one.path]
        assert node.visits == len(below)
        assert node.total == pytest.approx(sum(one.score for one in below))


def test_puct_is_its_formula():
    tree = Tree()
    tree.root.visits = 9
    for number, (visits, total, score, drawn) in enumerate([(4, 2.0, 0, 1), (2, 1.4, 0, 2), (0, 0, 0.3, 3)]):
        node = tree.add(tree.root, [number], str(number), 0.0, score=score, drawn=drawn)
        node.visits, node.total = visits, total
    promise = [
        q + 0.7 * (drawn / 6) * math.sqrt(9) / (1 + visits)
        for q, drawn, visits in ((0.5, 1, 4), (0.7, 2, 2), (0.3, 3, 0))
    ]
    assert _most_promising(tree.root, 0.7).number - 1 == int(np.argmax(promise)) == 2
    assert _most_promising(tree.root, 0.0).number - 1 == 1


def test_backtracking_goes_back_where_no_next_step_passes():
    known = {"a": 0.9, "b": 0.9, "c": 0.1, **{"a" + one: 0.1 for one in LETTERS}}
    known |= {"ba": 0.2, "bb": 0.8, "bba": 0.9}
    random = iter("a abcb a bb a".replace(" ", ""))

    def one_letter(requests: list[Request]) -> list[list[Completion]]:
        (request,) = requests
        step = request.prompt.count(ord("\n"))
        tokens = [ord(next(random)), ord("\n") if step < DEPTH - 1 else END]
        return [[Completion("", tokens, [0.0, 0.0], "stop", 1)]]

    result = searched(scorer_of(known), one_letter, method="backtrack", n=20, width=3)
    assert result.answer == "bba"
    assert [node.text.replace("\n", "") for node in result.tree.nodes[1:]][:4] == ["a", "aa", "ab", "ac"]


def test_lookahead_scores_what_lies_beyond_and_forgets_it():
    known = {"a": 0.9, "b": 0.2, "c": 0.1, "ba": 1.0, "aa": 0.0, "ca": 0.0}
    asked: list[str] = []

    def score(text: str) -> float:
        asked.append(text.replace("\n", ""))
        return known.get(text.replace("\n", ""), 0.5)

    result = searched(score, method="beam", n=3, width=3, lookahead=1)
    assert asked[:3] == ["aa", "ba", "ca"]
    assert all(one.answer.startswith("b") for one in result.solutions)
    without = searched(scorer_of(known), method="beam", n=3, width=3)
    assert all(one.answer.startswith("a") for one in without.solutions)
    assert result.tokens > without.tokens
    assert len(result.tree.nodes) == len(without.tree.nodes)


@pytest.mark.parametrize("method", ["best_of", "beam", "dvts", "mcts", "backtrack"])
def test_no_round_begins_beyond_the_budget_and_an_answer_is_handed_over_all_the_same(method):
    result = searched(scorer_of(values()), method=method, n=120, width=3, token_budget=5)
    assert result.solutions
    assert len(result.answer) == DEPTH
    most = {"best_of": 18, "beam": 240 + 4, "dvts": 240 + 4}.get(method, 6 + 4)
    assert result.tokens <= most
    assert searched(scorer_of(values()), method=method, n=120, width=3).tokens > result.tokens


def test_settings_that_make_no_sense_are_refused_in_one_sentence():
    for wrong, words in (
        ({"method": "beam", "n": 6}, "no multiple of `width: 4`"),
        ({"method": "best"}, "best_of"),
        ({"method": "majority", "read_out": "best"}, "a read-out itself"),
        ({"lookahead": 1}, "beyond steps"),
        ({"m": 1}, "search.m"),
    ):
        with pytest.raises(TriviumError, match=words):
            search_settings(wrong)
    assert search_settings("mcts").method == "mcts"


def engine(**changes: Any) -> Engine:
    return Engine(small_model(own(), **changes), own(), max_rows=32)


def explorers(count: int, engine: Engine, **settings: Any) -> list[Explorer]:
    ids = [
        engine.tokenizer.encode(f"{number} " + "the river rises in the hills and " * 6)
        for number in range(count)
    ]
    return [Explorer(one, search_settings(settings), own_probability, engine.tokenizer, 40) for one in ids]


def test_a_fork_in_the_engine_computes_its_new_tokens_alone_and_changes_nothing():
    settings = {"method": "beam", "n": 8, "width": 4, "separator": " ", "token_budget": 300}
    once, again = engine(), engine()
    results = search_all(once, explorers(2, once, **settings))
    plain = drive([walk(one, lambda text: text) for one in explorers(2, again, **settings)], again.generate)
    for one, other in zip(results, plain, strict=True):
        assert [node.tokens for node in one.tree.nodes] == [node.tokens for node in other.tree.nodes]
        assert one.tree.as_json() == other.tree.as_json()
    assert once.counts["prompt_tokens"] < 0.7 * again.counts["prompt_tokens"]
    assert once.scheduler.prefixes.size == 0
    assert not once.scheduler.prefixes.sequences
    assert not once.rows_in_use
    # The log-probabilities are those that the same tokens have when they are scored.
    node = max(results[0].tree.nodes, key=lambda node: node.depth)
    ids = explorers(1, once, **settings)[0].prompt
    logits = once.score([ids], [node.all_tokens])[0].logprobs
    drawn = sum(one.logprob for one in node.path)
    assert math.isfinite(drawn)
    assert len(logits) == len(node.all_tokens)


def test_best_of_is_what_the_engine_draws_and_the_tree_is_json():
    one = engine()
    (result,) = search_all(one, explorers(1, one, method="best_of", n=5, temperature=1.0))
    ids = explorers(1, one)[0].prompt
    request = explorers(1, one, method="best_of", n=5, temperature=1.0)[0]._request(
        Tree().root, 5, whole=True
    )
    (drawn,) = one.generate([Request(ids, request.sampling, n=5)])
    assert sorted(tuple(node.tokens) for node in result.tree.nodes[1:]) == sorted(
        {tuple(completion.tokens) for completion in drawn}
    )
    best = max(drawn, key=lambda completion: sum(completion.logprobs) / len(completion.tokens))
    assert result.text == best.text
    content = json.loads(json.dumps(result.as_json()))
    assert content["solutions"] == len(content["tree"])
    assert sum(node["chosen"] for node in content["tree"]) == 1


def test_scorers_of_answers_are_asked_with_the_prompt():
    class Many:
        def many(self, prompts: Any, texts: Any) -> list[Score]:
            assert prompts == ["what?"] * len(texts)
            return [Score(len(text) / 10, "", "ok") if text else Score(None, "", "fault") for text in texts]

    nodes = [Node(1, None, [], "abc"), Node(2, None, [], "")]
    assert of_answers(Many(), "what?")(nodes) == [0.3, -math.inf]
    squashed = of_answers(Many(), "what?", logits=True)(nodes)
    assert squashed == [pytest.approx(1 / (1 + math.exp(-0.3))), -math.inf]
    assert Sampling(max_new_tokens=1)


def test_what_cannot_be_judged_is_preferred_to_nothing():
    def scored(*scores: float) -> list[Solution]:
        answers = "xyy"
        return [
            Solution(Node(place, None, [], "", score=score), answers[place])
            for place, score in enumerate(scores)
        ]

    assert chosen(scored(-math.inf, -2.0, -3.0), "best").answer == "y"
    assert chosen(scored(-math.inf, -2.0, -3.0), "weighted").answer == "y"
    assert chosen(scored(0.5, -math.inf, -math.inf), "majority").answer == "y"
    assert chosen(scored(*[-math.inf] * 3), "weighted").answer == "x"
    known = {**values(), "a": -math.inf, "ab": -math.inf}
    result = searched(scorer_of(known), method="mcts", n=60, width=3)
    assert all(math.isfinite(node.value) for node in result.tree.nodes if node.visits)
    assert "Infinity" not in json.dumps(result.as_json())


def on_and_on(said: str) -> Any:
    """A model that always writes the same text, each request up to the first stop text in what is new."""

    def generate(requests: list[Request]) -> list[list[Completion]]:
        found = []
        for request in requests:
            rest = said[len(request.prompt) - 1 :]
            ends = [rest.index(stop) + len(stop) for stop in request.sampling.stop if stop and stop in rest]
            tokens = [ord(one) for one in rest[: min(ends, default=len(rest))]]
            found.append([Completion("", tokens, [-0.5] * len(tokens), "stop", 1)] * request.n)
        return found

    return generate


@pytest.mark.parametrize("method", ["best_of", "beam", "dvts", "mcts", "backtrack"])
@pytest.mark.parametrize("more", ["\n\nQuestion: more?\nd\ne", "\nQuestion: more?\n\nd\ne"])
def test_a_stop_text_that_spans_two_steps_ends_the_solution(method, more):
    settings = search_settings({"method": method, "n": 4, "width": 2})
    stop = ("\n\n", "\nQuestion:")
    explorer = Explorer([1], settings, of_texts(lambda text: 1.0), Letters(), 100, stop)  # type: ignore[arg-type]
    (result,) = drive([walk(explorer, lambda text: text)], on_and_on("a\nb" + more))
    assert result.text == "a\nb"
    assert result.ended
