"""Souping: one model made from several that share an ancestor, shown beside its ingredients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder
from trivium.kit.numbers import Count
from trivium.learn.validation import measure
from trivium.model import merge as soups
from trivium.model.folder import load_model, save_model
from trivium.model.hub import resolve
from trivium.model.transformer import Transformer
from trivium.stages.mixtures import Mixture, mixture_references, unseen_rows
from trivium.stages.stage import Product, Reference, Stage, Work
from trivium.tokens.tokenizer import Tokenizer

Method = Literal["mean", "slerp", "tasks", "ties", "dare", "greedy", "ema"]
FROM_BASE = ("tasks", "ties", "dare")


class Merge(Stage):
    """Merge the models in `of`; `base` is what task vectors are counted from, `data` what is measured."""

    kind: Literal["merge"]
    version: ClassVar[int] = 2
    produces: ClassVar[Product] = "model"

    of: list[str] = Field(min_length=1)
    method: Method = "mean"
    weights: list[float] | None = None
    """Shares for `mean`, scales for `tasks` (below zero to forget); `ema` and the others take none."""
    share: float = Field(default=0.5, ge=0, le=1)
    """How far `slerp` goes from the first model to the second."""
    base: str | None = None
    density: float = Field(default=0.5, gt=0, le=1)
    scale: float = 1.0
    decay: float = Field(default=0.5, gt=0, lt=1)
    """How much of the older average `ema` keeps at each further checkpoint in `of`."""
    data: Mixture | None = None
    tokens: Count = 32768
    context: Count | None = None

    def references(self) -> list[Reference]:
        """The ingredients, their ancestor, and what they are measured on."""
        found = [Reference("of", name, ("model",)) for name in self.of]
        if self.base is not None:
            found.append(Reference("base", self.base, ("model",)))
        return found + (mixture_references(self.data) if self.data is not None else [])

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """The size of the first ingredient."""
        first = inputs.get(self.of[0])
        known = first if isinstance(first, Mapping) else {}
        return {key: known[key] for key in ("parameters", "vocabulary") if key in known}

    def run(self, work: Work) -> dict[str, Any]:
        """Merge, measure the soup and every ingredient, and leave a Hugging Face folder."""
        self._check(work)
        folders = [resolve(str(work.path(name))) for name in self.of]
        tokenizer = Tokenizer.load(folders[0])
        for name, folder in zip(self.of, folders, strict=True):
            if Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
                raise TriviumError(f"{work.stage}: {name} and {self.of[0]} do not share a tokenizer.")
        model = load_model(folders[0], dtype=torch.float32, device=machine.device())
        ingredients = [_weights(folder) for folder in folders]
        soups.check_alike(ingredients, self.of)
        rows = {}
        if self.data is not None:
            context = self.context or min(512, model.config.context)
            rows = unseen_rows(work, self.data, tokenizer, context, self.tokens)

        def judged(weights: soups.Weights) -> dict[str, float]:
            model.load_state_dict(dict(weights))
            return {name: measure(model, held).bits_per_byte for name, held in rows.items()}

        table = {name: judged(weights) for name, weights in zip(self.of, ingredients, strict=True)}
        chosen = self.of
        if self.method == "greedy":
            order = sorted(range(len(self.of)), key=lambda place: _mean(table[self.of[place]]))
            kept = order[:1]
            best = _mean(table[self.of[kept[0]]])
            for place in order[1:]:
                tried = _mean(judged(soups.mean([ingredients[one] for one in [*kept, place]])))
                if tried < best:
                    kept, best = [*kept, place], tried
            chosen = [self.of[place] for place in kept]
            soup = soups.mean([ingredients[place] for place in kept])
        else:
            soup = self._merged(work, ingredients)
        table["the soup"] = judged(soup)
        for name, found in table.items():
            for source, bits in found.items():
                work.say(f"{name}: {bits:.4f} bits per byte on {source}")
        self._save(work, model, tokenizer)
        return {"method": self.method, "of": list(chosen), "bits_per_byte": table}

    def _check(self, work: Work) -> None:
        if self.method in FROM_BASE and self.base is None:
            raise TriviumError(f"{work.stage}: {self.method} counts from a common `base`; name it.")
        if self.method == "greedy" and self.data is None:
            raise TriviumError(f"{work.stage}: a greedy soup is chosen by measuring; name `data`.")
        if self.method == "slerp" and len(self.of) != 2:
            raise TriviumError(f"{work.stage}: slerp lies between 2 models, and `of` names {len(self.of)}.")
        if self.weights is not None:
            if self.method not in ("mean", "tasks"):
                raise TriviumError(f"{work.stage}: {self.method} takes no `weights`; leave them out.")
            if len(self.weights) != len(self.of):
                raise TriviumError(f"{work.stage}: {len(self.of)} models need as many `weights`.")

    def _merged(self, work: Work, ingredients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.method == "mean":
            return soups.mean(ingredients, self.weights)
        if self.method == "slerp":
            return soups.slerp(ingredients[0], ingredients[1], self.share)
        if self.method == "ema":
            last = len(ingredients) - 1
            shares = [
                self.decay ** (last - place) * (1.0 if place == 0 else 1 - self.decay)
                for place in range(last + 1)
            ]
            return soups.mean(ingredients, shares)
        assert self.base is not None
        base = _weights(resolve(str(work.path(self.base))))
        soups.check_alike([base, ingredients[0]], [self.base, self.of[0]])
        if self.method == "tasks":
            scales = self.weights or [self.scale] * len(ingredients)
            return soups.add_task_vectors(base, soups.task_vectors(base, ingredients), scales)
        if self.method == "ties":
            return soups.ties(base, ingredients, density=self.density, scale=self.scale)
        return soups.dare(base, ingredients, density=self.density, scale=self.scale, seed=work.seed)

    def _save(self, work: Work, model: Transformer, tokenizer: Tokenizer) -> None:
        generation = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        with whole_folder(work.output("model")) as folder:
            save_model(model, folder, generation=generation)
            tokenizer.save(folder)


def _weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model, under the names it has here."""
    model = load_model(folder, dtype=torch.float32, device=machine.device())
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _mean(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)
