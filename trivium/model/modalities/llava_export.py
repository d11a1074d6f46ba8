"""A model that sees through a tower of CLIP or SigLIP, written as a LLaVA that transformers opens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.kit.files import save_tensors, write_json
from trivium.model.families import write_config
from trivium.model.folder import SINGLE_FILE, stored_form
from trivium.model.modalities.foreign import CLIP, SIGLIP, vision_names
from trivium.model.modalities.llava import PROJECTOR, TEXT, TOWER
from trivium.model.modalities.vision import VisionConfig
from trivium.model.transformer import Transformer
from trivium.model.weights import stored_tensors
from trivium.tokens.forms import LLAVA

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def save_llava(model: Transformer, folder: Path, *, placeholder: int, generation: dict[str, Any]) -> None:
    """Write config, weights and the processor's settings; the token `placeholder` stands for a picture.

    The tower is written up to the layer that is read, so that `vision_feature_layer` is its last.
    """
    modalities = model.modalities
    tower = None if modalities is None else modalities.picture
    if modalities is None or tower is None or modalities.sound is not None:
        raise TriviumError("A LLaVA takes pictures and no sounds; this model does not.")
    vision, projector, form = tower.encoder.config, tower.projector, modalities.config.forms.picture
    assert form is not None
    if vision.encoder.norm_after or tower.join > 1 or projector.up is None or form.tiles > 1:
        raise TriviumError(
            "A LLaVA has a tower of CLIP or SigLIP, one token for each patch, a projector of two matrices "
            "and no tiles; this model differs: export it with --to hf."
        )
    folder.mkdir(parents=True, exist_ok=True)
    strategy = "default" if vision.drop_first else "full"
    text = write_config(model.config)
    content = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": LLAVA,
        "image_token_index": placeholder, "image_seq_length": vision.rows,
        "vision_feature_layer": -1, "vision_feature_select_strategy": strategy,
        "projector_hidden_act": _ACTIVATIONS[projector.config.activation],
        "multimodal_projector_bias": projector.config.bias, "tie_word_embeddings": model.config.tied,
        "dtype": str(model.dtype).removeprefix("torch."),
        "text_config": text, "vision_config": _vision_config(vision),
    }  # fmt: skip
    save_tensors(folder / SINGLE_FILE, dict(_tensors(model, vision)))
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in text}
    write_json(folder / "generation_config.json", ids | generation)
    kind = "CLIPImageProcessor" if vision.with_class else "SiglipImageProcessor"
    square = {"height": vision.side, "width": vision.side}
    crops = form.resize == "crop"
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "do_center_crop": crops, "crop_size": square, "resample": form.filter,
        "size": {"shortest_edge": vision.side} if crops else square,
        "image_mean": list(vision.mean), "image_std": list(vision.deviation),
    })  # fmt: skip
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "patch_size": vision.patch, "image_token": "<image>",
        "vision_feature_select_strategy": strategy, "num_additional_image_tokens": int(vision.with_class),
    })  # fmt: skip
    write_json(folder / "config.json", content)


def _vision_config(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": CLIP if vision.with_class else SIGLIP, "hidden_size": vision.encoder.width,
        "intermediate_size": vision.encoder.inner_width, "num_hidden_layers": vision.encoder.layers,
        "num_attention_heads": vision.encoder.heads, "image_size": vision.side, "patch_size": vision.patch,
        "hidden_act": _ACTIVATIONS[vision.encoder.activation], "layer_norm_eps": vision.encoder.epsilon,
        "projection_dim": vision.encoder.width, "vision_use_head": False,
    }  # fmt: skip


def _tensors(model: Transformer, vision: VisionConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name by which transformers finds it."""
    parameters = dict(model.named_parameters())
    for stored in stored_tensors(model.config):
        yield TEXT + stored.name, stored_form(stored, parameters)
    assert model.modalities is not None
    assert model.modalities.picture is not None
    tower = model.modalities.picture
    own = {name: one.detach().to("cpu").contiguous() for name, one in tower.named_parameters()}
    for ours, theirs in (("up", "linear_1"), ("out", "linear_2")):
        for leaf in ("weight", "bias"):
            if f"projector.{ours}.{leaf}" in own:
                yield f"{PROJECTOR}{theirs}.{leaf}", own[f"projector.{ours}.{leaf}"]
    patches = own["encoder.patches.weight"].unflatten(1, (3, vision.patch, vision.patch)).contiguous()
    yield f"{TOWER}embeddings.patch_embedding.weight", patches
    for leaf, value in (("weight", torch.ones), ("bias", torch.zeros)):
        # Never used: what is read is not normalised.
        yield f"{TOWER}post_layernorm.{leaf}", value(vision.encoder.width, dtype=model.dtype)
    for ours, theirs in vision_names(vision, "encoder.", TOWER):
        yield theirs, own[ours]
