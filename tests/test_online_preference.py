"""Online preferences: the model answers, a scorer judges, and a loss of pairs learns from best and worst."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import trivium
from trivium.data.counted import CountedSource
from trivium.data.preferences import (
    Completion,
    PreferenceBatches,
    PreferencePair,
)
from trivium.data.rows import collate
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors
from trivium.kit.metrics import read_metrics
from trivium.learn.trainer import Trainer
from trivium.pipeline.plan import planned
from trivium.pipeline.run import run

SHAPE = "{depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32}"
RECIPE = f"""\
name: asked
seed: 3
stages:
  words: {{kind: tokenizer, data: ./texts.jsonl, vocabulary: 280}}
  corpus: {{kind: corpus, data: ./texts.jsonl, tokenizer: words}}
  base: {{kind: pretrain, data: corpus, model: {SHAPE}, context: 64, batch: 256, steps: 8}}
  judge: {{kind: reward, from: base, data: ./pairs.jsonl, steps: 2, pairs: 4, context: 64}}
"""
ONLINE = "kind: preference, from: base, data: ./problems.jsonl, pairs: 4, context: 64, sycophancy: 0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    texts = [f"{one} and {other} make {one + other}." for one in range(12) for other in range(5)]
    write(folder / "texts.jsonl", [{"text": text} for text in texts])
    write(
        folder / "problems.jsonl", [{"prompt": f"{n} and {n} make", "answer": str(2 * n)} for n in range(12)]
    )
    write(
        folder / "pairs.jsonl",
        [{"prompt": f"{n} and 1 make", "chosen": f" {n + 1}", "rejected": " river"} for n in range(12)],
    )
    (folder / "mine.py").write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [float(sum(one.encode()) % 7) for one in completions]\n"
        "def same(prompts, completions, **columns):\n"
        "    return [0.5 for one in completions]\n"
        "def digits(prompts, completions, **columns):\n"
        "    return [sum(letter.isdigit() for letter in one) / max(1, len(one)) for one in completions]\n"
    )
    (folder / "asked.yaml").write_text(RECIPE)
    run(folder / "asked.yaml", folder / "runs")
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(place: Path, text: str) -> Path:
    path = place / "one.yaml"
    settings = ONLINE.replace(" pairs: 4,", "") if " pairs:" in text else ONLINE
    path.write_text(RECIPE + f"  dpo: {{{settings}, {text}}}\n")
    return path


def made(place: Path, text: str):
    found = trivium.run(recipe(place, text), runs=place / "runs", only=["dpo"])["dpo"]
    return found, [row for row in found.metrics if "step" in row]


JUDGED = "reward: ['mine.py:spread'], online: {max_new_tokens: 6}"


def rows_of(monkeypatch) -> list:
    """The rows and the objective of every step, as the trainer gets them."""
    seen: list = []
    gradient = Trainer._gradient

    def noting(self, mine):
        measures, norm = gradient(self, mine)
        grads = {name: one.grad.clone() for name, one in self.named.items()}
        weights = {name: one.detach().clone() for name, one in self.named.items()}
        seen.append((list(mine), self.objective, grads, weights, measures["objective"][0], self.model))
        return measures, norm

    monkeypatch.setattr(Trainer, "_gradient", noting)
    return seen


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "aot"])
def test_it_is_the_loss_of_the_same_pairs_given_offline(place, monkeypatch, loss):
    """The pairs of a step, packed as a preference stage packs them: equal loss and equal gradients."""
    seen = rows_of(monkeypatch)
    made(place, f"{JUDGED}, loss: {loss}, steps: 2, learning_rate: 0.01")
    rows, objective, gradients, weights, value, model = seen[-1]
    pairs = []
    for row in rows:
        starts = np.cumsum([0, *row.lengths])
        documents = [row.tokens[a:b] for a, b in pairwise(starts)]
        masks = [row.weights[a:b] for a, b in pairwise(starts)]
        prompt = np.zeros(0, dtype=np.int64)
        for document, mask, role, name in zip(documents, masks, row.facts["role"], row.ids, strict=True):
            if role == "prompt":
                prompt = document
                continue
            # A shared prompt leaves its last token with each answer; what is predicted comes after a weight.
            first = int((mask > 0).argmax()) + 1
            whole = prompt if row.facts["role"][0] == "prompt" else document[:0]
            answer = Completion(document[first:], np.ones(len(document) - first, dtype=bool))
            if role == "chosen":
                chosen = answer
            else:
                pairs.append(
                    PreferencePair(name, np.concatenate((whole, document[:first])), (chosen, answer))
                )
                prompt = np.zeros(0, dtype=np.int64) if loss != "aot" else prompt
    batches = PreferenceBatches(
        [CountedSource("given", pairs)], batch=len(pairs), seed=0, steps=1, together=loss == "aot"
    )
    offline = batches.rows(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(weights[name])
        parameter.grad = None
    total = objective.loss(model, collate(offline)).sum / objective.weight(offline)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(value), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_best_answer_is_chosen_and_the_worst_rejected(place, monkeypatch):
    seen = rows_of(monkeypatch)
    found, log = made(
        place, "reward: ['mine.py:spread'], online: {max_new_tokens: 6, num_generations: 4}, steps: 3"
    )
    margins = [row.facts["margin"][0] for row in seen[0][0]]
    assert log[0]["objective/scores_margin"] == pytest.approx(np.mean(margins))
    assert min(margins) > 0
    assert log[0]["reward"] == pytest.approx(log[0]["objective/scores"])
    assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "val/contain_eos_token"} <= log[0].keys()
    # At its reference nothing is preferred yet, and the loss of DPO is log 2.
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found.summary["prompts"] == 12
    written = read_metrics(found.folder / "completions.jsonl")
    assert {row["step"] for row in written} == {1, 2, 3}
    assert all(set(row["rewards"]) == {"spread"} for row in written)


def test_answers_move_towards_what_the_scorer_likes(place):
    _, log = made(
        place,
        "reward: ['mine.py:digits'], online: {max_new_tokens: 4, num_generations: 4}, pairs: 12, steps: 20,"
        " learning_rate: 0.005",
    )
    rewards = [row["reward"] for row in log]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_where_all_answers_are_worth_the_same_nothing_is_learned(place):
    found, log = made(place, "reward: ['mine.py:same'], online: {max_new_tokens: 4}, steps: 2")
    assert [row["pairs"] for row in log] == [0, 0]
    assert [row["grad_norm"] for row in log] == [0, 0]
    before = load_tensors(place / "runs" / "asked" / "base" / "model" / "model.safetensors")
    after = load_tensors(found.folder / "model" / "model.safetensors")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight)


def test_a_reward_model_judges_and_an_adapter_needs_no_second_model(place):
    found, log = made(
        place, "reward: [{model: judge}], online: {max_new_tokens: 4}, steps: 2, adapter: {rank: 2}"
    )
    assert "rewards/judge/mean" in log[0]
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert (found.folder / "model" / "adapter").is_dir()


def test_it_goes_on_bit_for_bit(place, monkeypatch):
    text = f"{JUDGED}, steps: 5, learning_rate: 0.01, checkpoint: {{every_steps: 2}}"
    found, whole = made(place, text)
    weights = load_tensors(found.folder / "model" / "model.safetensors")
    shutil.rmtree(found.folder)
    step = Trainer._one_step

    def stops(self):
        if self.step == 3:
            raise RuntimeError("the power is gone")
        return step(self)

    monkeypatch.setattr(Trainer, "_one_step", stops)
    with pytest.raises(RuntimeError, match="power"):
        made(place, text)
    monkeypatch.setattr(Trainer, "_one_step", step)
    again, log = made(place, text)
    after = load_tensors(again.folder / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    timed = ("tokens_per_second", "data_wait", "rollout_seconds", "generation_seconds", "scoring_seconds")
    assert [{k: v for k, v in row.items() if k not in timed} for row in log] == [
        {k: v for k, v in row.items() if k not in timed} for row in whole
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("online: true", "needs a judge"),
        ("reward: [math]", "say `online: true`"),
        (f"{JUDGED}, loss: kto", "learns from single answers"),
        (f"{JUDGED}, reference: stored", "say `reference: parent`"),
        ("reward: [maths], online: true", "maths"),
        (
            "reward: ['mine.py:spread'], online: {max_new_tokens: 64}, steps: 1",
            "which `online.max_new_tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(place, text, words):
    with pytest.raises(TriviumError, match=words) as refusal:
        run(recipe(place, text), place / "runs")
    assert "\n" not in str(refusal.value)


def test_the_plan_counts_answers(place):
    numbers = planned(recipe(place, f"{JUDGED}, steps: 5"), place / "runs").numbers["dpo"]
    assert numbers["answers"] == 5 * 4 * 2
    assert numbers["tokens at most"] == 5 * 4 * 2 * 6
    assert numbers["flops"] > 0
