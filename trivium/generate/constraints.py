"""Answers that must follow a JSON schema or a regular expression; the grammar work is llguidance's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer


class Constraint:
    """How far one row has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def advance(self, token: int) -> bool:
        """Take a token in; true when the grammar admits nothing but the end after it."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())

    @property
    def broken(self) -> bool:
        """Whether the grammar could not be followed to here, as when it became too large."""
        return bool(self.matcher.is_error())

    def fork(self) -> Constraint:
        """A second row at the same place of the same grammar."""
        return Constraint(self.matcher.deep_copy())


class Grammars:
    """Turns a request's schema or regular expression into constraints over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._compiled: Any = None

    def constraint(self, sampling: Sampling) -> Constraint | None:
        """The grammar a request asked for, or None."""
        if sampling.json_schema is None and sampling.regex is None:
            return None
        try:
            import llguidance
        except ImportError:
            raise TriviumError(
                "sampling: json_schema and regex need the package llguidance; "
                "install Trivium's extra 'structured'."
            ) from None
        matcher_kind = llguidance.LLMatcher
        if sampling.json_schema is not None:
            # free white space would let a weak model type blanks for ever
            tight: Any = {"whitespace_flexible": False}
            text = json.dumps(dict(sampling.json_schema))
            try:
                grammar = matcher_kind.grammar_from_json_schema(text, overrides=tight)
            except ValueError as error:
                raise TriviumError(f"sampling: the json_schema cannot be followed: {error}") from None
        else:
            assert sampling.regex is not None
            grammar = matcher_kind.grammar_from_regex(sampling.regex)
        constraint = Constraint(matcher_kind(self._vocabulary_of(llguidance), grammar))
        problem = self._problem(constraint.fork())
        if problem:
            what = "regex" if sampling.regex is not None else "json_schema"
            raise TriviumError(f"sampling: the {what} cannot be followed: {problem}")
        return constraint

    def _problem(self, tried: Constraint) -> str:
        """Why not even a first token can be written; empty where one can."""
        # some grammars are found to be too large, or to admit no text, only when they are used
        first = allowed_tokens([tried], self._vocabulary, "cpu")[0].int().argmax()
        tried.advance(int(first))
        problem = " ".join(tried.matcher.get_error().partition("<state>")[0].split())
        return "no text has this form" if problem.startswith("NoExtension") else problem[:300]

    def _vocabulary_of(self, llguidance: Any) -> Any:
        if self._compiled is None:
            ends = sorted(self._tokenizer.stop_ids)
            text = self._tokenizer.backend.to_str()
            self._compiled = llguidance.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=ends)
        return self._compiled


def allowed_tokens(
    constraints: Sequence[Constraint | None], vocabulary: int, device: torch.device | str
) -> Tensor:
    """Which tokens each row may say next, [N, V]; rows without a grammar may say anything."""
    words = (vocabulary + 31) // 32
    bits = torch.full((len(constraints), words), -1, dtype=torch.int32)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            constraint.matcher.unsafe_compute_mask_ptr(bits[row].data_ptr(), words * 4)
    places = torch.arange(32, dtype=torch.int32)
    unpacked = (bits[:, :, None] >> places) & 1
    return unpacked.view(len(constraints), words * 32)[:, :vocabulary].bool().to(device)
