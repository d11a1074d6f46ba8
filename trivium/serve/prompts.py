"""From a request's words to the prompts and the sampling the engine understands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError

from trivium.generate.chat_fit import PARTS, Fitted, Summarise, fit_conversation, turns_of
from trivium.generate.sampling import Sampling
from trivium.serve.calls import (
    ANY_OBJECT,
    call_schema,
    forces_call,
    form_of_calls,
    offered_tools,
    opening_of_call,
)
from trivium.serve.failures import RequestRefused
from trivium.serve.limits import Limits
from trivium.serve.pictures import read_items, with_fetched
from trivium.serve.protocol import ChatBody, CompletionBody, EmbeddingBody, GenerationBody
from trivium.tokens.tokenizer import Tokenizer

# Of the context a conversation that is shortened leaves at least this part to an answer of no given length.
ANSWERS_PART = 4
SAID_ALIKE = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "regex",
)  # fmt: skip
"""What a body and `Sampling` call by the same name."""


def asked_length(body: GenerationBody, limits: Limits) -> int | None:
    """How many new tokens the body asks for, refused beyond the server's limit."""
    length, asked = body.max_tokens, "max_tokens"
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        length, asked = body.max_completion_tokens, "max_completion_tokens"
    if length is not None and length > limits.new_tokens:
        problem = f"{asked} is {length}, at most {limits.new_tokens} new tokens are served"
        raise RequestRefused(problem, parameter=asked, code="integer_above_max_value")
    return length


def sampling(
    body: GenerationBody,
    tokenizer: Tokenizer,
    limits: Limits,
    room: int,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Sampling:
    """What the body asks for, within the server's limits; `room` is what the context leaves.

    What it says nothing of is as the model's own `defaults` have it.
    """
    stops = body.stops
    if len(stops) > limits.stop_strings:
        problem = f"stop holds {len(stops)} strings, at most {limits.stop_strings} are served"
        raise RequestRefused(problem, parameter="stop", code="array_above_max_length")
    if any(not 1 <= len(stop) <= limits.stop_characters for stop in stops):
        problem = f"each stop string must have 1 to {limits.stop_characters} characters"
        raise RequestRefused(problem, parameter="stop", code="invalid_value")
    if body.n is not None and body.n > limits.samples:
        problem = f"n is {body.n}, at most {limits.samples} samples are served at once"
        raise RequestRefused(problem, parameter="n", code="integer_above_max_value")
    length = asked_length(body, limits) or min(room, limits.new_tokens)
    if body.min_tokens is not None and body.min_tokens > length:
        problem = (
            f"min_tokens is {body.min_tokens}, and the answer may have {length} tokens: raise max_tokens"
        )
        raise RequestRefused(problem, parameter="min_tokens", code="invalid_value")
    top = alternatives(body)
    if top is not None and top > limits.top_logprobs:
        problem = f"at most {limits.top_logprobs} alternatives per token are served"
        raise RequestRefused(problem, parameter="top_logprobs", code="integer_above_max_value")
    wanted = {name: getattr(body, name) for name in SAID_ALIKE}
    wanted |= {"min_new_tokens": body.min_tokens, "json_schema": _schema(body, tokenizer)}
    said = {name: value for name, value in wanted.items() if value is not None}
    chosen: dict[str, Any] = {**defaults, **said}
    if body.stop_token_ids:
        if max(body.stop_token_ids) >= tokenizer.vocabulary_size:
            problem = (
                f"stop_token_ids names the token {max(body.stop_token_ids)}; "
                f"token ids go from 0 to {tokenizer.vocabulary_size - 1}"
            )
            raise RequestRefused(problem, parameter="stop_token_ids", code="invalid_value")
        chosen["stop_ids"] = tuple(sorted({*tokenizer.stop_ids, *body.stop_token_ids}))
    return Sampling(
        max_new_tokens=length,
        stop=stops,
        logit_bias=_bias(body, tokenizer.vocabulary_size),
        # at least one, for then the engine tells the model's own probabilities and not the filtered ones
        top_logprobs=0 if top is None else max(top, 1),
        **chosen,
    )


def alternatives(body: GenerationBody) -> int | None:
    """How many alternatives the client wants to know per token; None when it wants no log-probabilities."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionBody) else None


def _schema(body: GenerationBody, tokenizer: Tokenizer) -> Mapping[str, Any] | None:
    if isinstance(body, ChatBody) and forces_call(body):
        return call_schema(body, form_of_calls(body, tokenizer))
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ANY_OBJECT
    assert form.json_schema is not None, "the protocol admits json_schema only with a schema"
    return form.json_schema.schema_


def _bias(body: GenerationBody, vocabulary: int) -> dict[int, float]:
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocabulary):
            problem = f"logit_bias names the token {token[:20]!r}; token ids go from 0 to {vocabulary - 1}"
            raise RequestRefused(problem, parameter="logit_bias", code="invalid_value")
        bias[int(token)] = float(value)
    return bias


def longest_prompt(tokenizer: Tokenizer, context: int) -> int:
    """More letters than any prompt that fits the context can have, so that longer ones need no tokenizing."""
    return 2 * context * int(tokenizer.byte_lengths().max())


def within_reach(messages: Sequence[Mapping[str, Any]], letters: int) -> list[Mapping[str, Any]]:
    """The conversation without those of its oldest turns that could not fit in any case."""
    _, turns = turns_of(messages)
    gone = 0
    for turn in reversed(turns[:-1]):
        letters -= sum(map(letters_of, turn))
        gone += len(turn) if letters < 0 else 0
    left = gone
    kept: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] != "system" and left:
            left -= 1
        else:
            kept.append(message)
    return kept


def conversation_of(body: ChatBody, letters: int) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """A request's messages, and those of them that may be read."""
    messages: list[Mapping[str, Any]] = [message.for_template() for message in body.messages]
    return messages, within_reach(messages, letters) if body.overflow == "drop" else messages


def letters_of(message: Mapping[str, Any]) -> int:
    """The letters of a message's text; its pictures and sounds are counted in tokens."""
    content = message["content"]
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) for part in content if part["type"] == "text")


