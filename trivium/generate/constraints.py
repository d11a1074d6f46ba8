"""Completions that must follow a JSON schema or a regular expression, by llguidance; without torch.

How long a grammar takes to compile is not bounded by llguidance: a schema of 40 characters such as
`{"type": "integer", "multipleOf": 999983}` takes minutes. What it does for one token is, by `_limits`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trivium.kit.errors import TriviumError, needing

if TYPE_CHECKING:
    from trivium.generate.sampling import Sampling
    from trivium.tokens.tokenizer import Tokenizer


# A refusal names the reason; a grammar's own state may be as long as the grammar.
LONGEST_REASON = 300


class Form(NamedTuple):
    """What an answer must look like: the setting's name, `json_schema` or `regex`, and its text."""

    kind: str
    text: str


def form_of(json_schema: Any, regex: str | None) -> Form | None:
    """The form that settings ask for, or None."""
    if json_schema is not None:
        try:
            return Form("json_schema", json.dumps(dict(json_schema), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise TriviumError(
                f"sampling: the json_schema is not JSON: {str(error)[:LONGEST_REASON]}."
            ) from None
    return None if regex is None else Form("regex", regex)


def library() -> Any:
    """The package llguidance, or a sentence about how to get it."""
    with needing(
        "sampling: json_schema and regex need the package llguidance; install Trivium's extra 'structured'."
    ):
        import llguidance
    return llguidance


def vocabulary_of(tokenizer: str, size: int, ends: Sequence[int]) -> Any:
    """The tokens of a `tokenizer.json` in llguidance's form; making it takes a second per 50,000 of them."""
    return library().LLTokenizer(tokenizer, n_vocab=size, eos_token=list(ends))


def _limits() -> Any:
    # half of what llguidance allows for a token, so that it takes about ten milliseconds at most
    return library().LLParserLimits(
        step_lexer_fuel=100_000, step_max_items=25_000, max_lexer_states=50_000, verbose_errors=False
    )


def matcher_of(form: Form, vocabulary: Any) -> Any:
    """A matcher at the beginning of a form; that no text can have it, `problem_of` says."""
    kind = library().LLMatcher
    if form.kind == "json_schema":
        # free white space would let a weak model type blanks for ever
        tight: Any = {"whitespace_flexible": False}
        grammar = kind.grammar_from_json_schema(form.text, overrides=tight)
    else:
        grammar = kind.grammar_from_regex(form.text)
    return kind(vocabulary, grammar, log_level=0, limits=_limits())


def problem_of(matcher: Any) -> str:
    """Why not even a first token can be written in a form; empty where one can."""
    # some grammars are found to be too large, or to admit no text, only when they are used
    tried = matcher.deep_copy()
    mask = b"" if tried.is_error() else tried.compute_bitmask()
    first = next((8 * place + (byte & -byte).bit_length() - 1 for place, byte in enumerate(mask) if byte), 0)
    if not tried.is_stopped():
        tried.consume_token(first)
    problem = " ".join(tried.get_error().partition("<state>")[0].split())
    return "no text has this form" if problem.startswith("NoExtension") else problem[:LONGEST_REASON]


def refusal(form: Form, problem: str) -> TriviumError:
    """The sentence for a form that cannot be followed."""
    return TriviumError(f"sampling: the {form.kind} cannot be followed: {problem}")


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


def allowed_tokens(constraints: Sequence[Constraint | None], vocabulary: int) -> np.ndarray:
    """Which tokens may follow in each sequence, [N, V] of bool; any may where there is no constraint."""
    words = (vocabulary + 31) // 32
    bits = np.full((len(constraints), words), -1, dtype=np.int32)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            constraint.mask(bits[row].ctypes.data, words * 4)
    return np.unpackbits(bits.view(np.uint8), axis=1, count=vocabulary, bitorder="little").astype(bool)
