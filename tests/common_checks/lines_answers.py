"""Settings of the stages that learn from answers: sft, preference, reward."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lines import ANSWERS, moves, refuses
from tiny_run import Seen, first_loss, loss_elsewhere, mean_over_learned

from trivium.data.rows import PackedSequence
from trivium.learn.objectives.preference import UNPAIRED
from trivium.learn.objectives.preference_losses import PAIR_LOSSES, WHOLE_BATCH

# sft


def learned(seen: Seen) -> float:
    return sum(float(row.weights.sum()) for rows in seen.batches for row in rows)


TURNS = {"data": "turns.jsonl"}


@moves("loss", "last", kinds=ANSWERS, both=TURNS)
def last_turn(before: Seen, after: Seen) -> None:
    """Of two answers one is learned."""
    assert 0 < learned(after) < learned(before)


@moves("loss", "all", kinds=ANSWERS, both=TURNS)
def everything(before: Seen, after: Seen) -> None:
    predicted = sum(int((row.targets >= 0).sum()) for rows in after.batches for row in rows)
    assert learned(before) < learned(after) == predicted


@moves("loss", "assistant", kinds=ANSWERS, both={**TURNS, "loss": "all"})
def every_answer(before: Seen, after: Seen) -> None:
    assert 0 < learned(after) < learned(before)


@moves("label_smoothing", 0.2, kinds=ANSWERS)
def label_smoothing(before: Seen, after: Seen) -> None:
    """A fifth of the loss is the mean over all tokens instead."""
    uniform = mean_over_learned(before, lambda logits: -logits.log_softmax(-1).mean(-1))
    expected = 0.8 * first_loss(before) + 0.2 * uniform
    assert first_loss(after) == pytest.approx(expected, rel=1e-4)


@moves("neftune", 10.0, kinds=ANSWERS)
def neftune(before: Seen, after: Seen) -> None:
    """Noise on the embeddings, drawn anew in every pass."""
    assert after.trainer.objective.noise == 10.0  # type: ignore[attr-defined]
    assert first_loss(before) == first_loss(before)
    assert len({first_loss(after) for _ in range(3)}) == 3


@moves("draft_heads", 2, kinds=["sft"])
def draft_heads(before: Seen, after: Seen) -> None:
    """Nothing of the model is trained, and of each head a matrix and a vector."""
    assert len(after.trainer.named) == 4
    assert all(name.startswith("extra.") for name in after.trainer.named)
    assert (after.folder / "model" / "draft_heads.safetensors").is_file()
    assert not (before.folder / "model" / "draft_heads.safetensors").is_file()


refuses("draft_heads", 2, "an `sft` stage", kinds=["multimodal"])


@moves("near_parent.weights", 2.0, kinds=ANSWERS, both={"steps": 1})
def near_parent_weights(before: Seen, after: Seen) -> None:
    """Half the strength times the squared distance, which is none at the start."""
    assert first_loss(after) == pytest.approx(first_loss(before), abs=1e-6)
    distance = sum(
        float((one.detach() - after.begun[name]).square().sum()) for name, one in after.trainer.named.items()
    )
    ended = first_loss(after, ended=True), loss_elsewhere(after, before.trainer.objective)
    assert ended[0] - ended[1] == pytest.approx(2.0 / 2 * distance, rel=1e-3)


TWO = {"data": {"answers.jsonl": {}, "more-answers.jsonl": {}}}


@moves("near_parent.kl", 0.5, kinds=ANSWERS, both={"steps": 1, "learning_rate.from": 0.05})
def near_parent_kl(before: Seen, after: Seen) -> None:
    assert first_loss(after) == pytest.approx(first_loss(before), abs=1e-5)
    ended = first_loss(after, ended=True), loss_elsewhere(after, before.trainer.objective)
    assert ended[0] - ended[1] > 1e-5


@moves("near_parent.on", ["answers.jsonl"], kinds=ANSWERS, both={
    **TWO, "near_parent.kl": 0.5, "learning_rate.from": 0.05})  # fmt: skip
def near_parent_on(before: Seen, after: Seen) -> None:
    """Of two sources alike one is held, so that about half of the pull is left."""
    plain = loss_elsewhere(before, unguarded(before))
    whole = first_loss(before, ended=True) - plain
    half = loss_elsewhere(before, after.trainer.objective) - plain
    assert 0 < half < 0.9 * whole


def unguarded(seen: Seen) -> Any:
    objective: Any = seen.trainer.objective
    return type(objective)(sources=objective.sources)


# preference

LOSSES = tuple(name for name in PAIR_LOSSES if name != "sigmoid")


@moves("loss", *LOSSES, *sorted(UNPAIRED), "sft", kinds=["preference"])
def loss(before: Seen, after: Seen, value: str) -> None:
    """The loss away from the reference is another than DPO's; the formulas have tests of their own."""
    objective: Any = after.trainer.objective
    assert value in objective.losses
    if value in WHOLE_BATCH:
        # Where answers have the same order as under the reference, sorting them changes nothing.
        assert (len(before.batches[0]), len(after.batches[0])) == (4, 1)
        return
    assert away(after) != pytest.approx(away(before), rel=1e-4)


