"""LLaVA's folders (Liu et al. 2023), as transformers reads and writes them.

A CLIP or SigLIP tower, a projector of two matrices, and a language model, in whose prompts the tokens of a
picture stand where a placeholder does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.model.modalities.foreign import activation_of, fill_vision, vision_config
from trivium.model.modalities.projector import ProjectorConfig
from trivium.model.modalities.towers import Modalities, ModalitiesConfig, PictureConfig
from trivium.tokens.forms import LLAVA, llava_forms, processor_of

if TYPE_CHECKING:
    from trivium.model.folder import StoredWeights

TEXT, TOWER, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
# What transformers takes where an older file's `text_config` says nothing.
_LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip


def is_llava(content: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a LLaVA model."""
    return content.get("model_type") == LLAVA


def text_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model in a LLaVA's config."""
    text = dict(content.get("text_config") or {})
    if text.get("model_type", "llama") == "llama":
        text = {**_LLAMA, **text}
    return text


def llava_config(folder: Path, content: Mapping[str, Any]) -> ModalitiesConfig:
    """What a LLaVA's folder says of its tower and projector."""
    path, layer = folder / "config.json", content.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise TriviumError(f"{path}: `vision_feature_layer` is a list; a tower of which one layer is read.")
    default = content.get("vision_feature_select_strategy", "default") == "default"
    vision = vision_config(
        content.get("vision_config") or {"model_type": "clip_vision_model"}, processor_of(folder), path,
        layer=layer, drop_first=default,
    )  # fmt: skip
    projector = ProjectorConfig(
        "mlp", vision.encoder.width, int(text_config(content)["hidden_size"]),
        bias=bool(content.get("multimodal_projector_bias", True)),
        activation=activation_of(content.get("projector_hidden_act", "gelu"), path),
    )  # fmt: skip
    return ModalitiesConfig(llava_forms(folder, content), PictureConfig(vision, projector, learns=False))


@torch.no_grad()
def load_llava(
    folder: Path, weights: StoredWeights, *, dtype: torch.dtype, device: str | torch.device
) -> Modalities:
    """The tower and the projector of a LLaVA's folder."""
    modalities = Modalities(llava_config(folder, read_object(folder / "config.json")))
    picture = modalities.picture
    assert picture is not None
    assert picture.projector.up is not None
    older = f"{TOWER}vision_model."
    prefix = older if any(name.startswith(older) for name in weights.files) else TOWER

    def find(name: str) -> torch.Tensor:
        if name not in weights.files:
            raise TriviumError(f"{folder}: the weights have no tensor {name!r}: the folder is incomplete.")
        return weights.tensor(name)

    fill_vision(picture.encoder, find, prefix)
    for ours, theirs in ((picture.projector.up, "linear_1"), (picture.projector.out, "linear_2")):
        ours.weight.copy_(find(f"{PROJECTOR}{theirs}.weight"))
        if ours.bias is not None:
            ours.bias.copy_(find(f"{PROJECTOR}{theirs}.bias"))
    modalities.hold_still()
    return modalities.to(device=device, dtype=dtype)
