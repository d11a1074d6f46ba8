"""Which part of a rendered conversation is the assistant's (law L6), with markers in the template or not."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.tokens.control import CLOSE, OPEN, Disguise
from trivium.tokens.template import REFUSALS

Message = dict[str, Any]
Renderer = Callable[[Sequence[Message], bool], str]

# Stands for the text of one turn while we look where the template puts it.
PROBE = "\U0010fff0"


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as tokens; `learned` marks the assistant's, `turns` numbers its turns (-1 elsewhere)."""

    ids: list[int]
    learned: list[bool]
    turns: list[int]


@dataclass(frozen=True)
class Span:
    """One turn of the assistant, from letter `start` up to `end`; `stopped` if a control token ends it."""

    start: int
    end: int
    stopped: bool


@dataclass(frozen=True)
class Written:
    """A conversation as its template wrote it, and what is needed to look at it more closely."""

    text: str
    messages: list[Message]
    render: Renderer
    disguise: Disguise
    items: list[list[int]]
    """The tokens of its pictures and sounds, by the number that marks them in the text."""

    @property
    def header(self) -> str:
        """What the template writes to prompt the assistant's first turn; empty if it cannot be told."""
        turns = (index for index, one in enumerate(self.messages) if one["role"] == "assistant")
        return header_of(self.messages[: next(turns, 0)], self.render)


def borders_behind(header: str, text: str) -> list[Span]:
    """Empty turns where the assistant begins, at which the text is cut as where a model goes on by itself."""
    if not header.strip():
        return []
    ends = (match.end() for match in re.finditer(re.escape(header), text))
    return [Span(end, end, False) for end in ends if end < len(text)]


