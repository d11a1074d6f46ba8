"""Drafts by heads on the model's own hidden state (`model.draft_heads`): no second model, no second cache.

The state from which a token was drawn is also the one from which the heads guess those after it. Like a draft
model they draw with the random numbers, the filters and the grammar with which the model will draw; what is
accepted is `speculation`'s to say.
"""

from __future__ import annotations

import weakref
from collections import abc
from collections.abc import Callable

import torch
from torch import Tensor

from trivium.generate.drafts import DraftedText
from trivium.generate.matrices import cache_dtype
from trivium.generate.sampling import Sampler
from trivium.generate.sequence import Sequence
from trivium.kit.errors import TriviumError
from trivium.model.draft_heads import DraftHeads
from trivium.model.transformer import Transformer


class HeadDrafter:
    """One token of a draft from each head."""

    def __init__(self, heads: DraftHeads, model: Transformer, logits: Callable[[Tensor], Tensor]) -> None:
        """`logits` are the model's own: hidden states [N, width] -> scores [N, V]."""
        if heads.width != model.config.width:
            raise TriviumError(
                f"the draft heads read states of width {heads.width}, and the model's have "
                f"{model.config.width}: take heads that were trained on this model."
            )
        weight = model.head_weight
        self._heads = heads.to(device=weight.device, dtype=cache_dtype(model, weight.dtype)).requires_grad_(
            False
        )
        self._logits, self.longest = logits, len(heads)
        self._states: weakref.WeakKeyDictionary[Sequence, Tensor] = weakref.WeakKeyDictionary()

    def observe(self, sequences: abc.Sequence[Sequence], hidden: Tensor) -> None:
        """The states from which the last token of each sequence was drawn, [sequences, width]."""
        for sequence, state in zip(sequences, hidden.clone(), strict=True):
            self._states[sequence] = state

    def propose(self, texts: abc.Sequence[DraftedText], sampler: Sampler) -> list[list[int]]:
        """What each head draws after the one before it."""
        drafts: list[list[int]] = [[] for _ in texts]
        ready = [row for row, text in enumerate(texts) if text.limit and text.sequence in self._states]
        if not ready:
            return drafts
        ahead = sampler.forked(ready)
        active = list(range(len(ready)))
        for head in range(self.longest):
            states = [self._states[texts[ready[one]].sequence] for one in active]
            logits = self._logits(self._heads(torch.stack(states), head)).float()
            chosen = ahead.choose_of(active, logits)
            going = []
            for one, token in zip(active, chosen.tokens.tolist(), strict=True):
                text, draft = texts[ready[one]], drafts[ready[one]]
                draft.append(token)
                constraint, state = ahead.constraints[one], text.sequence.state
                assert state is not None
                ends = token in state.stop_ids or (constraint is not None and constraint.advance(token))
                if len(draft) < text.limit and not ends:
                    going.append(one)
            active = going
            if not active:
                break
        return drafts

    def forget(self) -> None:
        """Drop all states."""
        self._states.clear()
