"""Opening the models a person names, and finding short names for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trivium.generate.engine import Engine
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.folder import load_model
from trivium.model.hub import resolve
from trivium.tokens.tokenizer import Tokenizer


def open_engine(model: str | Path, *, max_rows: int = 32, device: str | None = None) -> Engine:
    """An engine around a model's folder, a stage of a run, or an id of the hub."""
    folder = resolve(model)
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    place = device or machine.device()
    loaded = load_model(folder, dtype=machine.compute_dtype(place), device=place)
    loaded.requires_grad_(False)
    return Engine(loaded.eval(), Tokenizer.load(folder), max_rows=max_rows)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The name each model is asked for by, and where it is: as `name=place` says, else the path's end."""
    if not models:
        raise TriviumError(
            "no model to serve was named; give a folder, a stage of a run or an id of the hub."
        )
    names: dict[str, str] = {}
    unnamed: list[tuple[str, tuple[str, ...]]] = []
    for given in models:
        name, mark, place = given.partition("=")
        if mark and not Path(given).exists():
            _add(names, name, place)
        elif Path(given).exists():
            parts = Path(given).absolute().parts[1:]
            unnamed.append((given, parts[:-1] if parts[-1] == "model" else parts))
        else:
            _add(names, given, given)
    for place, parts in unnamed:
        others = [other for given, other in unnamed if given != place]
        lengths = range(1, len(parts) + 1)
        length = next((n for n in lengths if all(parts[-n:] != other[-n:] for other in others)), len(parts))
        _add(names, "/".join(parts[-length:]), place)
    return names


def _add(names: dict[str, str], name: str, place: str) -> None:
    if not name or not place:
        raise TriviumError(f"{name}={place} names no model; write NAME=FOLDER.")
    if name in names:
        raise TriviumError(f"two models would be called {name}; tell them apart with NAME=FOLDER.")
    names[name] = place
