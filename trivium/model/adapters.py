"""Adapters on disk, in the form of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_object, save_tensors, write_json
from trivium.model.lora import ONLY, AdaptedLinear, Shape, adaptable, adapted_layers, make_room, note
from trivium.model.transformer import Transformer
from trivium.model.weights import matrices, stored_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
GROWN = ("embedding.weight", "head.weight", "position_embedding.weight")
"""The tables that may have more rows than the base's."""
# Settings of PEFT under which an adapter computes what ours do.
INERT: dict[str, Any] = {
    "bias": "none", "lora_bias": False, "use_qalora": False, "alora_invocation_tokens": None,
    "layer_replication": None, "trainable_token_indices": None, "arrow_config": None,
    "target_parameters": None, "megatron_config": None,
}  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin under which PEFT takes a part out of the base's matrices whenever the adapter is opened."""
HEAD = "lm_head.weight"


def save_adapter(model: Transformer, folder: Path | str, *, base: str, name: str = ONLY) -> None:
    """Write one adapter so that PEFT lays it on the same base in transformers."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = adapted_layers(model)
    tensors: dict[str, Tensor] = {}
    ranks, alphas, normed, turned = {}, {}, False, False
    for stored in matrices(model.config):
        parts = [part.removesuffix(".weight") for part in stored.parts]
        found = [layers[part] if part in layers and name in layers[part].shapes else None for part in parts]
        if not any(found):
            continue
        down, up, magnitude, scale = _joined(model, parts, found, name)
        module = stored.name.removesuffix(".weight")
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up
        if magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude
        ranks[module], alphas[module] = len(down), scale * len(down)
        normed, turned = normed or magnitude is not None, turned or stored.turned
    assert ranks, f"no adapter {name}"
    kept, whole_modules = _whole(model)
    first = next(iter(ranks))
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "inference_mode": True, "r": ranks[first], "lora_alpha": alphas[first], "lora_dropout": 0.0,
            # Said in the scale of each layer instead: the product is the same under either name.
            "use_rslora": False, "use_dora": normed, "fan_in_fan_out": turned, "bias": "none",
            "target_modules": sorted(ranks), "modules_to_save": sorted(whole_modules) or None,
            "rank_pattern": {f"^{key}": rank for key, rank in ranks.items() if rank != ranks[first]},
            "alpha_pattern": {f"^{key}": alpha for key, alpha in alphas.items() if alpha != alphas[first]},
            "init_lora_weights": True,
        },
    )  # fmt: skip
    everything = {key: tensor.detach().cpu().contiguous() for key, tensor in {**tensors, **kept}.items()}
    save_tensors(folder / WEIGHTS, everything)


def _joined(
    model: Transformer, parts: list[str], found: list[AdaptedLinear | None], name: str
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """The adapter of one stored matrix: of several of our layers, where a family keeps them in one."""
    downs, ups, magnitudes = [], [], []
    scale = next(layer.shapes[name].scale for layer in found if layer is not None)
    normed = any(layer is not None and layer.shapes[name].normed for layer in found)
    for part, layer in zip(parts, found, strict=True):
        if layer is None:
            linear = model.get_submodule(part)
            assert isinstance(linear, nn.Linear)
            downs.append(linear.weight.new_zeros(0, linear.in_features))
            ups.append(linear.weight.new_zeros(linear.out_features, 0))
            magnitudes.append(torch.linalg.vector_norm(linear.weight, dim=1))
            continue
        down, up = layer.down[name].detach(), layer.up[name].detach() * (layer.shapes[name].scale / scale)
        if name in layer.taken:
            # On the untouched base a PiSSA adapter is what it is now, less what it began as.
            first, second = layer.taken[name]
            down, up = torch.cat((down, first)), torch.cat((up, -second), 1)
        downs.append(down)
        ups.append(up)
        magnitudes.append(layer.magnitude[name].detach() if normed else up.new_zeros(0))
    return torch.cat(downs), torch.block_diag(*ups), torch.cat(magnitudes) if normed else None, scale


def _whole(model: Transformer) -> tuple[dict[str, Tensor], set[str]]:
    """What is trained whole, under the names of the family's files."""
    parameters = dict(model.named_parameters())
    kept: dict[str, Tensor] = {}
    modules: set[str] = set()
    for stored in stored_tensors(model.config):
        if len(stored.parts) == 1 and parameters[stored.parts[0]].requires_grad:
            kept[PREFIX + stored.name] = parameters[stored.parts[0]]
            modules.add(stored.name.rsplit(".", 1)[0])
            if model.config.tied and stored.parts == ("embedding.weight",):
                # PEFT would leave the head as it was.
                kept[PREFIX + HEAD] = parameters["embedding.weight"].clone()
                modules.add(HEAD.removesuffix(".weight"))
    return kept, modules


