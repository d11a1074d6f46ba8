"""Parity with TRL's RewardTrainer on identical weights and pairs: tokens, loss, gradient, measures."""

from __future__ import annotations

import os

import pytest
import torch
from tuning import CHAT, own, small_model

from trivium.data.counted import CountedSource
from trivium.data.preferences import PreferenceBatches, PreferenceData
from trivium.data.rows import collate
from trivium.data.sources import Document
from trivium.learn.objectives.reward import BradleyTerry
from trivium.model.folder import stored_form
from trivium.model.scalar_head import ScalarHead, save_reward_model, without_language_head
from trivium.model.weights import stored_tensors

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

ASKED = CHAT[:4]
ROWS = {
    "texts": [
        {"prompt": "the river", "chosen": " rises in the hills", "rejected": " counts"},
        {"prompt": "12 or 345", "chosen": " sacks", "rejected": " in the hills; the river and the miller"},
    ],
    "conversations": [
        {"prompt": ASKED, "chosen": CHAT[4:], "rejected": [{"role": "assistant", "content": "no"}]},
        {
            "prompt": [{"role": "user", "content": "12 or 345?"}],
            "chosen": [{"role": "assistant", "content": "345"}],
            "rejected": [{"role": "assistant", "content": "12 sacks in the hills and the river"}],
        },
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_tokens_loss_and_gradient_are_those_of_trl(tmp_path, form, margins, centring):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = own()
    rows = [{**row, "margin": 0.3 + place} if margins else row for place, row in enumerate(ROWS[form])]
    model = without_language_head(small_model(tokenizer))
    head = ScalarHead(model.config.width, seed=1)
    save_reward_model(model, head, tmp_path, pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path)
    arguments = RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(rows), use_cpu=True, bf16=False,
        report_to=[], gradient_checkpointing=False, center_rewards_coefficient=centring or None,
        max_length=256,
    )  # fmt: skip
    theirs = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path),
    )
    batch = theirs.data_collator([theirs.train_dataset[place] for place in range(len(rows))])
    assert ("margin" in batch) == margins
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, batch)
    loss.backward()

    documents = [Document(None, row, f"rows.jsonl:{n}") for n, row in enumerate(rows, 1)]
    pairs = list(PreferenceData(tokenizer, 256).read(documents))
    batches = PreferenceBatches([CountedSource("rows", pairs)], batch=len(rows), seed=0, steps=1)
    objective = BradleyTerry(head, centring)
    mine = [batches.row([(0, place)]) for place in range(len(rows))]
    ids = [batch["input_ids"][place][batch["attention_mask"][place] > 0].tolist() for place in range(4)]
    for place, one in enumerate(pairs):
        for side in (0, 1):
            assert [*one.prompt, *one.completions[side].tokens] == ids[place + side * len(rows)]
    found = objective.loss(model, collate(mine))
    (found.sum / objective.weight(mine)).backward()
    torch.testing.assert_close(found.sum / len(rows), loss, atol=1e-5, rtol=1e-5)
    named = dict(theirs.model.named_parameters())
    torch.testing.assert_close(head.score.weight.grad, named["score.weight"].grad, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for stored in stored_tensors(model.config):
        torch.testing.assert_close(
            stored_form(stored, gradients), named[stored.name].grad, atol=1e-5, rtol=1e-5
        )
    logged = {name: values[0] for name, values in theirs._metrics["train"].items()}
    for name in ("accuracy", "margin", "mean_reward"):
        total, weight = found.metrics[name]
        assert float(total) / float(weight) == pytest.approx(logged[name], abs=1e-5)
