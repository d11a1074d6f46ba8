"""A model on disk: a Hugging Face folder, read and written without an export step."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.kit.files import CHECKSUM, bare_name, read_object, save_tensors, tensors_checksum, write_json
from trivium.model.adapter_folder import base_of
from trivium.model.adapters import CONFIG as ADAPTER
from trivium.model.adapters import load_adapter
from trivium.model.blends import sums
from trivium.model.config import ModelConfig
from trivium.model.families import read_config, write_config
from trivium.model.initialise import build
from trivium.model.lora import bake
from trivium.model.masks import unmasked
from trivium.model.modalities.folder import load_modalities, save_modalities
from trivium.model.modalities.llava import TEXT, is_llava, load_llava, text_config
from trivium.model.quantize import KEY as QUANTISED
from trivium.model.quantize import (
    Scheme,
    bytes_in_file,
    fill_matrix,
    is_quantised,
    matrix_tensors,
    quantise,
    quantised_as,
    record,
    scheme_of,
    stored_names,
    stored_shape,
)
from trivium.model.transformer import Transformer
from trivium.model.unfilled import unfilled
from trivium.model.weights import Stored, matrices, stored_tensors

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Tensors that old files carry and that follow from the config.
DERIVED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def load_config(folder: Path | str) -> ModelConfig:
    """The config of a model folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        if (Path(folder) / ADAPTER).is_file():
            raise TriviumError(
                f"{folder} is an adapter and no model: name the folder that holds its config.json, or serve "
                "it beside its base, as BASE:NAME=FOLDER."
            )
        raise TriviumError(f"{folder} has no config.json: name a folder in Hugging Face's form.")
    content = read_object(path)
    if is_llava(content):
        content = text_config(content)
    scheme_of(content, str(path))
    return read_config({key: value for key, value in content.items() if key != QUANTISED}, str(path))


class StoredWeights:
    """The tensors of a folder's safetensors files, found by name and read one at a time.

    Of a larger model only those are seen whose names begin with `prefix`, without it.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self.files: dict[str, Path] = {}
        self.handles: dict[Path, Any] = {}
        for path in self.paths():
            for name in self.open(path).keys():  # noqa: SIM118 (a safetensors file is no dict)
                if name.startswith(prefix):
                    self.files[name.removeprefix(prefix)] = path

    def paths(self) -> list[Path]:
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if index.is_file():
            return [self.folder / name for name in _files_in_index(index)]
        if single.is_file():
            return [single]
        raise TriviumError(
            f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors weights are read."
        )

    def open(self, path: Path) -> Any:
        """A file's handle, opened once and checked against the checksum it carries."""
        if path not in self.handles:
            if not path.is_file():
                raise TriviumError(f"{path} is missing, though the folder's index names it: fetch it again.")
            try:
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                raise TriviumError(f"{path} is damaged ({error}): fetch or write it again.") from error
            self.handles[path] = handle
            expected = (handle.metadata() or {}).get(CHECKSUM)
            if expected is not None:
                named = ((name, handle.get_tensor(name)) for name in sorted(handle.keys()))
                if tensors_checksum(named) != expected:
                    raise TriviumError(f"{path} is damaged (its checksum differs): fetch or write it again.")
        return self.handles[path]

    def find(self, name: str) -> str:
        """The name under which a tensor is stored, with or without the prefix of a model with a head."""
        if name in self.files:
            return name
        bare = name.split(".", 1)[1]
        if name.startswith(("model.", "transformer.")) and bare in self.files:
            return bare
        raise TriviumError(f"{self.folder}: the weights have no tensor {name!r}: the folder is incomplete.")

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A tensor's type and shape as the file's header says them; nothing of the tensor is read."""
        part = self.open(self.files[name]).get_slice(self.prefix + name)
        return part.get_dtype(), tuple(part.get_shape())

    def tensor(self, name: str) -> Tensor:
        return self.open(self.files[name]).get_tensor(self.prefix + name)


def _files_in_index(path: Path) -> list[str]:
    """The files that an index names, which are safetensors files beside it and nothing elsewhere."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TriviumError(f"{path} has no `weight_map` of the tensors and their files: fetch it again.")
    names = {bare_name(path, name) for name in weight_map.values()}
    for name in names:
        if not name.endswith(".safetensors"):
            raise TriviumError(f"{path} names {name}: only safetensors weights are read.")
    return sorted(names)


