"""Labels of steps: Monte-Carlo estimates against what is known, binary search, and what they cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import pytest
from tuning import own, save, small_model, write_rows

import trivium
from trivium.data.steps import step_ends
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import combine
from trivium.kit.errors import TriviumError
from trivium.stages.label_steps import LabelSteps
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.step_labels import confusion
from trivium.stages.parts.step_rollouts import (
    Solution,
    StepRollouts,
    values_of_every_step,
    values_to_first_error,
    worked_steps,
)

WORKED = ["3 + 4 = 7", "7 * 2 = 14", "14 - 1 = 13", "13 + 2 = 15"]


@dataclass
class Solver:
    """An engine whose model works on rightly from right steps, `luck` of n times from wrong ones."""

    luck: int = 0
    asked: list[str] = field(default_factory=list)
    tokenizer = own()
    window = 4096

    def generate(self, requests: list[Request]) -> list[list[Completion]]:
        found = []
        for request in requests:
            text = self.tokenizer.decode(request.prompt).split("?")[1]
            self.asked.append(text)
            done = text.splitlines()
            right = done == WORKED[: len(done)]
            ends = [15 if right or place < self.luck else 99 for place in range(request.n)]
            found.append(
                [Completion(f"so\n#### {end}", [1] * 5, [], "stop", len(request.prompt)) for end in ends]
            )
        return found


def rollouts(solver: Solver, count: int = 4) -> StepRollouts:
    sampling = Sampling(max_new_tokens=200)
    return StepRollouts(solver, combine(["math"]), sampling, seed=0, rollouts=count)  # type: ignore[arg-type]


def solution(lines: list[str], right: bool) -> Solution:
    prompt = Prompt(own().encode("what?"), "what?", {"answer": "15"}, "one")
    text = "\n".join(lines)
    ends = step_ends(text)
    return Solution(prompt, text, [step for step, _ in ends], [end for _, end in ends], right)


WRONG = ["3 + 4 = 7", "7 * 2 = 14", "14 - 1 = 12", "12 + 2 = 14", "#### 14"]


def test_soft_labels_are_shares_and_binary_search_finds_the_same_first_error_for_less():
    right, wrong = solution([*WORKED, "#### 15"], True), solution(WRONG, False)
    every, some = Solver(luck=1), Solver()
    assert values_of_every_step(rollouts(every), [right, wrong]) == [[1] * 5, [1, 1, 0.25, 0.25, 0]]
    found = rollouts(some)
    assert values_to_first_error(found, [right, wrong]) == [[1] * 5, [1, 1, 0, 0, 0]]
    # The right solution costs nothing, and the wrong one log2(5) prefixes: after 2, 3 of 5 steps.
    assert len(some.asked) == 2
    assert found.cost == {"solution_tokens": 0, "rollouts": 8, "tokens": 40, "unknown_prefixes": 0}
    # A quarter of the roll-outs is luck where more are asked for.
    lucky = rollouts(Solver(luck=1))
    assert values_to_first_error(lucky, [wrong]) == [[1, 1, 1, 1, 0]]
    careful = replace(rollouts(Solver(luck=1)), least_share=0.25)
    assert values_to_first_error(careful, [wrong]) == [[1, 1, 0, 0, 0]]
    # What both share is rolled out once.
    assert len(every.asked) == len(set(every.asked)) == 6


@pytest.mark.parametrize("first", range(5))
def test_binary_search_agrees_with_every_first_error(first):
    lines = [line if place < first else f"{place} + 1 = 99" for place, line in enumerate(WORKED)]
    wrong = solution([*lines, "#### 99"], False)
    (found,) = values_to_first_error(rollouts(Solver()), [wrong])
    assert found == [1.0] * min(first, 4) + [0.0] * (5 - min(first, 4))


class Silent:
    """A grader that can judge nothing that goes on from `where`."""

    def __init__(self, where: str) -> None:
        self.where, self.math = where, combine(["math"])

    def __call__(self, prompts: list, completions: list, **columns: list) -> list[float | None]:
        scores = self.math(prompts, completions, **columns)
        return [
            None if text.startswith(self.where) else score
            for text, score in zip(completions, scores, strict=True)
        ]


def test_a_step_about_which_nothing_is_known_has_no_label():
    wrong = solution(WRONG, False)
    unknown = rollouts(Solver())
    unknown.grader = Silent("\n".join(WRONG[:3]))  # type: ignore[assignment]
    (found,) = values_of_every_step(unknown, [wrong])
    assert found == pytest.approx([1, 1, math.nan, math.nan, 0], nan_ok=True)
    assert unknown.cost["unknown_prefixes"] == 2
    # The search knows that two steps are right and the last one is not, and cannot divide what lies between.
    (found,) = values_to_first_error(unknown, [wrong])
    assert found[:2] == [1, 1]
    assert all(math.isnan(value) for value in found[2:4])
    assert found[4] == 0
    # No room for a roll-out says as little.
    full = rollouts(Solver())
    full.sampling = Sampling(max_new_tokens=1)
    (found,) = values_to_first_error(full, [wrong])
    assert [math.isnan(value) for value in found] == [True] * 4 + [False]
    stage = LabelSteps.model_construct(labels="soft")
    assert stage._labels([0.5, math.nan]) == [0.5, None]


def test_a_step_from_which_any_roll_out_is_right_is_right():
    values = [0.0, 0.125, 1.0, float("nan")]
    found = {}
    for labels in ("hard", "soft"):
        stage = LabelSteps(kind="label_steps", data={"./a.jsonl": {}}, labels=labels, **{"from": "m"})
        found[labels] = stage._labels(values)
    assert found == {"hard": [False, True, True, None], "soft": [0.0, 0.125, 1.0, None]}


def test_a_prefix_is_the_text_as_it_was_written():
    one = solution([" a", "", "b "], True)
    assert one.steps == [" a", "b "]
    assert [one.prefix(k)[1] for k in (1, 2)] == [" a\n", " a\n\nb "]
    assert worked_steps({"truth": {"steps": ["1 + 1 = 2"]}}) == ["1 + 1 = 2"]
    assert worked_steps({"answer": "2"}) is None


def test_given_solutions_are_labelled_exactly_and_train_a_process_reward_model(tmp_path):
    save(tmp_path / "base", small_model(own()), own())
    rows = [
        {"prompt": "what?", "answer": "15", "steps": WORKED, "completions": [*WORKED, "#### 15"]},
        {"prompt": "what now?", "answer": "15", "steps": WORKED, "completions": WRONG},
    ]
    write_rows(tmp_path / "problems.jsonl", rows)
    (tmp_path / "auto.yaml").write_text(
        "name: auto\nstages:\n"
        "  auto: {kind: label_steps, from: ./base, data: ./problems.jsonl, labels: exact, "
        "max_new_tokens: 100}\n"
        "  prm: {kind: reward, steps: true, from: ./base, data: auto, pairs: 2, epochs: 2}\n"
    )
    run = trivium.run(tmp_path / "auto.yaml", runs=tmp_path / "runs")
    lines = (run["auto"].folder / "data" / "train.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["labels"] == [True] * 5
    assert second["labels"] == [True, True, False, False, False]
    assert (first["right"], second["right"]) == (True, False)
    summary = run["auto"].summary
    assert summary["agreement"]["value"] == 1.0
    assert summary["confusion"] == {
        "labelled right, right": 7, "labelled right, wrong": 0, "labelled wrong, right": 0,
        "labelled wrong, wrong": 3,
    }  # fmt: skip
    rows = [{"labels": [True, None, False, True], "exact": [1.0, 0.0, 1.0, 0.0]}]
    rows.append({"labels": [True], "exact": None})
    assert [*confusion(rows).values()] == [1, 1, 1, 0]
    assert (summary["steps"], summary["rollouts"], summary["tokens"]) == (10, 0, 0)
    assert run["prm"].summary["data"]["auto"]["learned_from"] == 2
    (tmp_path / "bad.yaml").write_text(
        "name: bad\nstages:\n"
        "  auto: {kind: label_steps, from: ./base, data: ./problems.jsonl, scorer: maths}\n"
    )
    with pytest.raises(TriviumError, match="maths"):
        trivium.run(tmp_path / "bad.yaml", runs=tmp_path / "runs")
