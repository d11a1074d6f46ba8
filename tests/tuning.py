"""What tests of fine-tuning share: a small model with its tokenizer, rows encoded, and packed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tokens import own
from test_tokens_chat import with_template

import trivium
from trivium.data.conversations import Encoder
from trivium.data.encoding import Encoded, Refused
from trivium.data.rows import PackedSequence, row_of_documents
from trivium.data.sources import Document
from trivium.learn.trainer import Trainer
from trivium.model.config import ModelConfig
from trivium.model.folder import save_model
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "You count."},
    {"role": "user", "content": "the river rises"},
    {"role": "assistant", "content": "in the hills"},
    {"role": "user", "content": "and the miller?"},
    {"role": "assistant", "content": "counts 12 sacks"},
]


def tokenizer_of(name: str) -> Tokenizer:
    return own() if name == "own" else with_template(name)


def small_model(tokenizer: Tokenizer, seed: int = 0, **changes: Any) -> Transformer:
    """Two layers of width 32 in the shape of Qwen3, drawn from the seed."""
    settings: dict[str, Any] = {
        "family": "qwen3", "vocabulary": tokenizer.vocabulary_size, "width": 32, "layers": 2, "heads": 2,
        "key_value_heads": 2, "head_width": 16, "inner_width": 48, "context": 256, "query_key_norm": "head",
        "rope": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    model = Transformer(ModelConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model


def save(folder: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    """A Hugging Face folder."""
    generation = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    save_model(model, folder, generation=generation)
    tokenizer.save(folder)
    return folder


def encoded(
    rows: Sequence[dict], tokenizer: Tokenizer, *, context: int = 256, learned: str = "assistant"
) -> tuple[list[Encoded | Refused], Encoder]:
    encoder = Encoder(tokenizer, context, learned)
    documents = [Document(row.get("text"), row, f"rows.jsonl:{n}") for n, row in enumerate(rows, 1)]
    return list(encoder.encode(documents)), encoder


def one(row: dict, tokenizer: Tokenizer, **options: Any) -> Encoded | Refused:
    found, _ = encoded([row], tokenizer, **options)
    assert len(found) == 1, "the row was dropped"
    return found[0]


def learned_text(found: Encoded, tokenizer: Tokenizer) -> str:
    """What of an example is learned, control tokens included."""
    mask = np.ones(len(found.tokens), dtype=bool) if found.learned is None else found.learned
    return tokenizer.decode(found.tokens[mask].tolist(), skip_control=False)


def packed(found: Sequence[Encoded]) -> PackedSequence:
    return row_of_documents(
        [one.tokens for one in found],
        learned=[one.learned for one in found],
        ids=[one.document.id for one in found],
    )


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def cut_off(monkeypatch: pytest.MonkeyPatch, path: Path, runs: Path, *, at: int) -> None:
    """Run a recipe that dies before step `at`, its checkpoints written."""
    step = Trainer._one_step

    def dying(self: Trainer) -> dict[str, Any]:
        if self.step == at:
            self.checkpoints.finish()
            raise RuntimeError("the lights went out")
        return step(self)

    monkeypatch.setattr(Trainer, "_one_step", dying)
    with pytest.raises(RuntimeError, match="lights"):
        trivium.run(path, runs=runs)
    monkeypatch.undo()
