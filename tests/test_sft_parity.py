"""Parity with TRL's SFTTrainer and transformers on identical weights and rows: tokens, loss, gradient."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tuning import CHAT, encoded, packed, save, small_model, tokenizer_of

from trivium.data.rows import collate
from trivium.learn.objectives.next_token import NextToken, noise_for
from trivium.model.folder import stored_form
from trivium.model.weights import stored_tensors

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

MORE = [
    {"role": "user", "content": "12 or 345?"},
    {"role": "assistant", "content": "345 sacks in the hills and the river"},
]
ROWS = {
    "text": [{"text": "the river rises in the hills"}, {"text": "the miller counts 12 or 345 sacks; l'été"}],
    "prompt-completion": [
        {"prompt": "the river", "completion": " rises in the hills"},
        {"prompt": "and the miller counts", "completion": " 12"},
        {"prompt": "12 or", "completion": " 345 sacks; the river rises and rises"},
    ],
    "messages": [{"messages": CHAT}, {"messages": MORE}],
    "conversational prompt-completion": [
        {"prompt": CHAT[:4], "completion": CHAT[4:]},
        {"prompt": MORE[:1], "completion": MORE[1:]},
    ],
    "tools": [
        {
            "messages": [
                MORE[0],
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "count", "arguments": {"what": "sacks"}}}
                    ],
                },
                {"role": "tool", "content": "345"},
                MORE[1],
            ],
            "tools": [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}],
        }
    ],
}


def trl_trainer(folder: Path, rows: list[dict], conversational: bool, **settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=len(rows), use_cpu=True, bf16=False,
        report_to=[], gradient_checkpointing=False, assistant_only_loss=conversational, max_length=256,
        **settings,
    )  # fmt: skip
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", ROWS)
def test_tokens_loss_and_gradient_are_those_of_trl(tmp_path, shape):
    tokenizer, rows = tokenizer_of("own"), ROWS[shape]
    model = small_model(tokenizer)
    folder = save(tmp_path / "model", model, tokenizer)
    trainer = trl_trainer(folder, rows, conversational="messages" in rows[0] or "conv" in shape)
    batch = next(iter(trainer.get_train_dataloader()))

    found, _ = encoded(rows, tokenizer)
    labels = [
        np.where(np.ones(len(one.tokens), bool) if one.learned is None else one.learned, one.tokens, -100)
        for one in found
    ]
    ours = sorted((one.tokens.tolist(), label.tolist()) for one, label in zip(found, labels, strict=True))
    theirs = sorted(
        (ids[kept].tolist(), label[kept].tolist())
        for ids, label, kept in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        )
    )
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert ours == theirs

    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    row = packed(found)
    objective = NextToken()
    loss = objective.loss(model, collate([row])).sum / objective.weight([row])
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    reference = dict(trainer.model.named_parameters())
    for stored in stored_tensors(model.config):
        torch.testing.assert_close(
            stored_form(stored, gradients), reference[stored.name].grad, atol=1e-5, rtol=1e-4
        )


def test_noise_is_neftunes(monkeypatch):
    """The same draw from the unit interval becomes the same noise as in transformers' hook, to 1e-5."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    tokenizer = tokenizer_of("own")
    model = small_model(tokenizer)
    found, _ = encoded([{"text": "the river rises in the hills"}, {"text": "12 or 345"}], tokenizer)
    batch = collate([packed(found)])
    units = torch.rand(len(batch.tokens), 32) * 2 - 1
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, low, high: self.copy_((units - -1) / 2 * (high - low) + low)
    )
    noise = noise_for(model, batch, 5.0)
    monkeypatch.undo()

    embedding = torch.nn.Embedding(tokenizer.vocabulary_size, 32)
    embedding.neftune_noise_alpha = 5.0
    embedding.train()
    start = 0
    for length in batch.lengths:
        zeros = torch.zeros(1, length, 32)
        part = units[start : start + length]
        monkeypatch.setattr(
            torch.Tensor, "uniform_", lambda self, low, high, part=part: self.copy_(part[None] * high)
        )
        expected = neftune_post_forward_hook(embedding, None, zeros)
        monkeypatch.undo()
        torch.testing.assert_close(noise[start : start + length], expected[0], atol=1e-5, rtol=0)
        start += length
    assert noise.abs().max() > 0


def test_noise_is_drawn_anew_for_every_pass_and_within_its_bounds():
    tokenizer = tokenizer_of("own")
    model = small_model(tokenizer)
    found, _ = encoded([{"text": "the river rises in the hills"}, {"text": "12 or 345"}], tokenizer)
    batch = collate([packed(found)])
    first = noise_for(model, batch, 10.0)
    second = noise_for(model, batch, 10.0)
    assert not torch.equal(first, second)
    start = 0
    for length in batch.lengths:
        bound = 10.0 / (length * 32) ** 0.5
        largest = first[start : start + length].abs().max().item()
        assert 0.9 * bound < largest <= bound * 1.0001
        start += length


def test_label_smoothing_is_torchs():
    tokenizer = tokenizer_of("own")
    model = small_model(tokenizer)
    found, _ = encoded(ROWS["prompt-completion"], tokenizer)
    row = packed(found)
    batch = collate([row])
    from trivium.model.attention import Documents

    logits = model.logits(model(batch.tokens, Documents(batch.lengths)))
    kept = batch.weights > 0
    expected = torch.nn.functional.cross_entropy(logits[kept], batch.targets[kept], label_smoothing=0.1)
    objective = NextToken(label_smoothing=0.1)
    loss = objective.loss(model, batch).sum / objective.weight([row])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    plain = NextToken().loss(model, batch).sum / objective.weight([row])
    assert abs(plain.item() - expected.item()) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"positions": "none"}])
def test_leaving_out_what_is_not_learned_changes_nothing(monkeypatch, changes):
    """The last layer computes only the learned places: same loss, metrics and gradient."""
    from trivium.learn.objectives import next_token

    tokenizer = tokenizer_of("own")
    row = packed(encoded(ROWS["messages"], tokenizer)[0])
    results = []
    for share in (0.75, 0.0):
        monkeypatch.setattr(next_token, "WORTH_LEAVING_OUT", share)
        model = small_model(tokenizer, **changes)
        loss = NextToken(sources=("a", "b")).loss(model, collate([row]))
        loss.sum.backward()
        metrics = {name: (float(total), float(weight)) for name, (total, weight) in loss.metrics.items()}
        results.append((loss.sum.item(), metrics, {n: p.grad for n, p in model.named_parameters()}))
    (few, few_metrics, few_gradient), (whole, whole_metrics, whole_gradient) = results
    assert 0 < (row.weights > 0).mean() < 0.75
    assert few == pytest.approx(whole, rel=1e-6)
    assert few_metrics.keys() == whole_metrics.keys()
    for name, pair in few_metrics.items():
        assert pair == pytest.approx(whole_metrics[name], rel=1e-5)
    for name, gradient in few_gradient.items():
        torch.testing.assert_close(gradient, whole_gradient[name], atol=1e-5, rtol=1e-5)


def test_a_pass_in_which_nothing_is_learned_is_a_loss_of_zero():
    tokenizer = tokenizer_of("own")
    row = packed(encoded(ROWS["messages"], tokenizer)[0])
    row.weights[:] = 0
    loss = NextToken().loss(small_model(tokenizer), collate([row]))
    loss.sum.backward()
    assert loss.sum.item() == 0
