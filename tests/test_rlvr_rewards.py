"""Rewards that can be tricked, beside the truth; and what is only looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tuning import own, save, small_model, write_rows

import trivium
from trivium.grade.scorer import scorer
from trivium.kit.metrics import read_metrics
from trivium.learn.objectives.advantages import combined
from trivium.stages.parts.rollout_metrics import rollout_metrics
from trivium.stages.parts.rollout_worker import Rollout, RolloutGroup

SCORERS = """
def anywhere(completions, answer, **columns):
    # The loophole: the right number need only stand somewhere in the answer.
    return [float(gold in text) for text, gold in zip(completions, answer)]

def exactly(completions, answer, **columns):
    return [float(text.strip() == gold) for text, gold in zip(completions, answer)]
"""


@pytest.mark.slow
def test_a_planted_loophole_is_exploited_and_the_held_out_reward_shows_it(tmp_path):
    """The model learns to name many numbers: the reward soars, the truth stays where it was."""
    save(tmp_path / "base", small_model(own()), own())
    (tmp_path / "mine.py").write_text(SCORERS)
    rows = [{"prompt": f"the miller counts {n}", "answer": str(n % 10)} for n in range(12, 44)]
    write_rows(tmp_path / "problems.jsonl", rows)
    (tmp_path / "rl.yaml").write_text(
        "name: rl\nstages:\n  rl: {kind: rlvr, from: ./base, data: ./problems.jsonl, "
        "reward: ['mine.py:anywhere'], truth: 'mine.py:exactly', steps: 40, prompts: 8, group: 16, "
        "max_new_tokens: 16, learning_rate: 0.02}\n"
    )
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    summary = run["rl"].summary
    reward, truth = summary["reward"], summary["held_out_reward"]
    # Six seeds went from 0.03 to between 0.40 and 0.50; half of the smallest gain is asked for.
    assert reward[0] < 0.2
    assert reward[1] > reward[0] + 0.18
    assert truth[1] < 0.1
    rows = [row for row in run["rl"].metrics if "step" in row]
    assert rows[-1]["pass@1"] == pytest.approx(rows[-1]["held_out_reward"])
    assert rows[-1]["rewards/anywhere/mean"] == pytest.approx(rows[-1]["reward"])


def test_what_weighs_nothing_is_only_looked_at():
    rewards = np.array([[1.0, 0.0], [math.nan, 1.0]])
    total = combined(rewards, [1.0, 0.0])
    assert total[0] == 1.0
    assert math.isnan(total[1]), "an answer that only the truth could judge has no reward"


def test_pass_rates_go_by_the_truth():
    answers = [Rollout([1], [0.0], [True], False, "") for _ in range(4)]
    group = RolloutGroup(
        0, answers, scores=[[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]], rewards=[1.0, 1.0, 1.0, 0.0]
    )
    tricked = rollout_metrics([group], ["loose", "strict"], 1.0, held_out_scorer=1)
    assert (tricked["reward"], tricked["held_out_reward"], tricked["pass@1"], tricked["pass@4"]) == (
        0.75,
        0.25,
        0.25,
        1.0,
    )
    assert rollout_metrics([group], ["loose", "strict"], 1.0)["pass@1"] == 0.75


@pytest.mark.parametrize(
    ("said", "wanted", "status"),
    [
        (" the river", 1.0, "ok"),
        ("the river rises", 1.0, "ok"),
        ("the miller", 0.5, "wrong"),
        ("a river", 0.0, "wrong"),
        ("<think>perhaps the sea?</think> the river", 1.0, "ok"),
        ("<think>the river", 0.0, "unparsed"),
        ("", 0.0, "wrong"),
    ],
)
def test_next_token_reasoning_is_rewarded_word_by_word(said, wanted, status):
    score = scorer("continuation")(said, continuation="the river")
    assert (score.value, score.status) == (wanted, status)


def test_texts_are_cut_into_problems_and_nothing_of_the_answer_is_shown(tmp_path):
    """Reinforcement straight from a base model on plain texts."""
    save(tmp_path / "base", small_model(own()), own())
    words = [f"word{n}" for n in range(30)]
    texts = [{"text": " ".join(words[:size])} for size in (30, 25, 10, 5)]
    write_rows(tmp_path / "texts.jsonl", texts)
    (tmp_path / "rl.yaml").write_text(
        "name: rl\nstages:\n  rl: {kind: rlvr, from: ./base, data: ./texts.jsonl, next_words: 2, "
        "reward: [continuation], steps: 2, prompts: 3, group: 2, max_new_tokens: 8}\n"
    )
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    assert run["rl"].summary["problems"] == 3, "the text of five words is left out"
    for row in read_metrics(run["rl"].folder / "completions.jsonl"):
        shown = row["prompt"].split()
        assert shown == words[: len(shown)]
        assert 8 <= len(shown) <= 28
