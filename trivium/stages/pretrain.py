"""Pre-training: a new model learns to predict the next token of a corpus."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from trivium.data.door import Door
from trivium.data.settings import Mixture
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count, Number
from trivium.kit.processes import world
from trivium.kit.settings import Settings
from trivium.learn.optimisers import LearningRates
from trivium.model.initialise import empty_model, initialise, new_model
from trivium.model.preset import GROUPS, Preset, preset
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import planned_vocabulary
from trivium.stages.parts.growing import Growing
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import Opened, TrainingStage
from trivium.tokens.tokenizer import Tokenizer


class Architecture(Settings):
    """`depth` sets a whole model; every value that follows from it can be given instead."""

    family: Literal["qwen3", "llama", "gpt2"] = "qwen3"
    """Layers of llama's shape can do without positions; GPT-2's learns a table of them."""
    depth: int = Field(default=4, ge=1)
    """The number of layers, which sets every other value."""
    layers: int | None = Field(default=None, ge=1)
    """The number of layers, where it is not the depth."""
    width: Count | None = Field(default=None, ge=1)
    """The width of the residual stream."""
    heads: int | None = Field(default=None, ge=1)
    """The number of attention heads."""
    key_value_heads: int | None = Field(default=None, ge=1)
    """The number of key-value heads (GQA)."""
    head_width: int | None = Field(default=None, ge=1)
    """The width of a head."""
    inner_width: Count | None = Field(default=None, ge=1)
    """The width of the feed-forward layer."""
    tied: bool | None = None
    """Whether embedding and head share their weights."""
    rope_theta: Number | None = Field(default=None, gt=0)
    """The RoPE base."""


class Pretrain(Growing, TrainingStage):
    """Train a model from random weights on `data`."""

    kind: Literal["pretrain"]
    """Train a model from random weights."""
    version: ClassVar[int] = 1
    trains_on: ClassVar[Literal["documents", "examples"] | None] = "documents"
    watches_model: ClassVar[bool] = False
    unused: ClassVar[Mapping[str, str]] = {
        "adapter": "a new model has nothing to lay an adapter on; train all of its weights",
        "optimiser_state": "a new model has no parent whose optimiser state it could keep; leave it out",
    }

    data: Mixture
    """The mixture to learn from."""
    tokenizer: str | None = None
    """The tokenizer, where no corpus in `data` brings one."""
    model: Architecture = Architecture()
    """The architecture."""
    context: Count = Field(default=512, ge=2)
    """The length of the sequences in tokens."""

    def references(self) -> list[Reference]:
        """`data` names corpora or outside data; `tokenizer` is needed only where no corpus brings one."""
        named = (
            [] if self.tokenizer is None else [Reference("tokenizer", self.tokenizer, ("tokenizer", "model"))]
        )
        return [*super().references(), *named]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What follows from the depth, and what training it costs."""
        known = planned_vocabulary(inputs, [*(source.path for source in self.data.values()), self.tokenizer])
        if known is None:
            return {}
        derived = self._preset(known)
        batch = self._batch(derived)
        tokens = self.tokens or (self.steps * batch if self.steps else None)
        if tokens is None and self.epochs is None:
            tokens = derived.values["token_budget"]
        shape = ("layers", "width", "heads", "parameters")
        numbers = {name: derived.values[name] for name in shape} | {"batch": batch}
        numbers |= self.grown_numbers(derived.config)
        if tokens is not None:
            cost = self.grown_flops(derived.config, tokens, batch, self.context)
            numbers |= {"tokens": tokens, "steps": max(1, round(tokens / batch)), "flops": cost}
        rates = self._rates(derived)
        if self.optimiser == "adamw":
            return {**numbers, "AdamW learning rate": rates.matrices}
        others = {f"AdamW learning rate of {name}": getattr(rates, name) for name in GROUPS[1:]}
        return {**numbers, "Muon learning rate": rates.matrices, **others}

    def read(self, opened: Opened[Preset]) -> None:
        """The tokenizer decides the preset, and the preset the batch and the token budget."""
        opened.tokenizer = Tokenizer.load(self._tokenizer_folder(opened.work))
        opened.data = self._preset(opened.tokenizer.vocabulary_size)
        batch, budget = self._batch(opened.data), {"tokens": opened.data.values["token_budget"]}
        ingredients = Door(opened.work, opened.tokenizer).ingredients(self.data)
        self.pack(opened, ingredients, [self.context], batch=batch, lasting=budget)

    def load(self, opened: Opened[Preset]) -> Transformer:
        """A new model; the same weights on every machine, drawn on the processor from the seed alone."""
        work, tokenizer, derived = opened.work, opened.tokenizer, opened.data
        values = {**derived.values, "batch_tokens": self._batch(derived)}
        for name in ("parameters", "width", "layers", "heads", "token_budget", "batch_tokens"):
            work.change(name, "preset", values[name])
        extra = {"eos_token_id": tokenizer.end_of_text_id, "pad_token_id": tokenizer.pad_id}
        config = derived.config.changed(extra=extra)
        if world().size == 1:
            return new_model(config, seed=work.seed, device=opened.device)
        # Made without numbers, so that no process ever holds more of them than it keeps.
        opened.fill = lambda model, put: initialise(model, work.seed, put)
        return empty_model(config)

    def findings(self, opened: Opened[Preset]) -> dict[str, Any]:
        """The size of the model, and what became of the data."""
        return {"parameters": opened.data.values["parameters"], **super().findings(opened)}

    def _batch(self, derived: Preset) -> int:
        """The tokens of a batch: whole rows, and at least one."""
        tokens = self.batch or derived.values["batch_tokens"]
        return int(max(1, tokens // self.context) * self.context)

    def _tokenizer_folder(self, work: Work) -> Path:
        if self.tokenizer is not None:
            return work.path(self.tokenizer)
        for name in (source.path for source in self.data.values()):
            if (work.path(name) / "tokenizer").is_dir():
                return work.path(name) / "tokenizer"
        raise TriviumError(
            f"{work.stage}: no source in `data` is a corpus that brings a tokenizer; name one in `tokenizer`."
        )

    def _preset(self, vocabulary: int) -> Preset:
        settings = self.model.model_dump()
        depth = settings.pop("depth")
        # How long the training is decides the batch that suits it.
        return preset(depth, vocabulary, self.context, token_budget=self.tokens, **settings)

    def learning_rates(self, opened: Opened[Preset]) -> LearningRates:
        """The preset's rates, or the number a person gave for the matrices and the others in proportion."""
        return self._rates(opened.data)

    def _rates(self, derived: Preset) -> LearningRates:
        start = self.learning_rate.start
        if start == "parent":
            raise TriviumError("learning_rate: a new model has no parent; give a number or leave it out.")
        decay = derived.values["weight_decay"] if self.weight_decay is None else self.weight_decay
        if self.optimiser == "adamw":
            # AdamW moves every weight by about its rate, so one rate fits all and shrinks with the width.
            rate = 1e-3 * (derived.config.width / 768) ** -0.5 if start == "preset" else float(start)
            return LearningRates(rate, rate, rate, rate, decay)
        rates = derived.learning_rates
        scale = 1.0 if start == "preset" else float(start) / rates["matrices"]
        return LearningRates(**{name: rate * scale for name, rate in rates.items()}, weight_decay=decay)  # type: ignore[arg-type]
