"""One number from a hidden state: rewards and values, and reward models as transformers stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, read_object, save_tensors, write_json
from trivium.model.attention import Documents
from trivium.model.branches import Branches
from trivium.model.families import FAMILIES, read_config
from trivium.model.folder import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredWeights,
    fill,
    refuse_other_shapes,
    refuse_unexpected,
    save_model,
)
from trivium.model.initialise import build
from trivium.model.lora import merged
from trivium.model.transformer import Transformer
from trivium.model.weights import stored_tensors

SCORE = "score.weight"
SCORE_FILE, BODY_FILE = "model-score.safetensors", "model-body.safetensors"
ARCHITECTURES = {
    "gpt2": "GPT2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
}
"""Where the name does not follow from that of the language model."""
WITHOUT = frozenset({"olmoe"})
"""Families for which transformers has no such class."""


class ScalarHead(nn.Module):
    """A single output over hidden states, and nothing about which of them it is asked for."""

    def __init__(self, width: int, *, seed: int | None = None) -> None:
        """Drawn from the seed at the scale 1 / sqrt(width + 1); zero without one."""
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            self.score.weight.zero_()
            if seed is not None:
                generator = torch.Generator().manual_seed(seed)
                self.score.weight.normal_(0.0, (width + 1) ** -0.5, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [...], in float32."""
        return self.score(hidden).squeeze(-1).float()


def scores_at_ends(
    model: Transformer,
    head: ScalarHead,
    tokens: Tensor,
    lengths: Sequence[int],
    back: Sequence[int] | None = None,
) -> Tensor:
    """The score of every document, read where its last token stands: [documents].

    The place counts, never the token: padding that has the id of a stop token moves nothing.
    """
    device = tokens.device
    context = Documents(lengths, device) if back is None else Branches(lengths, back, device)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    if model.config.experts is None:
        return head(model(tokens, context, wanted=ends))
    return head(model(tokens, context)[ends])


def without_language_head(model: Transformer) -> Transformer:
    """The same model without the matrix that predicts words, which no score needs."""
    model.head = None
    model.config = model.config.changed(tied=True)
    return model


def architecture_of(family: str) -> str:
    """The class with which transformers opens a reward model of this family."""
    if family in WITHOUT:
        raise TriviumError(
            f"transformers has no reward model of the family {family!r}; start from another family."
        )
    causal = FAMILIES[family].architecture
    return ARCHITECTURES.get(family, causal.replace("ForCausalLM", "ForSequenceClassification"))


def save_reward_model(
    model: Transformer, head: ScalarHead, folder: Path, *, pad_id: int, name: str = "reward"
) -> None:
    """Write a folder that transformers opens as a sequence classifier with one label, adapters merged."""
    assert model.head is None, "a reward model predicts no words"
    with merged(model):
        save_model(model, folder, generation={"pad_token_id": pad_id})
    tensor = head.score.weight.detach().to("cpu").contiguous()
    save_tensors(folder / SCORE_FILE, {SCORE: tensor})
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE)["weight_map"]
    else:
        # With a file of the usual name beside it nobody would look into the index.
        (folder / SINGLE_FILE).rename(folder / BODY_FILE)
        weight_map = {stored.name: BODY_FILE for stored in stored_tensors(model.config)}
    weight_map[SCORE] = SCORE_FILE
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content = read_json(folder / "config.json") | {
        "architectures": [architecture_of(model.config.family)],
        "id2label": {"0": name},
        "label2id": {name: 0},
        "pad_token_id": pad_id,
    }
    write_json(folder / "config.json", content)
    (folder / "generation_config.json").unlink()


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a model with a score in place of words."""
    return _gives_scores(read_object(folder / "config.json"))


def _gives_scores(content: Mapping[str, Any]) -> bool:
    names = content.get("architectures")
    listed = names if isinstance(names, list) else []
    return any(str(name).endswith("ForSequenceClassification") for name in listed)


def load_reward_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Transformer, ScalarHead]:
    """The model and the head of a sequence classifier with one label, whoever trained it."""
    path = folder / "config.json"
    if not path.is_file():
        raise TriviumError(f"{folder} has no config.json: name a folder in Hugging Face's form.")
    content = read_object(path)
    if not _gives_scores(content):
        raise TriviumError(
            f"{folder} is no reward model (its architecture is {content.get('architectures')}); name the "
            "result of a reward stage, or a sequence classifier with one label."
        )
    config = read_config({**content, "tie_word_embeddings": True}, str(path))
    weights = StoredWeights(folder)
    if SCORE not in weights.files or weights.header(SCORE)[1] != (1, config.width):
        raise TriviumError(f"{folder}: {SCORE} is not one row of {config.width}; it has to give one number.")
    layout = [(stored, weights.find(stored.name)) for stored in stored_tensors(config)]
    refuse_unexpected(config, weights, {name for _, name in layout} | {SCORE})
    refuse_other_shapes(config, weights, layout)
    kind = dtype or weights.tensor(layout[0][1]).dtype
    model = build(config, dtype=kind, device=str(device))
    head = ScalarHead(config.width)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for stored, name in layout:
            fill(stored, weights.tensor(name), parameters)
        head.score.weight.copy_(weights.tensor(SCORE))
    return model, head.to(device=device, dtype=kind)
