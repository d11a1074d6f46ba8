"""Forms of answers, JSON schemas and regular expressions, as llguidance follows them; without torch.

How long a grammar takes to compile is not bounded by llguidance: a schema of 40 characters such as
`{"type": "integer", "multipleOf": 999983}` takes minutes. What it does for one token is, by `_limits`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from trivium.kit.errors import TriviumError

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
    try:
        import llguidance
    except ImportError:
        raise TriviumError(
            "sampling: json_schema and regex need the package llguidance; "
            "install Trivium's extra 'structured'."
        ) from None
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