def refuse_beyond(characters: int, most: int, parameter: str) -> None:
    """Refuse a text that is too long whatever its tokens are."""
    if characters > most:
        problem = (
            f"the text has {characters} characters, at most {most} can be of use to a model of this context"
        )
        raise RequestRefused(problem, parameter=parameter, code="context_length_exceeded")


def chat_prompt(
    body: ChatBody,
    tokenizer: Tokenizer,
    context: int,
    limits: Limits,
    letters: int,
    summarise: Summarise | None = None,
    pictures: Mapping[str, bytes] = MappingProxyType({}),
) -> Fitted:
    """The conversation as tokens, ending where the assistant begins to speak, and what had to go for it.

    `pictures` holds what was fetched, by URL.
    """
    if not tokenizer.templates:
        problem = "this model has no chat template; send its prompt to /v1/completions"
        raise RequestRefused(problem, parameter="messages", code="no_chat_template")
    form = form_of_calls(body, tokenizer)
    overflow = body.overflow or "refuse"
    asked = asked_length(body, limits)
    # a conversation that may not be shortened is measured by its caller, which knows what to answer
    room = sys.maxsize
    if overflow != "refuse":
        # what slides may go on as long as the server lets it
        share = context if overflow == "slide" else max(1, context // ANSWERS_PART)
        room = context - (asked or min(limits.new_tokens, share))
    messages, reachable = conversation_of(body, letters)
    if overflow != "slide":
        read = PARTS * letters if overflow == "summarise" else 2 * letters
        refuse_beyond(sum(map(letters_of, reachable)), read, "messages")
    # A picture is decoded once, however often the conversation is made tokens to see whether it fits.
    reachable = read_items(
        [with_fetched(message, pictures) for message in reachable], tokenizer.forms, context, limits, overflow
    )
    begun = None
    if form is not None and forces_call(body):
        begun = partial(opening_of_call, tokenizer=tokenizer, form=form)
    try:
        fitted = fit_conversation(
            reachable,
            tokenizer,
            room,
            overflow=overflow,
            summarise=summarise,
            reasoning=body.reasoning or "off",
            tools=offered_tools(body),
            template_arguments=body.chat_template_kwargs,
            begun=begun,
        )
        return replace(fitted, left_out=fitted.left_out + len(messages) - len(reachable))
    except RecursionError:
        problem = "the messages, the tools or the template's arguments are nested too deeply"
        raise RequestRefused(problem, parameter="messages") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        problem = f"the chat template cannot write this conversation: {str(error)[:200]}"
        raise RequestRefused(problem, parameter="messages") from None


def token_prompts(
    body: CompletionBody | EmbeddingBody, tokenizer: Tokenizer, letters: int, limits: Limits
) -> list[list[int]]:
    """The prompts of a completion or an embedding, whichever of the four ways they were given in."""
    name = "prompt" if isinstance(body, CompletionBody) else "input"
    given: Any = body.prompt if isinstance(body, CompletionBody) else body.input
    if isinstance(given, str):
        given = [given]
    if not given:
        raise RequestRefused(f"{name} is empty", parameter=name)
    if isinstance(given[0], int):
        given = [given]
    # before they are made tokens, which takes longer than anything else
    many = (body.n or 1) * len(given) if isinstance(body, CompletionBody) else len(given)
    most = limits.samples if isinstance(body, CompletionBody) else limits.embedding_inputs
    if many > most:
        what = "samples are asked for" if name == "prompt" else "texts are to be embedded"
        problem = f"{many} {what}, at most {most} are served at once"
        raise RequestRefused(problem, parameter=name, code="array_above_max_length")
    if isinstance(given[0], str):
        if name == "input" and not all(given):
            raise RequestRefused("input holds an empty text, which has no embedding", parameter=name)
        refuse_beyond(max(map(len, given)), letters, name)
        first = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
        prompts = [first + ids for ids in tokenizer.encode_batch(given)]
        # a model needs something to continue: a document begins where another ended
        prompts = [ids or [tokenizer.end_of_text_id] for ids in prompts]
    else:
        prompts = given
    for ids in prompts:
        if not ids:
            raise RequestRefused(f"{name} holds a prompt without tokens", parameter=name)
        if max(ids) >= tokenizer.vocabulary_size:
            problem = f"{name} holds the token {max(ids)}; ids end at {tokenizer.vocabulary_size - 1}"
            raise RequestRefused(problem, parameter=name)
    return prompts
