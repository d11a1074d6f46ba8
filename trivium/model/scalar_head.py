"""One number from a hidden state: rewards and values, and reward models as transformers stores them.

A reward model is a sequence classifier with one label. A process reward model, which scores every step, is a
token classifier with the labels "wrong" and "right": of its two rows only the difference w, b counts, as
softmax((0, z)) = sigmoid(z) with z = w h + b.
"""

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
from trivium.model.transformer import Transformer, hidden_at
from trivium.model.weights import stored_tensors

SCORE, SCORE_BIAS = "score.weight", "score.bias"
SCORE_FILE, BODY_FILE = "model-score.safetensors", "model-body.safetensors"
ARCHITECTURES = {
    "gpt2": "GPT2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
}
"""Where the name does not follow from that of the language model."""
WITHOUT = frozenset({"granite", "olmoe"})
"""Families for which transformers has no such class."""
WITH_TOKEN_CLASSIFIER = frozenset(
    {"gemma2", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
)
"""Families for which transformers has a classifier of tokens, the form of a process reward model."""
TOKEN_CLASSIFIER_HEADS = {"gpt2": "classifier"}
"""What the head is called there, where not `score`."""
SEPARATOR = "step_separator"
"""The key of config.json that holds the text after every step."""


class ScalarHead(nn.Module):
    """A single output over hidden states, and nothing about which of them it is asked for."""

    def __init__(self, width: int, *, seed: int | None = None, bias: bool = False) -> None:
        """Drawn from the seed at the scale 1 / sqrt(width + 1); zero without one, as a bias always is."""
        super().__init__()
        self.score = nn.Linear(width, 1, bias=bias)
        with torch.no_grad():
            self.score.weight.zero_()
            if self.score.bias is not None:
                self.score.bias.zero_()
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
    return scores_at(model, head, tokens, context, torch.tensor(lengths, device=device).cumsum(0) - 1)


def scores_at(
    model: Transformer, head: ScalarHead, tokens: Tensor, context: Documents | Branches, places: Tensor
) -> Tensor:
    """The scores at these places of the packed tokens: [tokens], [places] -> [places]."""
    return head(hidden_at(model, tokens, context, places))


def without_language_head(model: Transformer) -> Transformer:
    """The same model without the matrix that predicts words, which no score needs."""
    model.head = None
    model.config = model.config.changed(tied=True)
    return model


def architecture_of(family: str, *, steps: bool = False) -> str:
    """The class with which transformers opens a reward model of this family, or one that scores steps."""
    if steps:
        if family not in WITH_TOKEN_CLASSIFIER:
            raise TriviumError(
                f"transformers has no classifier of tokens, which a process reward model is, of the family "
                f"{family!r}; start from one of {', '.join(sorted(WITH_TOKEN_CLASSIFIER))}."
            )
        return (
            FAMILIES[family]
            .architecture.replace("ForCausalLM", "ForTokenClassification")
            .replace("LMHeadModel", "ForTokenClassification")
        )
    if family in WITHOUT:
        raise TriviumError(
            f"transformers has no reward model of the family {family!r}; start from another family."
        )
    causal = FAMILIES[family].architecture
    return ARCHITECTURES.get(family, causal.replace("ForCausalLM", "ForSequenceClassification"))


def save_reward_model(
    model: Transformer,
    head: ScalarHead,
    folder: Path,
    *,
    pad_id: int,
    name: str = "reward",
    separator: str | None = None,
) -> None:
    """Write a folder that transformers opens as a sequence classifier with one label, adapters merged.

    With the `separator` of steps it is a token classifier that says of every step whether it is right.
    """
    assert model.head is None, "a reward model predicts no words"
    architecture = architecture_of(model.config.family, steps=separator is not None)
    with merged(model):
        save_model(model, folder, generation={"pad_token_id": pad_id})
    stored = _stored_head(head, model.config.family, steps=separator is not None)
    save_tensors(folder / SCORE_FILE, stored)
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE)["weight_map"]
    else:
        # Readers look into the index only where there is no file of the usual name.
        (folder / SINGLE_FILE).rename(folder / BODY_FILE)
        weight_map = {stored.name: BODY_FILE for stored in stored_tensors(model.config)}
    weight_map |= dict.fromkeys(stored, SCORE_FILE)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    labels = [name] if separator is None else ["wrong", "right"]
    content = read_json(folder / "config.json") | {
        "architectures": [architecture],
        "id2label": {str(place): label for place, label in enumerate(labels)},
        "label2id": {label: place for place, label in enumerate(labels)},
        "pad_token_id": pad_id,
    }
    if separator is not None:
        # A token classifier's own dropout, 0.1 unless it says otherwise, would change what the body learned.
        content |= {SEPARATOR: separator, "classifier_dropout": 0.0}
    write_json(folder / "config.json", content)
    (folder / "generation_config.json").unlink()


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a model with a score in place of words."""
    return _gives_scores(read_object(folder / "config.json"))


def _gives_scores(content: Mapping[str, Any]) -> bool:
    return _is_a(content, "ForSequenceClassification") or _is_a(content, "ForTokenClassification")


def _is_a(content: Mapping[str, Any], ending: str) -> bool:
    names = content.get("architectures")
    return any(str(name).endswith(ending) for name in (names if isinstance(names, list) else []))


def step_separator(folder: Path) -> str | None:
    """The text after every step that a process reward model scores; None for one of whole answers."""
    content = read_object(folder / "config.json")
    return str(content.get(SEPARATOR, "\n")) if _is_a(content, "ForTokenClassification") else None


def _stored_head(head: ScalarHead, family: str, *, steps: bool) -> dict[str, Tensor]:
    weight = head.score.weight.detach().to("cpu")
    if not steps:
        return {SCORE: weight.contiguous()}
    bias = torch.zeros(1) if head.score.bias is None else head.score.bias.detach().to("cpu")
    # Halves, so that their difference is exactly what was learned.
    halves = [torch.cat((-one / 2, one / 2)).contiguous() for one in (weight, bias)]
    return dict(zip(_head_names(family), halves, strict=True))


def _head_names(family: str) -> tuple[str, str]:
    called = TOKEN_CLASSIFIER_HEADS.get(family, "score")
    return f"{called}.weight", f"{called}.bias"


def _read_head(weights: StoredWeights, family: str, width: int, folder: Path, *, steps: bool) -> ScalarHead:
    """The head as it is stored: one row, or the difference of two."""
    rows, names = (2, _head_names(family)) if steps else (1, (SCORE, SCORE_BIAS))
    if names[0] not in weights.files or weights.header(names[0])[1] != (rows, width):
        wanted = "one row" if rows == 1 else "two rows"
        raise TriviumError(f"{folder}: {names[0]} is not {wanted} of {width}; it has to give one number.")
    head = ScalarHead(width, bias=steps)
    with torch.no_grad():
        weight = weights.tensor(names[0]).float()
        head.score.weight.copy_(weight[1:] - weight[:1] if steps else weight)
        if steps and names[1] in weights.files:
            bias = weights.tensor(names[1]).float()
            head.score.bias.copy_(bias[1:] - bias[:1])
    return head


def load_reward_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    steps: bool | None = None,
) -> tuple[Transformer, ScalarHead]:
    """The model and the head of a sequence classifier with one label, or of a token classifier with two.

    `steps` says which of the two it has to be, where that matters.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise TriviumError(f"{folder} has no config.json: name a folder in Hugging Face's form.")
    content = read_object(path)
    if not _gives_scores(content):
        raise TriviumError(
            f"{folder} is no reward model (its architecture is {content.get('architectures')}); name the "
            "result of a reward stage, a sequence classifier with one label or a token classifier with two."
        )
    config = read_config({**content, "tie_word_embeddings": True}, str(path))
    weights = StoredWeights(folder)
    scores_steps = _is_a(content, "ForTokenClassification")
    if steps not in (None, scores_steps):
        raise TriviumError(
            f"{folder} scores {'steps' if scores_steps else 'answers'}; to go on from it, "
            f"{'add' if scores_steps else 'leave out'} `steps: true`."
        )
    head = _read_head(weights, config.family, config.width, folder, steps=scores_steps)
    names = set(_head_names(config.family)) if scores_steps else {SCORE}
    layout = [(stored, weights.find(stored.name)) for stored in stored_tensors(config)]
    refuse_unexpected(config, weights, {name for _, name in layout} | names)
    refuse_other_shapes(config, weights, layout)
    kind = dtype or weights.tensor(layout[0][1]).dtype
    model = build(config, dtype=kind, device=str(device))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for stored, name in layout:
            fill(stored, weights.tensor(name), parameters)
    return model, head.to(device=device, dtype=kind)
