"""Weights in 8 or 4 bits, through torchao: after training, or already felt during it.

- `int8`: each output's weights share a scale; activations stay as they are.
- `int4`: each group of 32 weights shares a scale.
- `int8-dynamic`: like `int8`, and activations are rounded to 8 bits too, so that products are of integers.

In a file two values of `int4` share a byte; in memory each has one: torch's kernel for packed ones is slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, save_tensors
from trivium.model.lora import adaptable
from trivium.model.transformer import Transformer

Scheme = Literal["int8", "int4", "int8-dynamic"]
GROUP = 32
FILE = "quantised.safetensors"
KEY = "quantization_config"
METHOD = "trivium"


def _torchao() -> Any:
    try:
        import torchao.quantization as torchao
    except ImportError as error:
        raise TriviumError(
            "quantisation needs torchao: install it with `pip install trivium[quant]`."
        ) from error
    return torchao


def _method(scheme: Scheme) -> Any:
    """What torchao calls a scheme."""
    torchao = _torchao()
    if scheme == "int8":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8-dynamic":
        return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    from torchao.quantization.granularity import PerGroup

    group = PerGroup(GROUP)
    return torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=group,
    )


def _refuse_odd_widths(model: Transformer, scheme: str) -> None:
    for name, layer in adaptable(model).items():
        if scheme == "int4" and layer.in_features % GROUP:
            raise TriviumError(
                f"int4: {name} has {layer.in_features} inputs, no multiple of {GROUP}; use int8."
            )


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held in whole numbers."""
    return hasattr(weight, "tensor_data_names")


def rounds_rows(weight: Tensor) -> bool:
    """Whether a quantised weight also rounds the rows it is multiplied with."""
    return getattr(weight, "act_quant_kwargs", None) is not None


def quantised_as(model: Transformer) -> Scheme | None:
    """The scheme a model's matrices are held in, if any."""
    weight: Any = next(iter(adaptable(model).values())).weight
    if not is_quantised(weight):
        return None
    if type(weight).__name__ == "IntxUnpackedToInt8Tensor":
        return "int4"
    return "int8-dynamic" if rounds_rows(weight) else "int8"


def quantise(model: Transformer, scheme: Scheme) -> None:
    """Round the matrices of all layers; embedding, head, routers and norms stay as they are."""
    if quantised_as(model) is not None:
        raise TriviumError(f"the model is quantised already ({quantised_as(model)}): start from its parent.")
    _refuse_odd_widths(model, scheme)
    torchao = _torchao()
    names = set(adaptable(model))
    torchao.quantize_(
        model, _method(scheme), filter_fn=lambda module, name: name in names and isinstance(module, nn.Linear)
    )
    for layer in adaptable(model).values():
        layer.weight.requires_grad_(False)


def prepare_for(model: Transformer, scheme: Literal["int4"]) -> None:
    """Let the forward pass round the matrices as `quantise` will, with gradients passing straight through."""
    _refuse_odd_widths(model, scheme)
    torchao = _torchao()
    from torchao.quantization.qat import QATConfig

    names = set(adaptable(model))
    torchao.quantize_(
        model, QATConfig(_method(scheme), step="prepare"), filter_fn=lambda module, name: name in names
    )


def is_prepared(model: Transformer) -> bool:
    """Whether the forward pass rounds the matrices."""
    return any(hasattr(layer, "weight_fake_quantizer") for layer in adaptable(model).values())


def packed(model: Transformer) -> dict[str, Tensor]:
    """The rounded matrices in plain tensors: two values of 4 bits lie in one byte."""
    found: dict[str, Tensor] = {}
    for name, layer in adaptable(model).items():
        weight: Any = layer.weight
        assert is_quantised(weight), f"{name} is not quantised"
        values = weight.qdata
        if quantised_as(model) == "int4":
            low, high = (values[:, start::2].to(torch.uint8) & 15 for start in (0, 1))
            values = low | (high << 4)
        found[f"{name}.values"], found[f"{name}.scale"] = values.cpu(), weight.scale.cpu()
    return found


def unpacked(values: Tensor) -> Tensor:
    """The values of 4 bits out of their bytes."""
    pairs = torch.stack((values & 15, values >> 4), -1).flatten(-2).to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)


def record(scheme: Scheme) -> dict[str, Any]:
    """What config.json says about a scheme."""
    return {"quant_method": METHOD, "scheme": scheme, "group": GROUP if scheme == "int4" else None}


def scheme_of(content: Mapping[str, Any], where: str) -> Scheme | None:
    """The scheme a config.json names, if any."""
    found = content.get(KEY)
    if not found:
        return None
    if found.get("quant_method") != METHOD or found not in [record(scheme) for scheme in get_args(Scheme)]:
        raise TriviumError(f"{where}: {KEY} {found} is not read; use unquantised weights.")
    return found["scheme"]


def save_quantised(model: Transformer, folder: Path) -> None:
    """Write the rounded matrices beside the rest of a model's files."""
    save_tensors(
        folder / FILE, {key: value.contiguous() for key, value in packed(model).items()}, {"format": "pt"}
    )


def load_quantised(model: Transformer, folder: Path, scheme: Scheme) -> None:
    """Put a folder's rounded matrices into a model whose other weights are there."""
    if not (folder / FILE).is_file():
        raise TriviumError(f"{folder / FILE} is missing, though config.json says {scheme}: restore it.")
    tensors = load_tensors(folder / FILE)
    with torch.no_grad():
        for layer in adaptable(model).values():
            layer.weight.zero_()
    quantise(model, scheme)
    for name, layer in adaptable(model).items():
        weight: Any = layer.weight
        values = tensors[f"{name}.values"]
        values = unpacked(values) if scheme == "int4" else values
        if values.shape != weight.qdata.shape:
            raise TriviumError(
                f"{folder / FILE}: {name} has the shape {tuple(values.shape)}; fetch it again."
            )
        weight.qdata.copy_(values)
        weight.scale.copy_(tensors[f"{name}.scale"])
