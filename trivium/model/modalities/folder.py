"""A model's eyes and ears on disk: a folder beside its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_object, save_tensors, write_json
from trivium.model.modalities.llava import is_llava, llava_config
from trivium.model.modalities.towers import Modalities, ModalitiesConfig, config_from
from trivium.tokens.forms import FOLDER, forms_from

if TYPE_CHECKING:
    from trivium.model.transformer import Transformer

WEIGHTS = "model.safetensors"


def refuse_modalities(model: Transformer, stage: str, what: str) -> None:
    """Refuse to change the shape of a model whose encoders were made for the one it has."""
    if model.modalities is not None:
        raise TriviumError(
            f"{stage}: the model takes pictures or sounds, and its encoders fit the shape that it has: "
            f"{what} the language model before it learns to see."
        )


def save_modalities(model: Transformer, folder: Path) -> None:
    """Write the modalities of a model that has any into its folder."""
    if model.modalities is None:
        return
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    tensors = {
        name: parameter.detach().to("cpu").contiguous()
        for name, parameter in model.modalities.named_parameters()
    }
    save_tensors(place / WEIGHTS, tensors)
    write_json(place / "config.json", model.modalities.config.written())


def read_modalities(folder: Path) -> ModalitiesConfig | None:
    """What the modalities in a model's folder are, None where it takes only text."""
    path = folder / FOLDER / "config.json"
    if not path.is_file():
        whole = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        return llava_config(folder, whole) if is_llava(whole) else None
    content = read_object(path)
    if content.get("version") != 1:
        raise TriviumError(f"{path} is of version {content.get('version')!r}, which is not known here.")
    try:
        return config_from(content, forms_from(content.get("forms") or {}, path))
    except (TypeError, KeyError, ValueError) as error:
        raise TriviumError(f"{path} is damaged ({type(error).__name__}: {error}): restore it.") from error


def load_modalities(folder: Path, *, dtype: torch.dtype, device: str | torch.device) -> Modalities | None:
    """The modalities in a model's folder, None where it takes only text."""
    config = read_modalities(folder)
    if config is None:
        return None
    place = folder / FOLDER
    try:
        modalities = Modalities(config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise TriviumError(f"{place / 'config.json'} is of no model ({error}): restore it.") from error
    tensors = load_tensors(place / WEIGHTS)
    wanted = dict(modalities.named_parameters())
    if {name: one.shape for name, one in tensors.items()} != {
        name: one.shape for name, one in wanted.items()
    }:
        raise TriviumError(f"{place / WEIGHTS} does not fit the config.json beside it: restore them.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    modalities.hold_still()
    return modalities.to(device=device, dtype=dtype)
