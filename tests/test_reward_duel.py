"""Who wins: two models on the same prompts, judges that know the truth, and the best of several answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tuning import own, save, small_model, write_rows

import trivium
from trivium.evals.pairwise import outcome

FILE = """
def length(prompts, completions, **columns):
    return [float(len(one)) for one in completions]

def known(prompts, completions, **columns):
    return [None if prompt.startswith("in") else float(len(one)) for prompt, one in zip(prompts, completions)]
"""


def test_the_win_rate_counts_ties_for_half_and_pairs_prompts():
    better = np.array([1.0, 1.0, 1.0, 0.0, 0.5, np.nan])
    worse = np.array([0.0, 0.0, 0.0, 1.0, 0.5, 1.0])
    found = outcome(better, worse)
    assert found["prompts"] == 5
    assert found["win_rate"]["value"] == pytest.approx(3.5 / 5)
    assert found["ties"] == pytest.approx(1 / 5)
    assert outcome(worse, better)["win_rate"]["value"] == pytest.approx(1.5 / 5)
    many = outcome(np.repeat(better[:5], 40), np.repeat(worse[:5], 40))
    assert many["win_rate"]["low"] > 0.5
    assert outcome(better, better)["win_rate"]["value"] == 0.5


def duel(tmp_path, settings: str) -> dict:
    save(tmp_path / "one", small_model(own()), own())
    save(tmp_path / "other", small_model(own(), seed=1), own())
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{word} the"} for word in ("in", "and", "or", "by")])
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "duel.yaml").write_text(
        "name: duel\nstages:\n  duel: {kind: compare, from: ./one, against: ./other, data: ./prompts.jsonl, "
        f"max_new_tokens: 8, {settings}}}\n"
    )
    run = trivium.run(tmp_path / "duel.yaml", runs=tmp_path / "runs")
    lines = (run["duel"].folder / "report" / "answers.jsonl").read_text().splitlines()
    return {**run["duel"].summary, "lines": [json.loads(line) for line in lines]}


def test_two_models_answer_and_are_judged_prompt_by_prompt(tmp_path):
    found = duel(tmp_path, "judge: ['mine.py:known']")
    assert found["prompts"] == 3
    assert found["kl"]["value"] > 0
    won = [
        1.0 if first > second else 0.5 if first == second else 0.0
        for first, second in ([len(one) for one in line["answers"]] for line in found["lines"][1:])
    ]
    assert found["win_rate"]["value"] == pytest.approx(np.mean(won))


def test_the_best_of_several_is_the_one_the_chooser_likes_most(tmp_path):
    found = duel(tmp_path, "judge: ['mine.py:length'], best_of: {n: 6, by: ['mine.py:length']}")
    curve = found["best_of"]
    assert [row["n"] for row in curve] == [1, 2, 4, 6]
    assert [row["proxy"] for row in curve] == sorted(row["proxy"] for row in curve)
    assert all(row["proxy"] == pytest.approx(row["truth"]) for row in curve)
    assert curve[-1]["kl"] == pytest.approx(math.log(6) - 5 / 6)
    assert curve[-1]["truth"] > curve[0]["truth"]
    assert found["score"]["value"] == pytest.approx(curve[-1]["truth"])
