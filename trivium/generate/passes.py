"""How the engine runs a model: by a plan where one covers it, else through the modules themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from trivium.generate.attending import CacheContext
from trivium.generate.exactness import BIT_EXACT, CLOSE, Exactness, of_model, of_modules
from trivium.generate.matrices import covers
from trivium.generate.plan import Plan
from trivium.generate.rows_at_once import InVerifiedSizes
from trivium.kit.errors import TriviumError
from trivium.model.quantize import rounds_rows
from trivium.model.transformer import Transformer


class Passes(Protocol):
    """What the engine needs of a model."""

    exactness: Exactness
    """What was found of the numbers that these passes compute on this machine."""

    def forward(self, tokens: Tensor, context: CacheContext) -> Tensor:
        """Hidden states after the last norm, [N, width]."""
        ...

    def fill(self, tokens: Tensor, context: CacheContext) -> None:
        """Cache the tokens' keys and values and compute no more than that takes."""
        ...

    def step(self, tokens: Tensor, context: CacheContext) -> Tensor:
        """Scores over the vocabulary after each token, [N, V]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary of hidden states."""
        ...

    def turn_keys(self, keys: Tensor, layer: int, places: int) -> Tensor:
        """Cached keys of one layer, turned as if they stood further back."""
        ...

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        ...

    def refresh_if_changed(self) -> None:
        """Take over the weights if an optimiser has stepped since."""
        ...


class Modules:
    """The model as it is."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.exactness = of_model(model, of_modules(model))
        rounds = any(isinstance(one, nn.Linear) and rounds_rows(one.weight) for one in model.modules())
        if self.exactness.promise == BIT_EXACT and (model.config.experts is not None or rounds):
            # the sum over a token's experts, and products of rows in whole numbers, are not probed
            self.exactness = replace(self.exactness, promise=CLOSE)

    def _in_sizes(self) -> AbstractContextManager:
        rows = self.exactness.rows
        return InVerifiedSizes(rows) if rows.sizes else nullcontext()

    def forward(self, tokens: Tensor, context: CacheContext) -> Tensor:
        with self._in_sizes():
            return self.model(tokens, context)

    def fill(self, tokens: Tensor, context: CacheContext) -> None:
        self.forward(tokens, context)

    def step(self, tokens: Tensor, context: CacheContext) -> Tensor:
        return self.logits(self.forward(tokens, context))

    def logits(self, hidden: Tensor) -> Tensor:
        with self._in_sizes():
            return self.model.logits(hidden)

    def turn_keys(self, keys: Tensor, layer: int, places: int) -> Tensor:
        raise TriviumError("this model's positions cannot slide: choose another way to fit the conversation.")

    def refresh(self) -> None:
        """Nothing is copied, so nothing is stale."""

    def refresh_if_changed(self) -> None:
        """Nothing is copied, so nothing is stale."""


def passes_of(model: Transformer, rows: int) -> Passes:
    """The fastest way to run this model that computes the same for up to this many rows at once."""
    return Plan(model, alone=rows == 1) if covers(model) else Modules(model)