def load_model(
    folder: Path | str, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """The model of a Hugging Face folder, in the stored precision unless told otherwise."""
    folder = Path(folder)
    config = load_config(folder)
    if not list(folder.glob("*.safetensors")) and (folder / "adapter" / ADAPTER).is_file():
        return _on_its_base(folder / "adapter", config, dtype, device)
    content = read_object(folder / "config.json")
    scheme = scheme_of(content, str(folder / "config.json"))
    weights = StoredWeights(folder, TEXT if is_llava(content) else "")
    held: dict[Stored, list[str]] = {}
    if scheme is not None:
        for stored in matrices(config):
            held[stored] = [weights.find(name) for name in stored_names(stored.name, scheme)]
    layout = [(stored, weights.find(stored.name)) for stored in stored_tensors(config) if stored not in held]
    refuse_unexpected(config, weights, {name for _, name in layout}.union(*held.values()))
    refuse_other_shapes(config, weights, layout)
    refuse_other_shapes(config, weights, [(stored, names[0]) for stored, names in held.items()], scheme)
    stored_dtype = weights.tensor(layout[0][1]).dtype
    model = build(config, dtype=dtype or stored_dtype, device=str(device))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for stored, name in layout:
            fill(stored, weights.tensor(name), parameters)
    if scheme is not None:
        rounded = {part: parameters.pop(part) for stored in held for part in stored.parts}
        with torch.no_grad():
            for weight in rounded.values():
                weight.zero_()
        quantise(model, scheme)
        for stored, names in held.items():
            parts = [model.get_parameter(part) for part in stored.parts]
            tensors = [weights.tensor(name) for name in names]
            fill_matrix(parts, tensors, scheme, f"{folder}: {stored.name}")
    assert not parameters, f"not in any family's files: {sorted(parameters)}"
    if is_llava(content):
        model.modalities = load_llava(folder, StoredWeights(folder), dtype=model.dtype, device=device)
    else:
        model.modalities = load_modalities(folder, dtype=model.dtype, device=device)
    return model


def _on_its_base(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None, device: str | torch.device
) -> Transformer:
    """The model of a folder that holds an adapter alone: its base with the adapter in the weights."""
    base = base_of(folder)
    model = load_model(base, dtype=dtype, device=device)
    load_adapter(model, folder)
    bake(model)
    # What the training made of eyes and ears stands beside the adapter.
    own, model.modalities = model.modalities, None
    found = load_modalities(folder.parent, dtype=model.dtype, device=device) or own
    # What the training changed besides weights, such as the positions, stands in the folder's own config.
    with unfilled():
        configured = Transformer(config)
    try:
        configured.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError:
        raise TriviumError(
            f"{folder.parent}: config.json is of another model than {base}: restore it."
        ) from None
    configured.modalities = found
    return configured


FLOATS = ("F64", "F32", "F16", "BF16")


def refuse_other_shapes(
    config: ModelConfig,
    weights: StoredWeights,
    layout: Iterable[tuple[Stored, str]],
    scheme: Scheme | None = None,
) -> None:
    """Compare the files' headers with what config.json asks for, before room is made for any weight."""
    with unfilled():
        parameters = dict(Transformer(config).named_parameters())
    for stored, name in layout:
        targets = [parameters[part] for part in stored.parts]
        wanted = (sum(len(target) for target in targets), *targets[0].shape[1:])
        if scheme is not None:
            wanted = stored_shape(scheme, *wanted)
        elif stored.turned:
            wanted = wanted[::-1]
        kind, found = weights.header(name)
        if found != wanted:
            raise TriviumError(
                f"{weights.files[name]}: {name} has the shape {found}, but config.json asks for {wanted}: the"
                " two do not belong together."
            )
        if scheme is None and kind not in FLOATS:
            raise TriviumError(
                f"{weights.files[name]}: weights of type {kind} are not read; use unquantised ones."
            )


def fill(stored: Stored, tensor: Tensor, parameters: dict[str, Tensor]) -> None:
    """Copy one stored tensor into the weights it holds, and strike them off the list."""
    targets = [parameters.pop(part) for part in stored.parts]
    pieces = (tensor.T if stored.turned else tensor).split([len(target) for target in targets])
    for target, piece in zip(targets, pieces, strict=True):
        target.copy_(piece)


def refuse_unexpected(config: ModelConfig, weights: StoredWeights, used: set[str]) -> None:
    """A tensor that is not read means that the model computes something else than the files' author meant."""
    for name in weights.files:
        if name in used or name.endswith(DERIVED):
            continue
        if name == "lm_head.weight" and config.tied:
            # Some tied files repeat the embedding as the head.
            embedding = weights.tensor(weights.find(stored_tensors(config)[0].name))
            if torch.equal(weights.tensor(name), embedding):
                continue
        raise TriviumError(f"{weights.files[name]} holds {name}, which this config.json has no place for.")


def stored_form(stored: Stored, parameters: Mapping[str, Tensor]) -> Tensor:
    """The tensor a file holds for these weights."""
    parts = [parameters[part].detach().to("cpu") for part in stored.parts]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (joined.T if stored.turned else joined).contiguous()


def stored_forms(stored: Stored, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that a file holds for these weights: one tensor, or those of a rounded matrix."""
    if is_quantised(parameters[stored.parts[0]]):
        return matrix_tensors(stored.name, [parameters[part] for part in stored.parts])
    return {stored.name: stored_form(stored, parameters)}


def save_model(
    model: Transformer,
    folder: Path | str,
    *,
    generation: dict[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
    weights: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, generation_config.json and safetensors that transformers opens as they are.

    Without `weights` the folder says only what the model is: an adapter in it says the rest. With `dtype`
    the tensors are rounded to it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = write_config(model.config) | {"dtype": str(dtype or model.dtype).removeprefix("torch.")}
    parameters = {**dict(model.named_parameters()), **sums(model), **unmasked(model)}
    scheme = quantised_as(model)
    if scheme is not None and weights:
        content[QUANTISED] = record(scheme, model.config.family)
    shards: list[list[Stored]] = [[]]
    filled = total = 0
    for stored in stored_tensors(model.config) if weights else ():
        size = sum(bytes_in_file(parameters[part]) for part in stored.parts)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled, total = filled + size, total + size
    count, weight_map = len(shards), {}
    for number, shard in enumerate(shards if weights else [], 1):
        name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {
            name: tensor if dtype is None else tensor.to(dtype)
            for stored in shard
            for name, tensor in stored_forms(stored, parameters).items()
        }
        save_tensors(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
    if count > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    ids = {key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in content}
    write_json(folder / "generation_config.json", ids | (generation or {}))
    write_json(folder / "config.json", content)
    save_modalities(model, folder)
