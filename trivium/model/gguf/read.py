"""A GGUF file read as a Hugging Face folder, which every verb and stage then opens like any other.

The folder is made once, in the cache, under the checksum of the file: in `TRIVIUM_CACHE`, else in `trivium`
in the user's cache folder; with an empty `TRIVIUM_CACHE` it is kept only while the process runs. Its
weights are the file's, dequantised: in float32, unless all matrices of the file are in float16 or all in
bfloat16 and no value is lost in that type.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.kit.cache import cache_folder
from trivium.kit.errors import DamagedError, TriviumError, needing
from trivium.kit.files import checksum, readable, save_tensors, whole_folder, write_json
from trivium.model.config import ModelConfig
from trivium.model.families import read_config, write_config
from trivium.model.gguf.architectures import ROPE_FACTORS, config_of, from_stored, place_of, with_factors
from trivium.model.weights import Stored, stored_tensors
from trivium.tokens.gguf import read_tokenizer

ENDING = ".gguf"
VERSION = 1
"""Raised when the same file would be read as another folder."""
READ = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
SHARD_BYTES = 4_000_000_000


def is_gguf(path: Path | str) -> bool:
    """Whether a path names a GGUF file that exists."""
    return Path(path).suffix == ENDING and Path(path).is_file()


def as_folder(path: Path) -> Path:
    """The Hugging Face folder of a GGUF file, made now unless the cache has it."""
    with readable(path):
        identity = checksum(path)
    folder = cache_folder() / "gguf" / f"{identity}-{VERSION}"
    if not (folder / "config.json").is_file():
        with whole_folder(folder) as beside:
            convert(path, beside)
    return folder


def convert(path: Path, folder: Path) -> None:
    """Write config.json, safetensors and the tokenizer of a GGUF file into a folder."""
    file = File(path)
    content = config_of(file.metadata, file.shapes, str(path))
    if ROPE_FACTORS in file.shapes:
        content = with_factors(content, file.tensor(ROPE_FACTORS), str(path))
    config = read_config(content, str(path))
    dtype = _narrowest(file, config)
    _write_weights(file, config, folder, dtype)
    stops: list[int] = []
    tokenizer = read_tokenizer(file.metadata, str(path))
    if tokenizer is not None:
        tokenizer.save(folder)
        stops = sorted(tokenizer.stop_ids)
    keep = {"bos_token_id", "eos_token_id", "pad_token_id"} & content.keys()
    generation = {key: content[key] for key in sorted(keep)} | ({"eos_token_id": stops} if stops else {})
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", write_config(config) | {"dtype": str(dtype).removeprefix("torch.")})


class File:
    """The metadata and tensors of a GGUF file; whatever is wrong with it is told in one sentence."""

    def __init__(self, path: Path) -> None:
        gguf = gguf_package()
        self.path = path
        with readable(path), _as_damage(path):
            self.reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in self.reader.fields.items()
            }
            self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        if "split.count" in self.metadata and self.metadata["split.count"] > 1:
            raise TriviumError(f"{path} is one part of several: join them with llama-gguf-split --merge.")
        for tensor in self.reader.tensors:
            if tensor.tensor_type.name not in READ:
                raise TriviumError(
                    f"{path}: {tensor.name} is in {tensor.tensor_type.name}, which is not read; "
                    f"{', '.join(READ)} are."
                )
        # ggml names the fastest dimension first.
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self.tensors.items()
        }

    def kind(self, name: str) -> str:
        """The type a tensor is stored in."""
        return self.tensors[name].tensor_type.name

    def tensor(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor, or one expert's part of a stack of them, in float32."""
        tensor = self.tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        with _as_damage(self.path):
            values = gguf_package().dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True))


def gguf_package() -> Any:
    """The `gguf` package, or how to get it."""
    with needing("GGUF files need the package gguf: install it with `pip install trivium[gguf]`."):
        import gguf
    return gguf


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    """Turn whatever the reader raises at a file that is cut off or scrambled into one sentence."""
    try:
        yield
    except (OSError, TriviumError):
        raise
    except Exception as error:
        # The package reads through numpy and checks little: what it raises depends on where a file is cut.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedError(f"{path} is damaged or no GGUF file ({reason}): fetch it again.") from error


def _sources(file: File, config: ModelConfig) -> Iterator[tuple[Stored, str, int | None]]:
    """Every tensor of the folder with its place in the file; nothing of the file may be left over."""
    used = {ROPE_FACTORS}
    for stored in stored_tensors(config):
        place = place_of(stored.name, config)
        if place.name not in file.tensors:
            raise DamagedError(f"{file.path} has no tensor {place.name}: fetch it again.")
        used.add(place.name)
        yield stored, place.name, place.expert
    left = sorted(set(file.tensors) - used)
    if left:
        raise TriviumError(f"{file.path} holds {left[0]}, which this architecture has no place for.")


def _narrowest(file: File, config: ModelConfig) -> torch.dtype:
    """The smallest type that holds every value of the file."""
    kinds = {file.kind(name) for _, name, _ in _sources(file, config) if len(file.shapes[name]) > 1}
    [kind] = kinds if len(kinds) == 1 else ["F32"]
    dtype = HALVES.get(kind, torch.float32)
    if dtype != torch.float32:
        for name, shape in file.shapes.items():
            values = file.tensor(name) if len(shape) == 1 and name != ROPE_FACTORS else torch.zeros(1)
            if not torch.equal(values.to(dtype).float(), values):
                return torch.float32
    return dtype


def _write_weights(file: File, config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    architecture = str(file.metadata["general.architecture"])
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    paths, weight_map, total = [folder / "model.safetensors"], {}, 0
    for stored, name, expert in _sources(file, config):
        tensor = from_stored(stored.name, file.tensor(name, expert), config, architecture).to(dtype)
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            save_tensors(paths[-1], shards.pop())
            shards.append({})
            paths.append(folder / f"model-{len(paths) + 1:05d}.safetensors")
        shards[-1][stored.name] = tensor
        weight_map[stored.name], total = paths[-1].name, total + tensor.nbytes
    save_tensors(paths[-1], shards[-1])
    if len(paths) > 1:
        # The name of a single file means that there are no others.
        first = folder / "model-00001.safetensors"
        os.replace(paths[0], first)
        weight_map = {
            name: first.name if place == paths[0].name else place for name, place in weight_map.items()
        }
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
