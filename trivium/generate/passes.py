"""How the engine runs a model: by a plan where one covers it, else through the modules themselves."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from trivium.generate.attending import CacheContext
from trivium.generate.matrices import covers
from trivium.generate.plan import LEAST_ROWS, Plan
from trivium.kit.errors import TriviumError
from trivium.model.transformer import Transformer


class Passes(Protocol):
    """What the engine needs of a model."""

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

    def forward(self, tokens: Tensor, context: CacheContext) -> Tensor:
        return self.model(tokens, context)

    def fill(self, tokens: Tensor, context: CacheContext) -> None:
        self.model(tokens, context)

    def step(self, tokens: Tensor, context: CacheContext) -> Tensor:
        return self.model.logits(self.model(tokens, context))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def turn_keys(self, keys: Tensor, layer: int, places: int) -> Tensor:
        raise TriviumError("this model's positions cannot slide: choose another way to fit the conversation.")

    def refresh(self) -> None:
        """Nothing is copied, so nothing is stale."""

    def refresh_if_changed(self) -> None:
        """Nothing is copied, so nothing is stale."""


def passes_of(model: Transformer, rows: int) -> Passes:
    """The fastest way to run this model that computes the same for up to this many rows at once."""
    return Plan(model, least_rows=min(rows, LEAST_ROWS)) if covers(model) else Modules(model)
