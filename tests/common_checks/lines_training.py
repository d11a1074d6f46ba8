"""Settings that every stage has which trains: how long, how fast, by what, what is saved and measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lines import ANSWERS, DOCUMENTS, INHERITS, PAIRS, ROLLOUTS, TRAINS, moves, refuses
from tiny_run import Seen, equal, first_loss, mean_over_learned

from trivium.kit.files import read_json
from trivium.kit.metrics import read_metrics
from trivium.learn.optimisers import group_of

STEADY = {"learning_rate.decay": "constant"}
ONE = {"steps": 1, "learning_rate": {"from": 0.01, "decay": "constant"}}
FOUR = {"steps": 4, "learning_rate.decay": "linear"}


def factors(seen: Seen) -> list[float]:
    """The schedule alone."""
    return [rate / seen.trainer.rates.matrices for rate in seen.rates]


# how long


@moves("steps", 3, kinds=TRAINS)
def steps(before: Seen, after: Seen) -> None:
    assert (len(before.log), len(after.log)) == (2, 3)


@moves("tokens", 384, kinds=DOCUMENTS, beside={"steps": None})
def tokens(before: Seen, after: Seen) -> None:
    assert len(after.log) > len(before.log)
    assert abs(after.log[-1]["tokens"] - 384) < 128


refuses("tokens", 384, "say how long to train in `steps` or `epochs`", kinds=PAIRS, beside={"steps": None})
refuses("tokens", 384, "say `steps` or `epochs`", kinds=ROLLOUTS, beside={"steps": None})


@moves("epochs", 2, kinds=DOCUMENTS, beside={"steps": None})
def epochs(before: Seen, after: Seen) -> None:
    read = [name for names in after.ids for name in names]
    rows = sum(map(len, after.trainer.batches.packed))  # type: ignore[attr-defined]
    assert len(after.log) == round(2 * rows / 2)
    assert min(read.count(name) for name in set(read)) >= 1
    assert max(read.count(name) for name in set(read)) == 2


@moves("epochs", 2, kinds=PAIRS, beside={"steps": None})
def epochs_of_pairs(before: Seen, after: Seen) -> None:
    learned_from = after.summary["data"]["pairs.jsonl"]["learned_from"]
    assert len(after.log) == round(2 * learned_from / 4)


@moves("epochs", 2, kinds=ROLLOUTS, beside={"steps": None})
def epochs_of_prompts(before: Seen, after: Seen) -> None:
    prompts = after.stage.prompts_per_step  # type: ignore[attr-defined]
    assert len(after.log) == math.ceil(2 * 12 / prompts)


@moves("batch", 192, kinds=DOCUMENTS)
def batch(before: Seen, after: Seen) -> None:
    assert (len(before.batches[0]), len(after.batches[0])) == (2, 3)


refuses("batch", 192, "a batch is counted in `pairs`", kinds=PAIRS)
refuses("batch", 192, "a batch is counted in `prompts_per_step`", kinds=ROLLOUTS)


@moves("micro_batch", 1, kinds=TRAINS)
def micro_batch(before: Seen, after: Seen) -> None:
    assert before.passes == len(before.trainers) * 2
    assert after.passes > before.passes
    assert after.losses == pytest.approx(before.losses, abs=1e-4)


# how fast


@moves("learning_rate.from", 0.004, kinds=TRAINS, both=STEADY)
def learning_rate(before: Seen, after: Seen) -> None:
    assert after.rates == pytest.approx([0.004] * 2)
    assert 0.004 not in before.rates


@moves("learning_rate.from", "parent", kinds=INHERITS, both={**STEADY, "optimiser": "muon"})
def learning_rate_of_the_parent(before: Seen, after: Seen) -> None:
    # The parent began with the dial's 0.03 and ended at half of that.
    assert after.rates == pytest.approx([0.015] * 2)


refuses("learning_rate.from", "parent", "a new model has no parent", kinds=["pretrain"])


@moves("learning_rate.warmup", 0.5, kinds=TRAINS, both=FOUR)
def warmup(before: Seen, after: Seen) -> None:
    assert factors(after) == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2])


@moves("learning_rate.warmup", "tokens=256", kinds=DOCUMENTS, both=FOUR)
def warmup_in_tokens(before: Seen, after: Seen) -> None:
    assert factors(after) == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2])


refuses("learning_rate.warmup", "tokens=256", "say the warm-up in steps", kinds=(*PAIRS, *ROLLOUTS))

DECAYS = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "sqrt": lambda done: (1 - done) ** 0.5,
    "1-sqrt": lambda done: 1 - done**0.5,
}


@moves("learning_rate.decay", "cosine", kinds=TRAINS, both=FOUR)
@moves("learning_rate.decay", *DECAYS, kinds=["pretrain"], both={"steps": 4})
def decay(before: Seen, after: Seen, value: str) -> None:
    assert factors(after) == pytest.approx([DECAYS[value](step / 4) for step in range(4)])


@moves("learning_rate.decay", "wsd", kinds=["pretrain"], both={"steps": 10})
def warmup_stable_decay(before: Seen, after: Seen) -> None:
    assert factors(after) == pytest.approx([1] * 9 + [0.5])


@moves(
    "learning_rate.decay", "inverse-sqrt", kinds=["pretrain"], both={"steps": 6, "learning_rate.warmup": 2}
)
def inverse_sqrt(before: Seen, after: Seen) -> None:
    assert factors(after) == pytest.approx([1 / 3, 2 / 3, 1, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5])


@moves("learning_rate.decay_share", 0.5, kinds=TRAINS, both=FOUR)
def decay_share(before: Seen, after: Seen) -> None:
    assert factors(after) == pytest.approx([1, 1, 1, 0.5])


@moves("learning_rate.to", 0.5, kinds=TRAINS, both=FOUR)
def what_is_left_of_the_rate(before: Seen, after: Seen) -> None:
    assert factors(after) == pytest.approx([1, 0.875, 0.75, 0.625])


# by what


@moves("optimiser", "muon", "adamw", kinds=TRAINS)
def optimiser(before: Seen, after: Seen, value: str) -> None:
    matrices = {
        name for name, one in after.begun.items() if (".query." in name or ".mlp." in name) and one.dim() > 1
    }
    assert matrices
    with_second = {name for name in matrices if f"second.{name}" in after.moments}
    assert with_second == (set() if value == "muon" else matrices)


@moves("optimiser_state", "keep", kinds=INHERITS, both={"optimiser": "muon"})
def optimiser_state(before: Seen, after: Seen) -> None:
    # The parent made four steps.
    assert int(before.moments["steps"]) == 2
    assert int(after.moments["steps"]) == 6
    assert before.changes["optimiser state"] == ("the parent's", "reset")
    assert after.changes["optimiser state"][1].startswith("the parent's")


refuses("optimiser_state", "keep", "has no parent", kinds=["pretrain"])


@moves("weight_decay", 0.5, kinds=TRAINS, both={**ONE, "weight_decay": 0.0})
def weight_decay(before: Seen, after: Seen) -> None:
    """Matrices shrink by rate times decay; embeddings and norms do not."""
    for name, start in after.begun.items():
        moved = after.trainer.named[name] - before.trainer.named[name]
        shrinks = start.dim() > 1 and "embedding" not in name
        rates = before.trainer.rates
        rate = rates.of(group_of(name, start)) * rates.factor_of(name)
        expected = -rate * 0.5 * start if shrinks else torch.zeros_like(start)
        torch.testing.assert_close(moved.detach(), expected, atol=1e-6, rtol=0, msg=name)


@moves("clip", 1e-3, kinds=TRAINS, both={**ONE, "clip": 1e6})
def clip(before: Seen, after: Seen) -> None:
    """The gradient has this length, so the first moments are shorter in the same proportion."""
    norm = before.column("grad_norm")[0]
    assert norm > 1e-2
    for name, moment in before.moments.items():
        if name.startswith("first."):
            torch.testing.assert_close(after.moments[name], moment * (1e-3 / norm), rtol=1e-3, atol=1e-9)


@moves("z_loss", 0.01, kinds=DOCUMENTS, both={"steps": 1})
def z_loss(before: Seen, after: Seen) -> None:
    squared = mean_over_learned(before, lambda logits: logits.logsumexp(-1).square())
    assert first_loss(after) - first_loss(before) == pytest.approx(0.01 * squared, rel=1e-3)


refuses("z_loss", 0.01, "`z_loss`", kinds=(*PAIRS, *ROLLOUTS))


@moves("ema", 0.75, kinds=TRAINS, both=ONE)
def ema(before: Seen, after: Seen) -> None:
    for name, start in after.begun.items():
        expected = 0.75 * start + 0.25 * before.trainer.named[name].detach()
        torch.testing.assert_close(after.trainer.named[name].detach(), expected, atol=1e-6, rtol=0)


@moves("precision", "bfloat16", kinds=TRAINS)
def precision(before: Seen, after: Seen) -> None:
    assert before.multiplied == set()
    assert after.multiplied == {torch.bfloat16}


@moves("precision", "float8", kinds=TRAINS, both={"precision": "bfloat16"})
def float8_precision(before: Seen, after: Seen) -> None:
    # What is left in bfloat16 are attention and head.
    assert after.multiplied == before.multiplied
    assert after.losses != before.losses
    assert after.losses[0] == pytest.approx(before.losses[0], rel=0.05, abs=0.05)


@moves("precision", "float32", kinds=["pretrain"])
def plain_precision(before: Seen, after: Seen) -> None:
    assert after.multiplied == set()


@moves("compile", "on", kinds=TRAINS, trained=False)
@moves("compile", "off", kinds=["pretrain"], both={"compile": "on"}, trained=False)
@moves("compile", "auto", kinds=["sft", *PAIRS, *ROLLOUTS], both={"compile": "on"}, trained=False)
def compile_(before: Seen, after: Seen, value: str) -> None:
    plain, compiled = (before, after) if value == "on" else (after, before)
    assert plain.trainer.forward is plain.trainer.model
    assert compiled.trainer.forward.run_layer is not compiled.trainer.model.run_layer


@moves("parallel.shard", 1, "all", kinds=TRAINS, trained=False)
def parallel(before: Seen, after: Seen, value: Any) -> None:
    """In a world of one nothing is divided; the tests of two processes show what is divided there."""
    assert before.trainer.settings.parallel.shard == "auto"
    assert after.trainer.settings.parallel.shard == value
    assert after.trainer.layout.model is after.trainer.model


@moves("parallel.tensor", 2, kinds=TRAINS, trained=False)
@moves("parallel.context", 2, kinds=TRAINS, trained=False)
@moves("parallel.expert", 2, kinds=TRAINS, trained=False)
@moves("parallel.pipeline", 2, kinds=TRAINS, trained=False)
def group_parallel(before: Seen, after: Seen) -> None:
    """In a world of one nothing is divided; the tests of two processes show what is divided there."""
    assert before.trainer.settings.parallel.described() == ""
    assert after.trainer.settings.parallel.described() in ("tensor 2", "context 2", "expert 2", "pipeline 2")
    assert after.trainer.layout.model is after.trainer.model


@moves("recompute", "full", kinds=TRAINS)
@moves("recompute", "selective", kinds=["pretrain"])
def recompute(before: Seen, after: Seen, value: str) -> None:
    assert before.trainer.model.recompute == "none"
    assert after.trainer.model.recompute == value
    assert after.losses == pytest.approx(before.losses, abs=1e-6)


@moves("deterministic", True, kinds=TRAINS)
def deterministic(before: Seen, after: Seen) -> None:
    assert (before.fixed, after.fixed) == ({False}, {True})


refuses(
    "max_bad_steps", 2, "2 steps in a row", kinds=TRAINS, fault="gradient", both={"steps": 6},
)  # fmt: skip


# what is saved


@moves("checkpoint.every_seconds", 1e-9, kinds=TRAINS)
def every_seconds(before: Seen, after: Seen) -> None:
    assert before.saved == []
    assert after.saved == [1] * len(after.trainers)


@moves("checkpoint.every_steps", 2, kinds=TRAINS, both={"steps": 5})
def every_steps(before: Seen, after: Seen) -> None:
    assert before.saved == []
    assert after.saved == [2, 4]


@moves("checkpoint.keep", 3, kinds=TRAINS, both={"steps": 5, "checkpoint.every_steps": 1})
def keep(before: Seen, after: Seen) -> None:
    assert [name[-1] for name in before.left] == ["3", "4"]
    assert [name[-1] for name in after.left] == ["2", "3", "4"]


@moves("checkpoint.at", ["step=1"], kinds=TRAINS)
def at(before: Seen, after: Seen) -> None:
    assert not any(name.startswith("kept/") for name in before.files)
    kept = after.place / "kept" / "step-000000001"
    assert read_json(kept / "kept.json")["at"] == [["step", 1]]
    assert (kept / "model" / "config.json").is_file()


# what is measured and shown

HELD_OUT = {"data": {"answers.jsonl": {"validation": 0.5}}}


def measured(seen: Seen) -> list[int]:
    return [row["step"] for row in seen.log if any(name.startswith("validation_loss") for name in row)]


@moves("validation.times", 2, kinds=["anneals", "midtrain", "pretrain"], both={"steps": 4})
@moves("validation.times", 2, kinds=(*ANSWERS, "distill"), both={"steps": 4, **HELD_OUT})
def validation_times(before: Seen, after: Seen) -> None:
    assert measured(before) == [1, 2, 3, 4]
    assert measured(after) == [2, 4]


@moves("validation.tokens", 1, kinds=["midtrain", "pretrain"])
@moves("validation.tokens", 1, kinds=(*ANSWERS, "distill"), both={**HELD_OUT, "context": 32})
def validation_tokens(before: Seen, after: Seen) -> None:
    """On fewer tokens the same model measures another loss."""
    assert after.losses == before.losses
    assert after.column("validation_loss") != before.column("validation_loss")


@moves("validation.tokens", 1, kinds=["anneals"])
def measured_tokens(before: Seen, after: Seen) -> None:
    (row,), (other,) = before.summary["candidates"], after.summary["candidates"]
    assert other["documents"] < row["documents"]


for name in ("times", "tokens"):
    refuses(f"validation.{name}", 2, "`validation`", kinds=(*PAIRS, *ROLLOUTS))

SAMPLES = tuple(kind for kind in TRAINS if kind != "reward")
SAMPLED = {"samples.prompts": ["the river"]}


def sampled(seen: Seen) -> list[dict[str, Any]]:
    return read_metrics(seen.place / "samples.jsonl")


@moves("samples.prompts", ["the river", "the bell"], kinds=SAMPLES)
def prompts(before: Seen, after: Seen) -> None:
    assert sampled(before) == []
    assert [row["prompt"] for row in sampled(after)] == ["the river", "the bell"] * 2


@moves("samples.times", 1, kinds=SAMPLES, both={**SAMPLED, "steps": 3})
def times(before: Seen, after: Seen) -> None:
    assert [row["step"] for row in sampled(before)] == [1, 2, 3]
    assert [row["step"] for row in sampled(after)] == [3]


@moves("samples.max_new_tokens", 2, kinds=SAMPLES, both=SAMPLED)
def max_new_tokens(before: Seen, after: Seen) -> None:
    for long, short in zip(sampled(before), sampled(after), strict=True):
        assert len(short["text"]) < len(long["text"])
        assert long["text"].startswith(short["text"].rstrip("\ufffd"))


for name, value in (("prompts", ["the river"]), ("times", 1), ("max_new_tokens", 1)):
    refuses(f"samples.{name}", value, "`samples`", kinds=["reward"])


@moves("seed", 2, kinds=TRAINS)
def seed(before: Seen, after: Seen) -> None:
    assert not equal(before.weights, after.weights)
    assert before.ids != after.ids
