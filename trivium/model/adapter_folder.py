"""An adapter alone, in PEFT's form, read as the folder of a model that is its base with the adapter.

The folder is made once, in the cache, for this adapter and this base as they are. It holds no weights but
the adapter's: these are added to the base's when the model is opened, in the precision that is asked for.
Tokenizer and generation settings are the adapter's where it has any, else the base's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from trivium.kit.cache import cache_folder
from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum, read_object, whole_folder, write_json
from trivium.model.adapters import CONFIG, WEIGHTS, load_adapter
from trivium.model.hub import resolve

VERSION = 1
"""Raised when the same adapter would be read as another folder."""
GENERATION = "generation_config.json"
OWN = ("*.json", "*.jinja", "*.model", WEIGHTS)
"""What of an adapter's folder counts; a trainer's state beside it does not."""


def base_of(folder: Path) -> Path:
    """The folder of the model that an adapter is laid on, which has to be on this machine."""
    settings = read_object(folder / CONFIG)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(name, str) or not name:
        raise TriviumError(f"{folder / CONFIG} names no base model: restore it.")
    if isinstance(revision, str) and not Path(name).exists():
        name = f"{name}@{revision}"
    if (Path(name) / CONFIG).is_file() and not (Path(name) / "config.json").is_file():
        raise TriviumError(
            f"{folder} is an adapter to {name}, which is an adapter too: merge that one first."
        )
    try:
        # A folder may name any repository of the hub, and opening it is no consent to fetch that.
        return resolve(name, fetch=False)
    except TriviumError as error:
        raise TriviumError(
            f"{folder} is an adapter to {name}, which is not on this machine: restore it, or fetch it if you"
            f" trust it ({error})"
        ) from error


def as_folder(adapter: Path) -> Path:
    """The Hugging Face folder of an adapter, made now unless the cache has it."""
    base = base_of(adapter)
    if not (base / "config.json").is_file():
        raise TriviumError(f"{adapter} is an adapter to {base}, which has no config.json: restore it.")
    if not (adapter / WEIGHTS).is_file():
        raise TriviumError(f"{adapter} has no {WEIGHTS}: fetch it again.")
    identity = hashlib.sha256()
    for path in sorted({found for pattern in OWN for found in adapter.glob(pattern)}):
        identity.update(f"{path.name} {checksum(path)}\n".encode())
    for path in sorted(base.iterdir()):
        state = os.stat(path)
        identity.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    folder = cache_folder() / "adapters" / f"{identity.hexdigest()[:32]}-{VERSION}"
    if not (folder / "config.json").is_file():
        with whole_folder(folder) as beside:
            _write(adapter, base, beside)
    return folder


def _write(adapter: Path, base: Path, folder: Path) -> None:
    # These import this module's own users.
    from trivium.model.folder import load_model, save_model
    from trivium.tokens.tokenizer import Tokenizer

    model = load_model(base)
    load_adapter(model, adapter)
    sources = (adapter, base)
    said = [read_object(one / GENERATION) for one in sources if (one / GENERATION).is_file()]
    # What was trained whole may have changed the vocabulary, or parted two tables that were one.
    save_model(model, folder, generation=said[0] if said else None, weights=False)
    inside = folder / "adapter"
    inside.mkdir()
    shutil.copy(adapter / WEIGHTS, inside / WEIGHTS)
    settings = read_object(adapter / CONFIG) | {"base_model_name_or_path": str(base.resolve())}
    write_json(inside / CONFIG, settings | {"revision": None})
    for source in sources:
        if any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            Tokenizer.load(source).save(folder)
            break
