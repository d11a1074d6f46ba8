"""Weights in 8 or 4 bits, through torchao: after training, or already felt during it.

- `int8`: each output's weights share a scale; activations stay as they are.
- `int4`: each group of 32 weights shares a scale.
- `int8-dynamic`: like `int8`, and activations are rounded to 8 bits too, so that products are of integers.

In a file, which is in the layout of compressed-tensors, two values of `int4` share a byte; in memory each
has one, and the engine packs them again where it decodes on a processor (`generate/packed.py`).
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.machine import device
from trivium.model.lora import adaptable
from trivium.model.transformer import Transformer

Scheme = Literal["int8", "int4", "int8-dynamic"]
GROUP = 32
BITS = {"int8": 8, "int4": 4, "int8-dynamic": 8}
KEY = "quantization_config"
METHOD = "compressed-tensors"


def _torchao() -> Any:
    before = logging.root.manager.disable
    # It warns of kernels for GPUs that this machine need not have.
    logging.disable(logging.WARNING)
    try:
        import torchao.quantization as torchao
    except ModuleNotFoundError as error:
        raise TriviumError(
            "quantisation needs torchao: install it with `pip install trivium[quant]`."
        ) from error
    except ImportError as error:
        raise TriviumError(
            f"torchao {version('torchao')} does not work with torch {torch.__version__} ({error}); "
            "install one of its time, such as torchao 0.17 for torch 2.9."
        ) from error
    finally:
        logging.disable(before)
    return torchao


@lru_cache(1)
def multiplies_exactly() -> bool:
    """Whether products of 8-bit integers are right here: without VNNI, kernels add two of them in 16 bits."""
    most = torch.full((GROUP, GROUP), 127, dtype=torch.int8)
    return bool((torch._int_mm(most, most) == GROUP * 127**2).all())


def _method(scheme: Scheme) -> Any:
    """What torchao calls a scheme."""
    torchao = _torchao()
    if scheme == "int8":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False, version=2)
    if scheme == "int8-dynamic":
        if not device().startswith("cuda") and not multiplies_exactly():
            raise TriviumError(
                "int8-dynamic: products of 8-bit integers come out wrong on this processor, since it has no "
                "VNNI and kernels cut sums at 16 bits; use int8."
            )
        return torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, version=2)
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
    return _scheme_of_weight(weight) if is_quantised(weight) else None


def _scheme_of_weight(weight: Any) -> Scheme:
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


def prepare_for(model: Transformer, scheme: Literal["int8", "int4"]) -> None:
    """Let the forward pass round the matrices as `quantise` will, with gradients passing straight through."""
    _refuse_odd_widths(model, scheme)
    torchao = _torchao()
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if scheme == "int8":
        rounding = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
        method = QATConfig(weight_config=rounding, step="prepare")
    else:
        method = QATConfig(_method(scheme), step="prepare")
    names = set(adaptable(model))
    torchao.quantize_(model, method, filter_fn=lambda module, name: name in names)


def matrix_tensors(name: str, weights: Sequence[Any]) -> dict[str, Tensor]:
    """What a file holds of a rounded matrix, whose rows may lie in several weights."""
    assert all(is_quantised(weight) for weight in weights), f"{name} is not quantised"
    values = torch.cat([weight.qdata.cpu() for weight in weights])
    scales = torch.cat([weight.scale.cpu().view(len(weight.qdata), -1) for weight in weights])
    scheme = _scheme_of_weight(weights[0])
    found = {f"{name}_scale": scales}
    if scheme == "int8-dynamic":
        return found | {name: values}
    shape = torch.tensor(values.shape)
    return found | {f"{name}_packed": packed(values, BITS[scheme]), f"{name}_shape": shape}


def packed(values: Tensor, bits: int) -> Tensor:
    """Rows of signed values, as many of them in an int32 as it has room for, the first in its lowest bits."""
    room = 32 // bits
    raised = F.pad(values.to(torch.int64) + 2 ** (bits - 1), (0, -values.shape[1] % room))
    shifts = torch.arange(0, 32, bits)
    return (raised.unflatten(1, (-1, room)) << shifts).sum(-1).to(torch.int32)


def unpacked(words: Tensor, bits: int, width: int) -> Tensor:
    """The signed values out of their int32."""
    shifts = torch.arange(0, 32, bits)
    raised = (words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    return (raised.flatten(1)[:, :width] - 2 ** (bits - 1)).to(torch.int8)


def bytes_in_file(weight: Any) -> int:
    """How much of a file a weight takes, rounded or not."""
    if not is_quantised(weight):
        return weight.nbytes
    return weight.numel() * BITS[_scheme_of_weight(weight)] // 8 + weight.scale.nbytes


def record(scheme: Scheme, family: str) -> dict[str, Any]:
    """What config.json says about a scheme, in the words of compressed-tensors."""
    if family == "gpt2":
        # Other libraries find no `Linear` here and would leave these layers at random.
        return {
            "quant_method": METHOD,
            "config_groups": {scheme: "a rounded GPT-2 is opened by Trivium alone"},
        }
    weights: dict[str, Any] = {"num_bits": BITS[scheme], "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": GROUP} if scheme == "int4" else {"strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if scheme == "int8-dynamic":
        rows = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = rows
    return {
        "quant_method": METHOD,
        "format": "int-quantized" if scheme == "int8-dynamic" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", r"re:.*\.(mlp|block_sparse_moe)\.gate$"],
        "config_groups": {"group_0": group},
    }


def scheme_of(content: Mapping[str, Any], where: str) -> Scheme | None:
    """The scheme a config.json names, if any."""
    found = content.get(KEY)
    if not found:
        return None
    if isinstance(found, dict) and found.get("quant_method") == "trivium":
        raise TriviumError(f"{where}: an earlier Trivium rounded this model; quantise its parent again.")
    for scheme in get_args(Scheme):
        if found == record(scheme, content.get("model_type", "")):
            return scheme
    raise TriviumError(f"{where}: {KEY} {found} is not read; use unquantised weights.")


def stored_names(name: str, scheme: Scheme) -> list[str]:
    """The tensors that hold a rounded matrix in a file."""
    return [name, f"{name}_scale"] if scheme == "int8-dynamic" else [
        f"{name}_packed", f"{name}_scale", f"{name}_shape",
    ]  # fmt: skip


def stored_shape(scheme: Scheme, rows: int, width: int) -> tuple[int, int]:
    """The shape of the first of `stored_names`, which holds a matrix of [rows, width]."""
    return (rows, width) if scheme == "int8-dynamic" else (rows, -(-width * BITS[scheme] // 32))


def fill_matrix(weights: Sequence[Any], tensors: Sequence[Tensor], scheme: Scheme, where: str) -> None:
    """Put a file's rounded matrix, in the order of `stored_names`, into the weights that share its rows."""
    values, scales = tensors[:2]
    rows, width = sum(len(weight.qdata) for weight in weights), weights[0].qdata.shape[1]
    if scheme != "int8-dynamic":
        shape = tuple(tensors[2].tolist())
        if shape == (rows, width) and values.shape == (rows, -(-width * BITS[scheme] // 32)):
            values = unpacked(values, BITS[scheme], width)
    if values.shape != (rows, width) or scales.numel() != sum(weight.scale.numel() for weight in weights):
        raise TriviumError(f"{where} does not have the shape config.json asks for: fetch it again.")
    lengths = [len(weight.qdata) for weight in weights]
    for weight, own, scale in zip(weights, values.split(lengths), scales.split(lengths), strict=True):
        weight.qdata.copy_(own)
        weight.scale.copy_(scale.view_as(weight.scale))
