"""Settings of distillation: whose probabilities are learned, how, and on whose words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lines import moves, refuses
from tiny_run import Seen, first_loss, loss_elsewhere, mean_over_learned

from trivium.data.rows import collate
from trivium.kit.metrics import read_metrics
from trivium.learn.objectives.distillation import LOGPROBS, TOKENS, Distillation
from trivium.model.attention import Documents
from trivium.model.folder import load_model

ONLY = ["distill"]


def objective(seen: Seen) -> Any:
    return seen.trainer.objective


def teacher_logits(seen: Seen) -> torch.Tensor:
    """What the model in the setting `teacher` says of the first batch: [tokens, vocabulary]."""
    model = load_model(seen.inputs[seen.stage.teacher], dtype=torch.float32)  # type: ignore[attr-defined]
    batch = collate(seen.batches[0])
    with torch.no_grad():
        return model.logits(model(batch.tokens, Documents(batch.lengths)))


def by_formula(seen: Seen, temperature: float = 1.0) -> float:
    """The forward KL of the first batch, where training began."""
    taught = (teacher_logits(seen) / temperature).softmax(-1)

    def apart(logits: torch.Tensor) -> torch.Tensor:
        return (taught * (taught.log() - (logits / temperature).log_softmax(-1))).sum(-1)

    return mean_over_learned(seen, apart)


@moves("teacher", "base", kinds=ONLY)
def teacher(before: Seen, after: Seen) -> None:
    """The student is its own teacher, and there is nothing to learn."""
    assert first_loss(before) == pytest.approx(by_formula(before), rel=1e-4)
    assert first_loss(after) == pytest.approx(0, abs=1e-5)


@moves("loss", "reverse_kl", "js", "mse_hidden", kinds=ONLY)
@moves("loss", "forward_kl", kinds=ONLY, both={"loss": "js"})
def loss(before: Seen, after: Seen, value: str) -> None:
    assert value in after.log[0]
    assert value not in before.log[0]
    assert first_loss(after) != pytest.approx(first_loss(before), rel=1e-3)


@moves("js_weight", 0.9, kinds=ONLY, both={"loss": "js"})
def js_weight(before: Seen, after: Seen) -> None:
    assert objective(after).numbers == replace(objective(before).numbers, js_weight=0.9)
    assert first_loss(after) != pytest.approx(first_loss(before), rel=1e-3)


refuses("js_weight", 0.9, "`js_weight` belongs to `loss: js`", kinds=ONLY)


@moves("temperature", 2.0, kinds=ONLY)
def temperature(before: Seen, after: Seen) -> None:
    assert first_loss(after) == pytest.approx(by_formula(before, 2.0), rel=1e-4)


refuses("temperature", 2.0, "`temperature` divides logits", kinds=ONLY, both={"loss": "mse_hidden"})
refuses("z_loss", 0.1, "`z_loss` keeps logits small", kinds=ONLY, both={"loss": "mse_hidden"})


@moves("label_weight", 0.25, kinds=ONLY)
def label_weight(before: Seen, after: Seen) -> None:
    labels = loss_elsewhere(before, objective(before), noise=0.0, measure="cross_entropy")
    assert first_loss(after) == pytest.approx(0.75 * first_loss(before) + 0.25 * labels, rel=1e-4)


@moves("label_weight", 1, kinds=ONLY)
def labels_alone(before: Seen, after: Seen) -> None:
    assert objective(after).teacher is None
    labels = loss_elsewhere(before, objective(before), noise=0.0, measure="cross_entropy")
    assert first_loss(after) == pytest.approx(labels, rel=1e-4)


@moves("top_k", 4, kinds=ONLY)
def top_k(before: Seen, after: Seen) -> None:
    """Stored before the training, and thrown away behind it."""
    assert before.batches[0][0].columns == {}
    columns = after.batches[0][0].columns
    assert (columns[TOKENS].shape[1], columns[LOGPROBS].shape[1]) == (4, 5)
    assert objective(after).teacher is None
    assert "the 4 likeliest tokens hold" in after.said
    assert not any(name.startswith("teacher/") for name in after.files)
    assert 0 < first_loss(after) < first_loss(before)


refuses("top_k", 4, "`top_k` is about the teacher's probabilities", kinds=ONLY, both={"loss": "mse_hidden"})
refuses("top_k", 4, "the teacher is not asked", kinds=ONLY, both={"label_weight": 1})
refuses("top_k", 4, "not known before", kinds=ONLY, both={"on_policy": True})
refuses("top_k", 272, "is no part of a vocabulary", kinds=ONLY)


@moves("shuffle_teacher", True, kinds=ONLY)
def shuffle_teacher(before: Seen, after: Seen) -> None:
    """The same teacher, and a student that is far from it."""
    assert objective(after).permutation is not None
    alike = Distillation(objective(after).teacher, objective(after).numbers)
    assert loss_elsewhere(after, alike, noise=0.0) == pytest.approx(first_loss(before), rel=1e-4)
    assert first_loss(after) > first_loss(before)


TURNS = {"data": "turns.jsonl", "teacher": "chatty"}


def learned_tokens(seen: Seen) -> float:
    return sum(float(row.weights.sum()) for rows in seen.batches for row in rows)


@moves("learned", "last", kinds=ONLY, both=TURNS)
def last_turn(before: Seen, after: Seen) -> None:
    assert 0 < learned_tokens(after) < learned_tokens(before)


@moves("learned", "all", kinds=ONLY, both=TURNS)
def everything(before: Seen, after: Seen) -> None:
    predicted = sum(int((row.targets >= 0).sum()) for rows in after.batches for row in rows)
    assert learned_tokens(before) < learned_tokens(after) == predicted


@moves("learned", "assistant", kinds=ONLY, both={**TURNS, "learned": "all"})
def every_answer(before: Seen, after: Seen) -> None:
    assert 0 < learned_tokens(after) < learned_tokens(before)


# on the student's own words

OWN = {"on_policy": {"max_new_tokens": 6}, "steps": 4}


def written(seen: Seen) -> list[dict[str, Any]]:
    return read_metrics(seen.folder / "completions.jsonl")


@moves("on_policy.share", 0.5, kinds=ONLY, both=OWN)
def share(before: Seen, after: Seen) -> None:
    """Of every two steps the student writes the answers of one."""
    assert before.column("on_policy") == [1, 1, 1, 1]
    assert after.column("on_policy") == [0, 1, 0, 1]
    assert {row["step"] for row in written(after)} == {2, 4}


@moves("on_policy.max_new_tokens", 3, kinds=ONLY, both=OWN)
def longest(before: Seen, after: Seen) -> None:
    assert max(before.column("completions/mean_length")) > 3
    assert max(after.column("completions/mean_length")) <= 3


@moves("on_policy.temperature", 0.1, kinds=ONLY, both=OWN)
def likelier(before: Seen, after: Seen) -> None:
    """What is sampled is likelier, so the student is surer of it."""

    def nats(seen: Seen) -> float:
        return loss_elsewhere(seen, objective(seen), noise=0.0, measure="cross_entropy")

    assert nats(after) < nats(before)


@moves("on_policy.max_rows", 1, kinds=ONLY, both=OWN)
def one_at_a_time(before: Seen, after: Seen) -> None:
    """The same answers, as each has a seed of its own."""
    assert after.ids == before.ids
    assert [row["completion"] for row in written(after)][:2] == [
        row["completion"] for row in written(before)
    ][:2]
