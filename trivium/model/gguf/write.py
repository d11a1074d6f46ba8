"""A model written as a GGUF file, which llama.cpp, Ollama and their kin open as it is."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_file
from trivium.model.folder import load_model, stored_form
from trivium.model.gguf.architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    metadata_of,
    place_of,
    rope_factors,
    to_stored,
)
from trivium.model.gguf.blocks import encode, stored_as
from trivium.model.gguf.read import gguf_package
from trivium.model.quantize import quantised_as
from trivium.model.transformer import Transformer
from trivium.model.weights import stored_tensors
from trivium.tokens.gguf import write_tokenizer
from trivium.tokens.tokenizer import Tokenizer

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_K_M"]
MATRICES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_K_M": "Q4_K"}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_K_M": 15}
FINER = ("q4_0", "q4_K_M")
"""Types under which the head, which every token passes, is stored in 6 bits instead of 4."""


def write_gguf(
    folder: Path, path: Path, kind: Kind, *, name: str = "", say: Callable[[str], None] = print
) -> None:
    """Write the model of a Hugging Face folder as a GGUF file; `say` is told what will differ."""
    gguf = gguf_package()
    model = load_model(folder)
    if quantised_as(model) is not None:
        raise TriviumError(f"{folder} is quantised already: export the model it was made from.")
    config = model.config
    architecture = ARCHITECTURES.get(config.family, "")
    metadata = metadata_of(config)
    written, notes = write_tokenizer(Tokenizer.load(folder), config.vocabulary)
    for note in notes:
        say(f"note: {note}")
    with whole_file(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        writer.add_name(name or folder.name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in (metadata | written).items():
            _add(writer, key, value)
        for tensor_name, tensor, stored in _tensors(model, architecture, kind):
            values = encode(tensor.float().numpy(), stored)
            writer.add_tensor(tensor_name, values, raw_dtype=gguf.GGMLQuantizationType[stored])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """A setting under the type that llama.cpp expects of its kind."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensors(model: Transformer, architecture: str, kind: Kind) -> Iterator[tuple[str, Tensor, str]]:
    """Every tensor of the file with the type it is stored in; experts are stacked."""
    config, parameters = model.config, dict(model.named_parameters())
    stacks: dict[str, list[Tensor]] = {}
    for stored in stored_tensors(config):
        place = place_of(stored.name, config)
        tensor = to_stored(stored.name, stored_form(stored, parameters), config, architecture)
        if place.expert is None:
            yield place.name, tensor, _type_of(place.name, tensor, kind, config.layers, config.tied)
            continue
        stack = stacks.setdefault(place.name, [])
        stack.append(tensor)
        assert config.experts is not None
        if len(stack) == config.experts.count:
            whole = torch.stack(stacks.pop(place.name))
            yield place.name, whole, _type_of(place.name, whole, kind, config.layers, config.tied)
    if config.rope["rope_type"] == "llama3":
        yield ROPE_FACTORS, rope_factors(config.rope, config.head_width), "F32"


def _type_of(name: str, tensor: Tensor, kind: Kind, layers: int, tied: bool) -> str:
    """The type a tensor is stored in: norms, biases and routers stay whole."""
    if tensor.dim() == 1 or "ffn_gate_inp" in name or name == "position_embd.weight":
        return "F32"
    stored = MATRICES[kind]
    if kind in FINER and (name == "output.weight" or (tied and name == "token_embd.weight")):
        stored = "Q6_K"
    elif kind == "q4_K_M" and any(part in name for part in ("attn_v", "ffn_down", "attn_qkv")):
        layer = int(name.split(".")[1])
        edge = layers // 8
        if layer < edge or layer >= 7 * layers // 8 or (layer - edge) % 3 == 2:
            stored = "Q6_K"
    return stored_as(stored, tensor.shape[-1])
