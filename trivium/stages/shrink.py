"""Shrinking: a smaller model from a large one, to start a student from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from trivium.data.door import Door
from trivium.data.settings import Mixture
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.model.config import ModelConfig
from trivium.model.flops import parameter_count
from trivium.model.initialise import build
from trivium.model.modalities.folder import refuse_modalities
from trivium.model.shrink import importance, kept_layers, narrowed, narrowed_config, without_layers
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import MEASURED, mixture_references
from trivium.stages.parts.model_folders import folder_of, write_model
from trivium.stages.parts.shapes import planned_shape, shape_of, size_of
from trivium.stages.parts.stage import Product, Reference, Stage, Work
from trivium.tokens.tokenizer import Tokenizer


class Shrink(Stage):
    """Drop layers, and prune width, heads and inner units by their importance."""

    kind: Literal["shrink"]
    """Make a model smaller."""
    version: ClassVar[int] = 2
    produces: ClassVar[Product] = "model"
    unaffecting: ClassVar[frozenset[str]] = frozenset({"seed"})

    start: str = Field(alias="from")
    """The model to shrink."""
    layers: int | None = Field(default=None, ge=1)
    """The number of layers that stay."""
    layers_by: Literal["even", "influence"] = "even"
    """Which layers stay: evenly spread ones, or those that change the residual stream most on `data`."""
    width: Count | None = Field(default=None, ge=1)
    """The width of the residual stream that stays."""
    key_value_heads: int | None = Field(default=None, ge=1)
    """The number of key-value heads that stay, each with the heads that share it."""
    inner_width: Count | None = Field(default=None, ge=1)
    """The width of the inner layer that stays."""
    data: Mixture | None = None
    """The text on whose held-out part importance is measured."""
    context: Count = Field(default=256, ge=2)
    """The length of the sequences that importance is measured on."""
    tokens: Count = Field(default=8192, ge=1)
    """On how many tokens importance is measured."""

    @model_validator(mode="after")
    def importance_is_measured_on_text(self) -> Self:
        """Refuse to shrink nothing, and to prune by importance without text."""
        if not any((self.layers, self.width, self.key_value_heads, self.inner_width)):
            raise ValueError("nothing shrinks: give `layers`, `width`, `key_value_heads` or `inner_width`")
        if self.layers_by == "influence" and self.layers is None:
            raise ValueError("`layers_by` says which layers stay, and no number of `layers` is given")
        if self._measures and self.data is None:
            raise ValueError("importance is measured on text: name some as `data`")
        if self.data is not None and not self._measures:
            raise ValueError("nothing here is chosen by importance, so `data` changes nothing; leave it out")
        return self

    @property
    def _measures(self) -> bool:
        pruned = (self.width, self.key_value_heads, self.inner_width)
        return self.layers_by == "influence" or any(one is not None for one in pruned)

    def references(self) -> list[Reference]:
        found = [Reference("from", self.start, ("model",))]
        if self.data is not None:
            found += mixture_references(self.data, by_length=True, without=MEASURED)
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        config = planned_shape(inputs.get(self.start))
        if config is None:
            return {}
        if self.layers is not None:
            config, _ = without_layers(config, {}, kept_layers(config, self.layers))
        smaller = self._narrowed(config)
        return {
            **size_of(smaller),
            "layers": smaller.layers,
            "width": smaller.width,
            "model": shape_of(smaller),
        }

    def run(self, work: Work) -> dict[str, Any]:
        """Measure importance where it decides, prune, and leave a Hugging Face folder."""
        start = folder_of(work, self.start)
        tokenizer, model = start.tokenizer, start.load(torch.float32)
        refuse_modalities(model, work.stage, "shrink")
        texts = [] if self.data is None else self._texts(work, tokenizer, model)
        scores = importance(model, texts) if texts else None
        config = model.config
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        if any((self.width, self.key_value_heads, self.inner_width)):
            assert scores is not None
            config, weights = narrowed(config, weights, scores, self._narrowed(config))
        kept = list(range(config.layers))
        if self.layers is not None:
            kept = kept_layers(config, self.layers, scores if self.layers_by == "influence" else None)
            config, weights = without_layers(config, weights, kept)
        smaller = build(config, device=str(model.device))
        smaller.load_state_dict(weights)
        for name in ("layers", "width", "heads", "key_value_heads", "inner_width"):
            before, after = getattr(model.config, name), getattr(config, name)
            if before != after:
                work.change(name.replace("_", "-"), before, after)
        sizes = parameter_count(model.config), parameter_count(config)
        work.change("parameters", *sizes)
        work.change("optimiser state", "the parent's", "reset")
        write_model(work, smaller, tokenizer)
        return {
            "parameters": sizes[1],
            "parameters_before": sizes[0],
            "kept_layers": kept,
            "measured_sequences": len(texts),
            "measured_tokens": sum(map(len, texts)),
        }

    def _narrowed(self, config: ModelConfig) -> ModelConfig:
        return narrowed_config(
            config, width=self.width, key_value_heads=self.key_value_heads, inner_width=self.inner_width
        )

    def _texts(self, work: Work, tokenizer: Tokenizer, model: Transformer) -> list[list[int]]:
        """The token ids on which importance is measured."""
        assert self.data is not None
        context = min(self.context, model.config.reach)
        found = Door(work, tokenizer).validation_rows(self.data, context, self.tokens)
        texts = [list(row.tokens) for rows in found.values() for row in rows]
        if not texts:
            raise TriviumError(
                f"{work.stage}: `data` has no held-out part to measure on; give a source `validation: 0.1`."
            )
        return texts
