"""Souping: one model made from several that share an ancestor, shown beside its ingredients."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trivium.curate.examination import Examined, held_out_of
from trivium.data.door import Door
from trivium.data.rows import PackedSequence
from trivium.data.settings import Mixture
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.model import merge as soups
from trivium.model.modalities.folder import refuse_modalities
from trivium.stages.parts.documents import MEASURED, mixture_references
from trivium.stages.parts.inheritance import held_out_by, trained_on
from trivium.stages.parts.model_folders import ModelFolder, folder_of, write_model
from trivium.stages.parts.paired import (
    Spent,
    bits_per_byte,
    changes,
    halves,
    in_words,
    measured_documents,
    spent,
)
from trivium.stages.parts.stage import Product, Reference, Stage, Work

Method = Literal["mean", "slerp", "tasks", "ties", "dare", "greedy", "ema"]
FROM_BASE = ("tasks", "ties", "dare")
TAKERS: dict[str, tuple[str, ...]] = {
    "weights": ("mean", "tasks"),
    "share": ("slerp",),
    "base": FROM_BASE,
    "density": ("ties", "dare"),
    "scale": FROM_BASE,
    "decay": ("ema",),
}
DEFAULTS = {"share": 0.5, "density": 0.5, "scale": 1.0, "decay": 0.5}


class Merge(Stage):
    """Merge the models in `of`; `base` is what task vectors are counted from, `data` what is measured."""

    kind: Literal["merge"]
    """Merge models of one architecture."""
    version: ClassVar[int] = 4
    produces: ClassVar[Product] = "model"

    of: list[str] = Field(min_length=1)
    """The models to merge."""
    method: Method = "mean"
    """How they are merged."""
    weights: list[float] | None = None
    """Shares for `mean`, scales for `tasks` (below zero to forget)."""
    share: float | None = Field(default=None, ge=0, le=1)
    """How far `slerp` goes from the first model to the second; half way if not said."""
    base: str | None = None
    """The model that task vectors are taken from."""
    density: float | None = Field(default=None, gt=0, le=1)
    """The share of a task vector's entries that `ties` and `dare` keep; half if not said."""
    scale: float | None = None
    """What the task vectors are multiplied by; 1 if not said."""
    decay: float | None = Field(default=None, gt=0, lt=1)
    """How much of the older average `ema` keeps at each further checkpoint in `of`; half if not said."""
    data: Mixture | None = None
    """What is measured; the text that the ingredients held out, if not said."""
    tokens: Count = 32768
    """On how many tokens the result is measured."""
    context: Count | None = None
    """The length of the sequences it is measured on."""

    @model_validator(mode="after")
    def methods_take_their_own(self) -> Self:
        """Refuse what a method would not use, and fill in what it does."""
        for name, takers in TAKERS.items():
            if getattr(self, name) is not None and self.method not in takers:
                raise ValueError(f"`{self.method}` takes no `{name}`; leave it out")
            if name in DEFAULTS and self.method in takers and getattr(self, name) is None:
                setattr(self, name, DEFAULTS[name])
        if self.method in FROM_BASE and self.base is None:
            raise ValueError(f"`{self.method}` counts from a common `base`; name it")
        if self.method == "slerp" and len(self.of) != 2:
            raise ValueError(f"slerp lies between 2 models, and `of` names {len(self.of)}")
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError(f"{len(self.of)} models need as many `weights`")
        if self.weights is not None and self.scale not in (None, 1.0):
            raise ValueError("`weights` are the scales already; leave `scale` out")
        return self

    def examines(self) -> Examined | None:
        """What is held out of the text that the result is measured on."""
        return None if self.data is None else held_out_of(self.data.values())

    def references(self) -> list[Reference]:
        found = [Reference("of", name, ("model",)) for name in self.of]
        if self.base is not None:
            found.append(Reference("base", self.base, ("model",)))
        if self.data is not None:
            found += mixture_references(self.data, by_length=True, without=MEASURED)
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """The size of the first ingredient."""
        first = inputs.get(self.of[0])
        known = first if isinstance(first, Mapping) else {}
        return {key: known[key] for key in ("parameters", "vocabulary") if key in known}

    def run(self, work: Work) -> dict[str, Any]:
        """Merge, measure the soup and every ingredient, and leave a Hugging Face folder."""
        folders = [folder_of(work, name) for name in self.of]
        tokenizer = folders[0].tokenizer
        for name, folder in zip(self.of, folders, strict=True):
            if folder.tokenizer.fingerprint != tokenizer.fingerprint:
                raise TriviumError(f"{work.stage}: {name} and {self.of[0]} do not share a tokenizer.")
        apart = [self.base] if self.base is not None else []
        configs = [one.config for one in [*folders, *(folder_of(work, name) for name in apart)]]
        soups.check_one_shape(configs, [*self.of, *apart])
        rows = self._rows(work, folders)
        model = folders[0].load(torch.float32)
        ingredients = [_weights(folder) for folder in folders]
        soups.check_alike(ingredients, self.of)

        def judged(weights: soups.Weights) -> Spent:
            model.load_state_dict(dict(weights))
            return spent(model, rows)

        found = {name: judged(weights) for name, weights in zip(self.of, ingredients, strict=True)}
        chosen = self.of
        if self.method == "greedy":
            # Chosen by every other document and reported on the rest: what chose would flatter the choice.
            choosing = [_mean(halves(found[name])[0]) for name in self.of]
            order = sorted(range(len(self.of)), key=choosing.__getitem__)
            kept, best = order[:1], choosing[order[0]]
            for place in order[1:]:
                tried = _mean(halves(judged(soups.mean([ingredients[one] for one in [*kept, place]])))[0])
                if tried < best:
                    kept, best = [*kept, place], tried
            chosen = [self.of[place] for place in kept]
            soup = soups.mean([ingredients[place] for place in kept])
        else:
            soup = self._merged(work, ingredients)
        found["the merge"] = judged(soup)
        if self.method == "greedy":
            found = {name: halves(one)[1] for name, one in found.items()}
        table = {name: bits_per_byte(one) for name, one in found.items()}
        for name, measured in table.items():
            for source, bits in measured.items():
                work.say(f"{name}: {bits:.4f} bits per byte on {source}")
        against = changes({name: (found[name], found["the merge"]) for name in self.of})
        for name, one in against.items():
            work.say(f"the merge against {name}, in bits per byte: {in_words(one)}")
        write_model(work, model, tokenizer)
        return {
            "method": self.method,
            "of": list(chosen),
            "bits_per_byte": table,
            "against": against,
            "below_mean": -fmean(against[name]["value"] for name in self.of),
        }

    def _rows(self, work: Work, folders: Sequence[ModelFolder]) -> dict[str, list[PackedSequence]]:
        """The text on which the soup is shown beside its ingredients, none of which learnt it."""
        mixture, places = self.data, [folder.path for folder in folders]
        if mixture is None:
            mixture, found = held_out_by(work.stage, dict(zip(self.of, places, strict=True)))
            work = replace(work, inputs={**work.inputs, **found})
        learnt = trained_on(places)
        context = self.context or min(512, folders[0].config.reach)
        rows = Door(work, folders[0].tokenizer).validation_rows(
            mixture, context, self.tokens, learnt=learnt, required=list(self.data or ())
        )
        if not rows:
            raise TriviumError(f"{work.stage}: the ingredients held nothing out; name text as `data`.")
        for name, held in rows.items():
            if self.method == "greedy" and len(measured_documents(held)) < 4:
                raise TriviumError(
                    f"{work.stage}: a greedy merge is chosen on half of what is held out of `{name}` and "
                    "reported on the rest; with fewer than 4 documents raise its `validation`."
                )
        return rows

    def _merged(self, work: Work, ingredients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.method == "mean":
            return soups.mean(ingredients, self.weights)
        if self.method == "slerp":
            assert self.share is not None
            return soups.slerp(ingredients[0], ingredients[1], self.share)
        if self.method == "ema":
            assert self.decay is not None
            last = len(ingredients) - 1
            shares = [
                self.decay ** (last - place) * (1.0 if place == 0 else 1 - self.decay)
                for place in range(last + 1)
            ]
            return soups.mean(ingredients, shares)
        assert self.base is not None
        assert self.scale is not None
        base = _weights(folder_of(work, self.base))
        soups.check_alike([base, ingredients[0]], [self.base, self.of[0]])
        if self.method == "tasks":
            scales = self.weights or [self.scale] * len(ingredients)
            return soups.add_task_vectors(base, soups.task_vectors(base, ingredients), scales)
        assert self.density is not None
        if self.method == "ties":
            return soups.ties(base, ingredients, density=self.density, scale=self.scale)
        return soups.dare(base, ingredients, density=self.density, scale=self.scale, seed=work.seed)


def _weights(folder: ModelFolder) -> dict[str, Tensor]:
    """The tensors of a model, under the names it has here."""
    model = folder.load(torch.float32)
    refuse_modalities(model, str(folder.path), "merge")
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _mean(found: Spent) -> float:
    return fmean(bits_per_byte(found).values())
