"""From messages to a prompt that fits the window: examples, reasoning, conversations that are too long."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trivium.data.shapes import Example, example_of, recognised
from trivium.data.sources import read_documents
from trivium.generate.requests import GenerationEngine, Request, Slide
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer


Message = Mapping[str, Any]
Reasoning = Literal["off", "ask", "open"]

THINK, END_THINK = "<think>", "</think>"
REQUEST_TO_THINK = (
    f"Think the task through step by step between {THINK} and {END_THINK}, then give the answer alone."
)


@dataclass(frozen=True)
class Reasoned:
    """A model's text divided into what it thought and what it answered."""

    thoughts: str | None
    answer: str


def with_instruction(messages: Sequence[Message], instruction: str) -> list[dict[str, Any]]:
    """The conversation with a sentence added to its system message, which is created if there is none."""
    copied = [dict(message) for message in messages]
    if copied and copied[0].get("role") == "system":
        copied[0]["content"] = f"{copied[0]['content']}\n\n{instruction}"
        return copied
    return [{"role": "system", "content": instruction}, *copied]


def ask_to_reason(messages: Sequence[Message], reasoning: Reasoning) -> tuple[list[dict[str, Any]], str]:
    """The messages, and the text the answer shall begin with (`open` writes the tag for the model)."""
    if reasoning == "off":
        return [dict(message) for message in messages], ""
    return with_instruction(messages, REQUEST_TO_THINK), f"{THINK}\n" if reasoning == "open" else ""


