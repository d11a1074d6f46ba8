"""Opening the models a person names, and finding short names for them."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from trivium.generate.defaults import sampling_defaults
from trivium.generate.drafting import open_draft
from trivium.generate.engine import Engine
from trivium.generate.kv_cache import half_of_free_memory
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.adapters import CONFIG, load_adapter
from trivium.model.folder import load_model
from trivium.model.lora import selection_of
from trivium.model.named import RUNS, find_model
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer


def open_engine(
    model: str | Path,
    *,
    runs: str | Path = RUNS,
    max_rows: int = 32,
    device: str | None = None,
    dtype: str | None = None,
    memory_budget: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    sharing: int = 1,
    prefix_cache_size: int = 0,
    draft: str | Path | None = None,
    compiled: bool = False,
) -> Engine:
    """An engine around a model's folder, a stage of a run, or an id of the hub, and adapters to mix on it.

    `dtype` is what the weights are held in, such as "bfloat16"; `draft` is another model, or "lookup": what
    guesses the next few tokens.
    """
    folder = find_model(model, runs)
    place = machine.usable(device)
    kind = machine.compute_dtype(place) if dtype is None else getattr(torch, dtype)
    if compiled and not place.startswith("cuda"):
        raise TriviumError(
            f"steps are compiled on a GPU only, and this model is on {place}: leave `--compile` out."
        )
    loaded = load_model(folder, dtype=kind, device=place)
    for name, beside in (adapters or {}).items():
        lay_beside(loaded, Path(beside), name)
    loaded.requires_grad_(False)
    if memory_budget is None:
        # so many models will fill their caches beside each other, and none has yet
        memory_budget = half_of_free_memory(torch.device(place)) // sharing
    engine = Engine(
        loaded.eval(),
        Tokenizer.load(folder),
        max_rows=max_rows,
        memory_budget=memory_budget,
        prefix_cache_size=prefix_cache_size,
        draft=open_draft(draft, runs=runs, device=device),
        compiled=compiled,
    )
    engine.sampling_defaults = sampling_defaults(folder)
    return engine


def drafts_of(names: abc.Collection[str], drafts: Sequence[str]) -> dict[str, str]:
    """What drafts for each model: `NAME=DRAFT` for the model of that name, DRAFT for all others."""
    found: dict[str, str] = {}
    for given in sorted(drafts, key=lambda one: one.partition("=")[0] in names):
        name, mark, place = given.partition("=")
        for target in [name] if mark and name in names else names:
            found[target] = place if mark and name in names else given
    return found


def lay_beside(model: Transformer, folder: Path, name: str) -> None:
    """Lay an adapter on a model that others use too; by itself none of them acts."""
    load_adapter(model, folder, name=name, shared=True)
    selection = selection_of(model)
    assert selection is not None
    selection.active = None


def with_adapters(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The adapters of each model: `BASE:NAME=FOLDER` beside `BASE=MODEL` is an adapter of that base.

    An adapter with a plain name is a model of its own, merged into the base that it names.
    """
    adapters = {name: _adapter(name, place, names) if ":" in name else None for name, place in names.items()}
    found: dict[str, dict[str, str]] = {name: {} for name, place in adapters.items() if place is None}
    for name, place in adapters.items():
        if place is None:
            continue
        base, _, adapter = name.rpartition(":")
        if base not in found:
            raise TriviumError(
                f"{place} is an adapter: serve it as BASE:NAME={place}, with BASE among {', '.join(found)}."
            )
        found[base][adapter] = place
    return found


def _adapter(name: str, place: str, names: Mapping[str, str]) -> str | None:
    """The folder of an adapter that is named, or that lies in what a stage made where one is asked for."""
    asked = name.rpartition(":")[0] in names
    for inside in (".", "adapter", "model/adapter") if asked else (".",):
        if (Path(place) / inside / CONFIG).is_file():
            return str(Path(place) / inside)
    return None


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
            parts = Path(given).absolute().parts[1:] or ("/",)
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
