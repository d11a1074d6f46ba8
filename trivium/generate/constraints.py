"""Answers that must follow a JSON schema or a regular expression; the grammar work is llguidance's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trivium.generate.grammars import (
    Form,
    form_of,
    matcher_of,
    problem_of,
    refusal,
    vocabulary_of,
)
from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from trivium.generate.sampling import Sampling
    from trivium.tokens.tokenizer import Tokenizer


class Constraint:
    """How far one row has come in its form."""

    def __init__(self, matcher: Any, seconds: float | None = None) -> None:
        """`seconds`: of processor time that following the form may take in all."""
        self.matcher, self.seconds, self.spent = matcher, seconds, 0.0

    def advance(self, token: int) -> bool:
        """Take a token in; true when the form admits nothing but the end after it."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())

    def mask(self, address: int, size: int) -> None:
        """Write which tokens may follow, one bit each, to an address in memory."""
        began = time.thread_time()
        self.matcher.unsafe_compute_mask_ptr(address, size)
        self.spent += time.thread_time() - began
        if self.seconds is not None and self.spent > self.seconds:
            raise TriviumError(
                f"sampling: following the form of this answer takes more than {self.seconds:g} s: make the "
                "json_schema or regex simpler."
            )

    @property
    def broken(self) -> bool:
        """Whether the form could not be followed to here, as when its grammar became too large."""
        return bool(self.matcher.is_error())

    def fork(self) -> Constraint:
        """A second row at the same place of the same form."""
        return Constraint(self.matcher.deep_copy(), self.seconds)


class Grammars:
    """Turns forms into constraints over the tokens of one model."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer, self.size = tokenizer, vocabulary
        self._vocabulary: Any = None

    @property
    def tokenizer(self) -> str:
        """The tokenizer as `tokenizer.json` holds it."""
        return self._tokenizer.backend.to_str()

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        return sorted(one for one in self._tokenizer.stop_ids if one < self.size)

    def prepare(self) -> None:
        """Make ready what all forms share, which holds up every thread of the process."""
        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self.tokenizer, self.size, self.ends)

    def constraint(self, sampling: Sampling) -> Constraint | None:
        """The form a request asked for, or None."""
        form = form_of(sampling.json_schema, sampling.regex)
        return None if form is None else self.compiled(form)

    def compiled(self, form: Form, seconds: float | None = None) -> Constraint:
        """A constraint at the beginning of a form; `seconds` is what following it may take."""
        self.prepare()
        try:
            constraint = Constraint(matcher_of(form, self._vocabulary), seconds)
        except ValueError as error:
            raise refusal(form, str(error)) from None
        if problem := problem_of(constraint.matcher):
            raise refusal(form, problem)
        return constraint


def allowed_tokens(
    constraints: Sequence[Constraint | None], vocabulary: int, device: torch.device | str
) -> Tensor:
    """Which tokens each row may say next, [N, V]; rows without a grammar may say anything."""
    words = (vocabulary + 31) // 32
    bits = torch.full((len(constraints), words), -1, dtype=torch.int32)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            constraint.mask(bits[row].data_ptr(), words * 4)
    places = torch.arange(32, dtype=torch.int32)
    unpacked = (bits[:, :, None] >> places) & 1
    return unpacked.view(len(constraints), words * 32)[:, :vocabulary].bool().to(device)