class SpanFinder:
    """Finds the assistant's turns in a rendered text in which only the template wrote control strings."""

    def __init__(self, control: re.Pattern[str], stops: frozenset[str]) -> None:
        self.control = control
        self.stops = stops

    def marked(self, rendered: str, header: str) -> tuple[str, list[Span]]:
        """Take the marks of `{% generation %}` out of the text and give the turns they enclosed.

        What the template also writes as the prompt for a turn (`header`) is not the assistant's, even inside.
        """
        parts = re.split(f"({re.escape(OPEN)}|{re.escape(CLOSE)})", rendered)
        text = ""
        borders: list[int] = []
        for part in parts:
            if part in (OPEN, CLOSE):
                expected = OPEN if len(borders) % 2 == 0 else CLOSE
                if part != expected:
                    raise TriviumError("The chat template nests `{% generation %}` blocks; use one per turn.")
                borders.append(len(text))
            else:
                text += part
        spans: list[Span] = []
        for start, end in zip(borders[::2], borders[1::2], strict=True):
            if header and (begin := text.rfind(header, 0, start + len(header))) >= 0:
                start = max(start, min(end, begin + len(header)))
            if end <= start:
                continue
            span = self._tidied(text, start, end)
            if spans and span.start <= spans[-1].end:
                span = Span(spans.pop().start, span.end, span.stopped)
            spans.append(span)
        return text, spans

    def _tidied(self, text: str, start: int, end: int) -> Span:
        """End the turn right behind its stop: a newline after it is not learned, a stop after it is."""
        last = None
        for match in self.control.finditer(text, start, end):
            last = match
        if last is not None and last[0] in self.stops and not text[last.end() : end].strip():
            return Span(start, last.end(), True)
        behind = re.compile(r"\s*").match(text, end)
        after = self.control.match(text, behind.end() if behind else end)
        if after is not None and after[0] in self.stops:
            return Span(start, after.end(), True)
        return Span(start, end, False)

    def unmarked(self, rendered: str, messages: Sequence[Message], render: Renderer) -> list[Span]:
        """Find the turns in what a template without markers wrote, by asking it what it would prompt with."""
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, probed = self._start(rendered, messages, index, render)
            earliest = spans[-1].end if spans else 0
            if start is None or start < earliest:
                raise TriviumError(
                    f"Cannot tell which tokens of message {index} are the assistant's in this chat template; "
                    "put `{% generation %}` around them in the template."
                )
            spans.append(self._span(rendered, start, probed, messages, index, render))
        return spans

    def _span(
        self,
        rendered: str,
        start: int,
        probed: str | None,
        messages: Sequence[Message],
        index: int,
        render: Renderer,
    ) -> Span:
        if self.stops:
            for match in self.control.finditer(rendered, start):
                if match[0] in self.stops:
                    return Span(start, match.end(), True)
        probed = probed if probed is not None else self._probe(messages, index, render)
        behind = probed.partition(PROBE)[2] if probed is not None else ""
        shared = _shared_end(rendered[start:], behind)
        return Span(start, len(rendered) - shared, False)

    def _start(
        self, rendered: str, messages: Sequence[Message], index: int, render: Renderer
    ) -> tuple[int | None, str | None]:
        """Where turn `index` begins: right behind what the model would be prompted with."""
        prompt = _tried(render, messages[:index], True)
        header = header_of(messages[:index], render)
        if prompt is not None and header and rendered.startswith(prompt):
            return len(prompt), None
        probed = self._probe(messages, index, render)
        if probed is None:
            return None, None
        before = probed.partition(PROBE)[0]
        if header and (cut := before.rfind(header)) >= 0:
            start = cut + len(header)
            if rendered.startswith(before[:start]):
                return start, probed
        agreed = _shared_start(rendered, before)
        # Without a header the turn begins where the conversation so far ends, unless the template writes
        # something other than a space in between, which then is a header the generation prompt leaves out.
        if prompt is not None and not header and rendered.startswith(prompt):
            between = rendered[len(prompt) : agreed]
            if len(prompt) <= agreed and not between.strip():
                return len(prompt), probed
        return agreed, probed

    def _probe(self, messages: Sequence[Message], index: int, render: Renderer) -> str | None:
        """The conversation with the turn's text replaced by the probe, or None if the template hides it."""
        turn = {key: value for key, value in messages[index].items() if key not in _REASONING}
        content: Any = PROBE
        if isinstance(turn.get("content"), list):
            content = [{"type": "text", "text": PROBE}]
        variants = [{**turn, "content": content}, {"role": turn["role"], "content": content}]
        for variant in variants:
            probed = _tried(render, [*messages[:index], variant, *messages[index + 1 :]], False)
            if probed is not None and PROBE in probed:
                return probed
        return None


_REASONING = frozenset({"reasoning_content", "thinking", "reasoning"})


def header_of(messages: Sequence[Message], render: Renderer) -> str:
    """What the template adds to these messages to prompt the assistant; empty if nothing."""
    prompt, bare = _tried(render, messages, True), _tried(render, messages, False)
    if prompt is None or bare is None or not prompt.startswith(bare):
        return ""
    return prompt[len(bare) :].replace(OPEN, "").replace(CLOSE, "")


def stop_after_turn(control: re.Pattern[str], render: Renderer) -> str | None:
    """The control string a template writes behind an assistant's turn, found by rendering an exchange."""
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}
    rendered = _tried(render, [user, assistant], False)
    if rendered is None or PROBE not in rendered:
        return None
    behind = rendered.rpartition(PROBE)[2].replace(CLOSE, "").lstrip()
    match = control.match(behind)
    return match[0] if match else None


def _tried(render: Renderer, messages: Sequence[Message], prompt: bool) -> str | None:
    """What the template writes, or None where it refuses such a conversation."""
    try:
        return render(messages, prompt)
    except REFUSALS:
        return None


def _shared_start(one: str, other: str) -> int:
    size = min(len(one), len(other))
    return next((index for index in range(size) if one[index] != other[index]), size)


def _shared_end(one: str, other: str) -> int:
    size = min(len(one), len(other))
    return next((index for index in range(size) if one[-1 - index] != other[-1 - index]), size)