def away(seen: Seen, measure: str | None = None) -> float:
    """The first step's loss, or a measure of it, of a model that is no longer its reference."""
    return loss_elsewhere(seen, seen.trainer.objective, noise=0.5, measure=measure)


@moves("loss", {"sigmoid": 1.0, "sft": 0.5}, kinds=["preference"])
def mixed_losses(before: Seen, after: Seen) -> None:
    """The likelihood of the chosen answers, per token of a mean pair, counts by half."""
    objective: Any = after.trainer.objective
    likelihood = loss_elsewhere(after, replace(objective, losses={"sft": 1.0}), noise=0.5)
    assert away(after) == pytest.approx(away(before) + 0.5 * likelihood, rel=1e-4)


@moves("beta", 0.5, kinds=["preference"])
def beta(before: Seen, after: Seen) -> None:
    """Rewards are beta times the log-ratio."""
    low, high = (away(seen, "rewards/margins") for seen in (before, after))
    assert high == pytest.approx(5 * low, rel=1e-3)
    assert away(after) != pytest.approx(away(before), rel=1e-3)


@moves("beta", [0.1, 0.5], kinds=["preference"], both={"steps": 3})
def moving_beta(before: Seen, after: Seen) -> None:
    objective: Any = after.trainer.objective
    assert objective.betas == ((0.0, 0.1), (1.0, 0.5))


def differs(before: Seen, after: Seen) -> None:
    """The same answers of the same model cost something else."""
    assert away(after) != pytest.approx(away(before), rel=1e-5)


moves("label_smoothing", 0.2, kinds=["preference"])(differs)
moves("gamma", 1.0, kinds=["preference"], both={"loss": "simpo"})(differs)
moves("temperature", 0.5, kinds=["preference"], both={"loss": "discopop"})(differs)
moves("alpha", 0.9, kinds=["preference"], both={"loss": "alphapo"})(differs)
moves("ld_alpha", 0.3, kinds=["preference"])(differs)
moves("divergence", "forward_kl", "js_divergence", "alpha_divergence", kinds=["preference"])(differs)
moves("divergence", "reverse_kl", kinds=["preference"], both={"divergence": "forward_kl"})(differs)
for name in ("gamma", "temperature", "alpha", "bend", "desirable_weight"):
    refuses(name, 0.7, f"`{name}`", kinds=["preference"])
moves("bend", 0.8, kinds=["preference"], both={"divergence": "alpha_divergence"})(differs)
moves(
    "imitate", "everything", kinds=["preference"], both={"loss": ["sigmoid", "sft"], "share_prompts": False}
)(differs)
moves("imitate", "answer", kinds=["preference"], both={
    "loss": ["sigmoid", "sft"], "share_prompts": False, "imitate": "everything"})(differs)  # fmt: skip


@moves("desirable_weight", 2.0, kinds=["preference"], both={"loss": "kto"})
@moves("undesirable_weight", 2.0, kinds=["preference"], both={"loss": "kto"})
def weights_of_verdicts(before: Seen, after: Seen) -> None:
    """At the reference, each answer costs its weight times a half: all are one pair's two answers."""
    ratio = first_loss(after) / first_loss(before)
    assert ratio == pytest.approx(1.5, abs=0.3)


@moves("reference", "parent", "stored", kinds=["preference"], both={"reference": "none"})
def reference(before: Seen, after: Seen, value: str) -> None:
    """At its reference a model's DPO loss is log 2; without one it is not."""
    assert first_loss(after) == pytest.approx(math.log(2), abs=1e-5)
    assert first_loss(before) != pytest.approx(math.log(2), abs=1e-3)
    assert f"reference: {value}" in after.said