def load_adapter(model: Transformer, folder: Path | str, *, name: str = ONLY, shared: bool = False) -> None:
    """Lay a folder's adapter on a model and let it act; what was trained whole replaces the model's own.

    A model that is `shared` with other adapters keeps its own: an adapter with anything else is refused.
    """
    folder = Path(folder)
    settings, tensors = _read(folder)
    by_module = {stored.name.removesuffix(".weight"): stored for stored in matrices(model.config)}
    wholes = {key: tensors.pop(key) for key in list(tensors) if ".lora_" not in key}
    if shared and wholes:
        raise TriviumError(
            f"{folder} replaces parts of its base, which others share: serve it as a model of its own, "
            f"NAME={folder}."
        )
    modules = sorted({key.split(".lora_")[0] for key in tensors})
    for module in modules:
        stored = by_module.get(module)
        if stored is None:
            raise TriviumError(f"{folder / WEIGHTS}: the model has no layer {module} for this adapter.")
        down, up = (tensors.get(f"{module}.lora_{side}.weight") for side in "AB")
        if down is None or up is None or down.dim() != 2 or up.dim() != 2 or not len(down):
            raise TriviumError(f"{folder / WEIGHTS}: {module} lacks one of its two matrices: fetch it again.")
        magnitude = tensors.get(f"{module}.lora_magnitude_vector")
        parts = [part.removesuffix(".weight") for part in stored.parts]
        _lay(model, folder, name, parts, down, up, magnitude, settings, module)
    note(model, name)
    if model.config.tied:
        _untie(model, folder, settings, wholes)
    _replace(model, folder, wholes)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise TriviumError(
                f"{folder} has no {needed}: name a folder that holds an adapter in PEFT's form."
            )
    settings = read_object(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise TriviumError(f"{folder}: adapters of type {settings.get('peft_type')} are not read; LORA is.")
    for key, inert in INERT.items():
        if settings.get(key, inert) not in (inert, [], {}):
            raise TriviumError(f"{folder / CONFIG}: {key} = {settings[key]!r} is not supported.")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise TriviumError(
            f"{folder / CONFIG}: init_lora_weights = {begun!r} changes the base as well: save the adapter "
            "again with save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    _refuse_odd_settings(settings, folder / CONFIG)
    tensors = load_tensors(folder / WEIGHTS)
    return settings, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _refuse_odd_settings(settings: Mapping[str, Any], where: Path) -> None:
    """Name a scale that is no number, and a pattern that could take for ever to compare."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TriviumError(f"{where}: alpha_pattern is no object of patterns and numbers: fetch it again.")
    for key, value in [("lora_alpha", settings.get("lora_alpha")), *patterns.items()]:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise TriviumError(f"{where}: the scale of {key} is {value!r}, no number: fetch it again.")
    for pattern in patterns:
        # A repeated group, or many stars, can be compared in more ways than there is time for.
        if (
            len(pattern) > 200
            or re.search(r"\)[*+?{]|\(\?", pattern)
            or len(re.findall("[*+{]", pattern)) > 3
        ):
            raise TriviumError(f"{where}: the pattern {pattern[:60]!r} is not simple enough to be read.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise TriviumError(f"{where}: the pattern {pattern[:60]!r} is none ({error}).") from None


def _lay(
    model: Transformer, folder: Path, name: str, parts: list[str], down: Tensor, up: Tensor,
    magnitude: Tensor | None, settings: Mapping[str, Any], module: str,
) -> None:  # fmt: skip
    """One stored matrix's adapter, split over the layers that we keep apart."""
    rank = len(down)
    alpha = _patterned(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"])
    # What a pattern says is the rank the scale is reckoned with; the tensors say what it really is.
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    known = adaptable(model)
    sizes = [known[part].out_features for part in parts]
    wanted = (sum(sizes), known[parts[0]].in_features)
    other = magnitude is not None and magnitude.numel() != wanted[0]
    if (len(up), down.shape[1]) != wanted or up.shape[1] != rank or other:
        shape = (len(up), down.shape[1])
        raise TriviumError(f"{folder}: {module}'s adapter is for {shape}, the model's layer is {wanted}.")
    magnitudes = [None] * len(parts) if magnitude is None else list(magnitude.flatten().split(sizes))
    shape_here = Shape(rank, scale, alpha, normed=magnitude is not None)
    rooms = make_room(model, parts)
    for part, piece, length in zip(parts, up.split(sizes), magnitudes, strict=True):
        layer = rooms[part]
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        length = None if length is None else length.to(**place)
        layer.add(name, shape_here, down.to(**place, copy=True), piece.to(**place, copy=True), length)


def _patterned(table: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that ends the module's name, or is it from its beginning."""
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@torch.no_grad()
def _untie(model: Transformer, folder: Path, settings: Mapping[str, Any], wholes: dict[str, Tensor]) -> None:
    """Give a tied model a head of its own where an adapter keeps one of the two tables, or two unequal."""
    [table] = [one.name for one in stored_tensors(model.config) if one.parts == ("embedding.weight",)]
    own = model.embedding.weight.detach()
    # Adapters that Trivium wrote before it kept both, without PEFT's own keys, mean one table.
    if HEAD not in wholes and (table not in wholes or "auto_mapping" not in settings):
        return
    head, embedding = wholes.pop(HEAD, own), wholes.get(table, own)
    if head.shape != embedding.shape:
        raise TriviumError(f"{folder / WEIGHTS}: {table} is {tuple(embedding.shape)}, {HEAD} another.")
    if torch.equal(head.to(own), embedding.to(own)):
        wholes[table] = embedding
        return
    model.head = nn.Linear(model.config.width, len(own), bias=False, device="meta")
    model.head.weight = nn.Parameter(own.clone(), requires_grad=False)
    model.config = model.config.changed(tied=False)
    wholes[HEAD] = head


@torch.no_grad()
def _replace(model: Transformer, folder: Path, wholes: Mapping[str, Tensor]) -> None:
    """Take over what was trained whole; a grown vocabulary makes the model's matrices grow."""
    places = {stored.name: stored.parts for stored in stored_tensors(model.config)}
    for key, tensor in wholes.items():
        if key not in places or len(places[key]) != 1:
            raise TriviumError(f"{folder / WEIGHTS}: the model has no place for {key}.")
        (part,) = places[key]
        owner = model.get_submodule(part.rsplit(".", 1)[0])
        weight = owner.get_parameter(part.rsplit(".", 1)[1])
        grows = isinstance(owner, (nn.Embedding, nn.Linear)) and part in GROWN
        if tensor.shape[1:] != weight.shape[1:] or not (len(tensor) == len(weight) or grows):
            raise TriviumError(f"{folder / WEIGHTS}: {key} is {tuple(tensor.shape)}, the model's differs.")
        value = tensor.to(device=weight.device, dtype=weight.dtype, copy=True)
        setattr(owner, part.rsplit(".", 1)[1], nn.Parameter(value, requires_grad=weight.requires_grad))
        if len(tensor) != len(weight):
            field = "context" if part.startswith("position_") else "vocabulary"
            model.config = model.config.changed(**{field: len(tensor)})
            if isinstance(owner, nn.Embedding):
                owner.num_embeddings = len(tensor)
            elif isinstance(owner, nn.Linear):
                owner.out_features = len(tensor)
