"""Encoders of transformers' folders: the vision towers of CLIP and SigLIP, and Whisper's encoder."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.modalities.encoder import Activation, EncoderConfig
from trivium.model.modalities.sound import SoundConfig, SoundEncoder
from trivium.model.modalities.vision import VisionConfig, VisionEncoder

CLIP, SIGLIP, WHISPER = "clip_vision_model", "siglip_vision_model", "whisper"
_WITH_TEXT = {"clip": CLIP, "siglip": SIGLIP}
_ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
Find = Callable[[str], Tensor]
"""A stored tensor by its name."""


def activation_of(name: Any, path: Path) -> Activation:
    """The activation that a config names."""
    if name not in _ACTIVATIONS:
        raise TriviumError(f"{path}: an encoder with the activation {name!r} is not read.")
    return _ACTIVATIONS[name]


def vision_config(
    content: Mapping[str, Any], processor: Mapping[str, Any], path: Path,
    *, layer: int = -2, drop_first: bool | None = None,
) -> VisionConfig:  # fmt: skip
    """The layers of a vision tower up to `layer` (-1 is the last); their states are not normalised."""
    kind = content.get("model_type")
    kind = _WITH_TEXT.get(str(kind), kind)
    if "vision_config" in content:
        content = content["vision_config"]
    if kind not in (CLIP, SIGLIP):
        raise TriviumError(f"{path} is of a {kind!r}; the vision towers of CLIP and SigLIP are read.")
    layers = int(content.get("num_hidden_layers", 12)) + 1 + layer
    if layer >= 0 or layers < 1:
        raise TriviumError(f"{path}: `layer` counts from the end, -1 to -{layers - layer - 1}, not {layer}.")
    clip = kind == CLIP
    side, patch = int(content.get("image_size", 224)), int(content.get("patch_size", 32 if clip else 16))
    mean, deviation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    mean, deviation = (mean, deviation) if clip else ((0.5,) * 3, (0.5,) * 3)
    default_activation = "quick_gelu" if clip else "gelu_pytorch_tanh"
    return VisionConfig(
        encoder=EncoderConfig(
            width=int(content.get("hidden_size", 768)), layers=layers,
            heads=int(content.get("num_attention_heads", 12)),
            inner_width=int(content.get("intermediate_size", 3072)),
            activation=activation_of(content.get("hidden_act", default_activation), path),
            epsilon=float(content.get("layer_norm_eps", 1e-5 if clip else 1e-6)),
            norm_before=clip, norm_after=False,
        ),
        side=side, patch=patch, patch_bias=not clip, with_class=clip,
        drop_first=clip if drop_first is None else drop_first,
        mean=tuple(processor.get("image_mean", mean)), deviation=tuple(processor.get("image_std", deviation)),
    )  # fmt: skip


def layer_names(config: EncoderConfig, ours: str, theirs: str, whisper: bool) -> Iterator[tuple[str, str]]:
    """Our names of an encoder's layers beside the stored ones."""
    attention, inner = (
        ("self_attn_layer_norm", "final_layer_norm") if whisper else ("layer_norm1", "layer_norm2")
    )
    prefix = "" if whisper else "mlp."
    names = {
        "attention_norm": attention, "mlp_norm": inner, "query": "self_attn.q_proj",
        "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.out_proj",
        "up": f"{prefix}fc1", "down": f"{prefix}fc2",
    }  # fmt: skip
    for layer in range(config.layers):
        for mine, stored in names.items():
            yield f"{ours}layers.{layer}.{mine}.weight", f"{theirs}layers.{layer}.{stored}.weight"
            if mine != "key" or config.key_bias:
                yield f"{ours}layers.{layer}.{mine}.bias", f"{theirs}layers.{layer}.{stored}.bias"


def vision_names(config: VisionConfig, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Our names of a vision encoder's numbers beside the stored ones, but for the weights of patches."""
    yield f"{ours}position_embedding", f"{theirs}embeddings.position_embedding.weight"
    if config.patch_bias:
        yield f"{ours}patches.bias", f"{theirs}embeddings.patch_embedding.bias"
    if config.with_class:
        yield f"{ours}class_embedding", f"{theirs}embeddings.class_embedding"
    if config.encoder.norm_before:
        for leaf in ("weight", "bias"):
            yield f"{ours}encoder.norm_before.{leaf}", f"{theirs}pre_layrnorm.{leaf}"
    yield from layer_names(config.encoder, f"{ours}encoder.", f"{theirs}encoder.", whisper=False)


@torch.no_grad()
def fill_vision(encoder: VisionEncoder, find: Find, prefix: str) -> None:
    """Fill a vision encoder from stored tensors whose names begin with `prefix`."""
    parameters = dict(encoder.named_parameters())
    encoder.patches.weight.copy_(find(f"{prefix}embeddings.patch_embedding.weight").flatten(1))
    for ours, theirs in vision_names(encoder.config, "", prefix):
        parameters[ours].copy_(find(theirs))


def sound_config(content: Mapping[str, Any], path: Path) -> SoundConfig:
    """Whisper's encoder."""
    if content.get("model_type") != WHISPER:
        raise TriviumError(f"{path} is of a {content.get('model_type')!r}; Whisper's encoder is read.")
    return SoundConfig(
        EncoderConfig(
            width=int(content["d_model"]), layers=int(content["encoder_layers"]),
            heads=int(content["encoder_attention_heads"]), inner_width=int(content["encoder_ffn_dim"]),
            activation=activation_of(content.get("activation_function", "gelu"), path), epsilon=1e-5,
            key_bias=False, norm_after=True,
        ),
        mels=int(content.get("num_mel_bins", 80)), frames=2 * int(content.get("max_source_positions", 1500)),
    )  # fmt: skip


@torch.no_grad()
def fill_sound(encoder: SoundEncoder, find: Find, prefix: str) -> None:
    """Fill a sound encoder from Whisper's stored tensors."""
    parameters = dict(encoder.named_parameters())
    pairs = [
        (f"{ours}.{one}", f"{prefix}{theirs}.{one}")
        for ours, theirs in (("first", "conv1"), ("second", "conv2"), ("encoder.norm_after", "layer_norm"))
        for one in ("weight", "bias")
    ]
    pairs += layer_names(encoder.config.encoder, "encoder.", prefix, whisper=True)
    for ours, theirs in pairs:
        parameters[ours].copy_(find(theirs))