def opens_thinking(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends where the model has begun to think."""
    return tokenizer.decode(prompt[-8:], skip_control=False).rstrip().endswith(THINK)


def split_reasoning(text: str, *, opened: bool = False) -> Reasoned:
    """Separate the thinking from the answer; thinking that never ended leaves an empty answer."""
    head, tag, rest = text.partition(THINK)
    if not tag:
        if not opened:
            # some templates write the opening tag in the prompt, so only the closing one is generated
            thoughts, closing, answer = text.partition(END_THINK)
            return Reasoned(thoughts.strip(), answer.lstrip()) if closing else Reasoned(None, text)
        head, rest = "", text
    elif opened:
        head, rest = "", head + rest
    thoughts, _, answer = rest.partition(END_THINK)
    before = head.strip()
    return Reasoned(thoughts.strip(), f"{before}\n{answer.lstrip()}" if before else answer.lstrip())


def few_shot(
    examples: Sequence[tuple[str, str]], question: str, *, system: str | None = None
) -> list[dict[str, Any]]:
    """A conversation in which the examples were already asked and answered."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for asked, answered in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


def few_shot_text(
    examples: Sequence[tuple[str, str]], question: str, *, asked: str = "Question:", answered: str = "Answer:"
) -> str:
    """The same for a model that only continues text; the prompt ends where the answer begins."""
    blocks = [f"{asked} {one}\n{answered} {other}" for one, other in examples]
    return "\n\n".join([*blocks, f"{asked} {question}\n{answered}"])


def read_examples(path: str | Path) -> list[dict[str, Any]]:
    """The examples of a file as one conversation: rows of messages, or of a prompt and its answer."""
    shown: list[dict[str, Any]] = []
    for document in read_documents(str(path)):
        try:
            shown += _exchange(example_of(recognised(document.fields), document.fields))
        except TriviumError as error:
            raise TriviumError(f"The example {document.id} {error}.") from None
    if not shown:
        raise TriviumError(f"{path} holds no examples; give a prompt and a completion on each line.")
    return shown


def _exchange(example: Example) -> list[dict[str, Any]]:
    if example.prompt is not None and example.completion is not None:
        return few_shot([(example.prompt, example.completion)], "")[:-1]
    if not example.messages:
        raise TriviumError("is a text without a question; give a prompt and a completion, or messages")
    messages = [dict(message) for message in example.messages]
    if any(message["role"] in ("system", "developer") for message in messages):
        raise TriviumError("has a system message; say that once for the whole conversation")
    if messages[0]["role"] != "user" or messages[-1]["role"] != "assistant":
        raise TriviumError("does not begin with a user's message and end with an assistant's")
    return messages


Overflow = Literal["refuse", "drop", "slide", "summarise"]
Summarise = Callable[[Sequence[Message], int], str]
Complete = Callable[[Request], tuple[str, int]]
"""Asks the model: what it wrote, and how many tokens that took."""

REQUEST_TO_SUMMARISE = (
    "Summarise the conversation above in a few sentences: "
    "names, numbers, what was decided, what is still open."
)
SUMMARY_HEADING = "Summary of the earlier conversation:"
LONGEST_SUMMARY = 200
PARTS = 16  # pieces in which a summary reads a conversation, at most


class Unfit(TriviumError):
    """A conversation cannot be brought to fit in the way that was asked for."""


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits: what is left of it, its tokens, and what had to go."""

    messages: list[dict[str, Any]]
    tokens: list[int]
    left_out: int = 0
    """How many messages went, `summary` standing for them where there is one."""
    summary: str | None = None
    thinking: bool = False
    """Whether the tokens end inside the model's thoughts."""
    slide: Slide | None = None
    """How the engine has to forget, where it is the cache that makes room."""


def turns_of(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """System messages, and the rest in turns: a user's message with everything up to the next one."""
    system = [message for message in messages if message.get("role") in ("system", "developer")]
    turns: list[list[Message]] = []
    for message in messages:
        if message.get("role") in ("system", "developer"):
            continue
        if message.get("role") == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return system, turns


def fit_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    room: int,
    *,
    overflow: Overflow = "refuse",
    summarise: Summarise | None = None,
    reasoning: Reasoning = "off",
    examples: Sequence[Message] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    begun: Callable[[list[int]], list[int]] | None = None,
) -> Fitted:
    """Bring a conversation to at most `room` prompt tokens; system messages and `examples` always stay.

    Only `slide` leaves everything where it is, for the cache to forget. What `begun` says of a prompt stands
    behind it: the tokens with which the answer was begun.
    """
    _check_word("overflow", overflow, get_args(Overflow))
    _check_word("reasoning", reasoning, get_args(Reasoning))
    asked, opening = ask_to_reason(messages, reasoning)

    def tokens_of(conversation: Sequence[Message]) -> list[int]:
        ids = tokenizer.encode_prompt(
            [dict(message) for message in conversation], tools=tools, template_arguments=template_arguments
        )
        if opening and not opens_thinking(ids, tokenizer):
            ids += tokenizer.encode(opening)
        return ids + begun(ids) if begun is not None else ids

    system, turns = turns_of(asked)
    system += examples
    left_out, summary, slide = 0, None, None
    kept = _flat(system, turns) if examples else asked
    tokens = tokens_of(kept)
    if len(tokens) > room:
        if overflow == "refuse":
            raise Unfit(
                f"the conversation has {len(tokens)} tokens and the window leaves room for {room}: "
                "shorten it, ask for fewer new tokens, or choose overflow drop, slide or summarise."
            )
        if overflow == "slide":
            slide = Slide()
        elif overflow == "drop":
            first, kept, tokens = _drop(system, turns, tokens_of, room)
            left_out = sum(map(len, turns[:first]))
        else:
            assert summarise is not None, "the policy summarise needs a summariser"
            first, summary = _summary(system, turns, tokens_of, room, summarise)
            left_out = sum(map(len, turns[:first]))
            kept = _summarised(system, turns[first:], summary)
            tokens = tokens_of(kept)
            if len(tokens) > room:
                raise Unfit(
                    f"with the summary of its beginning the conversation has {len(tokens)} tokens and the "
                    f"window leaves room for {room}: choose overflow drop."
                )
    return Fitted(kept, tokens, left_out, summary, opens_thinking(tokens, tokenizer), slide)


def _check_word(name: str, word: str, known: Sequence[str]) -> None:
    if word not in known:
        raise TriviumError(f"{name} is {word!r}; choose one of {', '.join(known)}.")


def _drop(
    system: list[Message],
    turns: list[list[Message]],
    tokens_of: Callable[[Sequence[Message]], list[int]],
    room: int,
) -> tuple[int, list[dict[str, Any]], list[int]]:
    """Leave out as few of the oldest turns as will do; the first that stays, the rest, and its tokens."""
    low, high = 0, len(turns) - 1
    while low < high:
        middle = (low + high) // 2
        fits = len(tokens_of(_flat(system, turns[middle:]))) <= room
        low, high = (low, middle) if fits else (middle + 1, high)
    kept = _flat(system, turns[low:])
    tokens = tokens_of(kept)
    if len(tokens) > room:
        raise Unfit(
            f"the system message and the last turn alone have {len(tokens)} tokens and the window leaves "
            f"room for {room}: shorten the last message or ask for fewer new tokens."
        )
    return low, kept, tokens


def _summary(
    system: list[Message],
    turns: list[list[Message]],
    tokens_of: Callable[[Sequence[Message]], list[int]],
    room: int,
    summarise: Summarise,
) -> tuple[int, str]:
    """The first turn that stays as it is, and what the model says of those before it."""
    longest = min(LONGEST_SUMMARY, room // 4)
    if longest < 1 or len(turns) < 2:
        raise Unfit(
            f"the window leaves room for {room} tokens and there are no earlier turns to summarise: "
            "shorten the last message or ask for fewer new tokens."
        )
    heading = len(tokens_of(_summarised(system, turns[-1:], ""))) - len(tokens_of(_flat(system, turns[-1:])))
    # written again, a text may have a few tokens more than when the model wrote it
    first, _, _ = _drop(system, turns, tokens_of, room - longest - heading - longest // 8 - 1)
    return first, summarise(_flat([], turns[:first]), longest)


def with_summary(messages: Sequence[Message], summary: str) -> list[dict[str, Any]]:
    """The conversation with a summary before the words of its first message.

    It is not put into the system message: what a user said must not come back with more authority.
    """
    first, *rest = (dict(message) for message in messages)
    heading, content = f"{SUMMARY_HEADING} {summary}\n\n", first.get("content") or ""
    is_text = isinstance(content, str)
    first["content"] = f"{heading}{content}" if is_text else [{"type": "text", "text": heading}, *content]
    return [first, *rest]


def _flat(system: Sequence[Message], turns: Sequence[Sequence[Message]]) -> list[dict[str, Any]]:
    return [dict(message) for message in system] + [dict(message) for turn in turns for message in turn]


def _summarised(
    system: Sequence[Message], turns: Sequence[Sequence[Message]], summary: str
) -> list[dict[str, Any]]:
    return [*_flat(system, []), *with_summary(_flat([], turns), summary)]


class Summariser:
    """Asks the model itself for a summary, in as many parts as its window makes necessary."""

    def __init__(self, tokenizer: Tokenizer, window: int, complete: Complete) -> None:
        self._tokenizer, self._window, self._complete = tokenizer, window, complete
        self.prompt_tokens = self.completion_tokens = 0

    def __call__(self, messages: Sequence[Message], most: int) -> str:
        """What the model says of the messages, in at most `most` tokens."""
        rest, summary = transcript(messages), ""
        while rest:
            size, tokens = self._part(summary, rest, most)
            if not summary and len(rest) > PARTS * size:
                raise Unfit(
                    f"the earlier turns have {len(rest)} characters, more than the model can read in {PARTS} "
                    "parts to summarise them: choose overflow drop or slide."
                )
            sampling = Sampling(temperature=0, max_new_tokens=most)
            written, count = self._complete(Request(tokens, sampling))
            self.prompt_tokens += len(tokens)
            self.completion_tokens += count
            opened = opens_thinking(tokens, self._tokenizer)
            summary = split_reasoning(written, opened=opened).answer.strip()
            if not summary:
                raise Unfit("the model's summary of the earlier turns is empty: choose overflow drop.")
            rest = rest[size:]
        return summary

    def _part(self, summary: str, rest: str, most: int) -> tuple[int, list[int]]:
        """How many characters of the rest fit into one prompt, to the end of a line if possible."""
        earlier = f"{SUMMARY_HEADING} {summary}\n\n" if summary else ""

        def tokens_of(size: int) -> list[int]:
            words = f"{earlier}{rest[:size].rstrip()}\n\n{REQUEST_TO_SUMMARISE}"
            asked = [{"role": "user", "content": words}]
            return self._tokenizer.encode_prompt(asked)

        room = self._window - most
        low, high = 0, min(len(rest), max(room, 0) * int(self._tokenizer.byte_lengths().max()))
        if high == len(rest) and len(tokens_of(high)) <= room:
            low = high
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(tokens_of(middle)) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        if not low:
            raise Unfit(
                f"the window of {self._window} tokens has no room for asking for a summary of at most "
                f"{most}: choose overflow drop or slide."
            )
        if low < len(rest):
            # not at a line that ends early, or many short parts would be read
            low = rest.rfind("\n", low // 2, low) + 1 or low
        return low, tokens_of(low)


def summariser(engine: GenerationEngine) -> Summariser:
    """A summariser that asks an engine, which no other thread steps meanwhile."""

    def complete(request: Request) -> tuple[str, int]:
        [[completion]] = engine.generate([request])
        return completion.text, len(completion.tokens)

    return Summariser(engine.tokenizer, engine.window, complete)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as plain text, a line for who speaks."""
    lines = []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "\n".join(part["text"] for part in content if "text" in part)
        calls = message.get("tool_calls")
        called = f" {json.dumps([call['function'] for call in calls], ensure_ascii=False)}" if calls else ""
        lines.append(f"{message['role']}: {content}{called}\n")
    return "".join(lines)