@moves("reference", "adapter off", kinds=["preference"], both={"adapter": {"rank": 2}})
def adapter_off(before: Seen, after: Seen) -> None:
    assert "reference: adapter off" in after.said
    assert after.losses == pytest.approx(before.losses, abs=1e-5)


@moves("reference", "none", "auto", kinds=["preference"], both={"reference": "parent"})
def no_reference(before: Seen, after: Seen, value: str) -> None:
    assert f"reference: {'stored' if value == 'auto' else value}" in after.said


@moves("pairs", 2, kinds=["preference", "reward"])
def pairs(before: Seen, after: Seen) -> None:
    assert (len(before.batches[0]), len(after.batches[0])) == (4, 2)


@moves("context", 24, kinds=["preference", "reward"])
def pairs_that_do_not_fit(before: Seen, after: Seen) -> None:
    few, all_of_them = (seen.summary["data"]["pairs.jsonl"]["dropped"] for seen in (after, before))
    assert few > all_of_them == 0


@moves("share_prompts", False, kinds=["preference", "reward"])
def share_prompts(before: Seen, after: Seen) -> None:
    """The same loss, of rows in which each answer has its prompt."""
    assert after.losses == pytest.approx(before.losses, abs=1e-5)
    assert sum(map(len, after.batches[0])) > sum(map(len, before.batches[0]))


@moves("sycophancy", 2, kinds=["preference", "ppo"])
def sycophancy(before: Seen, after: Seen) -> None:
    assert "sycophancy" not in before.summary
    assert after.summary["sycophancy"]


# reward


@moves("centring", 0.5, kinds=["reward"])
def centring(before: Seen, after: Seen) -> None:
    """The squared sum of both rewards, times this."""
    pulls = []
    for row in before.batches[0]:
        alone = replace_batch(before, [row])
        sides = [away(alone, measure=f"rewards/{side}") for side in ("chosen", "rejected")]
        pulls.append(sum(sides) ** 2)
    assert away(after) - away(before) == pytest.approx(0.5 * float(np.mean(pulls)), rel=1e-3)


def replace_batch(seen: Seen, rows: list[PackedSequence]) -> Seen:
    """The same run as if its first batch had been these rows."""
    return replace(seen, batches=[rows])


@moves("from", "judge", kinds=["reward"])
def from_a_reward_model(before: Seen, after: Seen) -> None:
    score = "extra.score.weight"
    assert not torch.equal(before.begun[score], after.begun[score])


@moves("test", "more-pairs.jsonl", kinds=["reward"])
def test_pairs(before: Seen, after: Seen) -> None:
    assert "test" not in before.summary
    assert after.summary["test"]["pairs"] == 20


# reward of steps


@moves("process", True, kinds=["reward"], beside={"data": "steps.jsonl"})
@moves("steps", True, kinds=["reward"], beside={"data": "steps.jsonl", "epochs": 0.4})
def process(before: Seen, after: Seen) -> None:
    """A label is learned at the end of every step, and the folder is a classifier of tokens."""
    assert (len(before.config["id2label"]), len(after.config["id2label"])) == (1, 2)
    row = after.batches[0][0]
    assert [int(one) for one in row.columns["label"][row.columns["step"] > 0]] in ([1, 0], [1, 1])


@moves("separator", " ;", kinds=["reward"], both={"data": "steps.jsonl", "process": True})
def separator(before: Seen, after: Seen) -> None:
    (one, *_), (other, *_) = before.batches[0], after.batches[0]
    assert set(other.tokens[other.columns["step"] > 0]) != set(one.tokens[one.columns["step"] > 0])
    assert (before.config["step_separator"], after.config["step_separator"]) == ("\n", " ;")


@moves("until_error", True, kinds=["reward"], both={"data": "errors.jsonl", "process": True})
def until_error(before: Seen, after: Seen) -> None:
    """Of two wrong steps the first one is learned."""
    (one, *_), (other, *_) = before.batches[0], after.batches[0]
    assert (one.columns["step"].sum(), other.columns["step"].sum()) == (2, 1)


refuses("until_error", True, "say `steps: true`", kinds=["reward"])
refuses("separator", " ;", "say `steps: true`", kinds=["reward"])
refuses("centring", 0.1, "belongs to pairs", kinds=["reward"], both={"data": "steps.jsonl", "process": True})
