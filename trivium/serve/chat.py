"""`trivium chat`: a conversation in the terminal, with one model or with several that hear the same words."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from trivium.generate.chat_fit import (
    Fitted,
    Message,
    Overflow,
    Reasoning,
    Summariser,
    fit_conversation,
    read_examples,
    with_summary,
)
from trivium.generate.engine import Engine
from trivium.generate.requests import Event, Request, RequestHandle
from trivium.generate.sampling import Sampling
from trivium.generate.search.run import SearchResult
from trivium.generate.search.settings import SearchSettings
from trivium.kit.errors import TriviumError
from trivium.kit.files import expanded, write_json
from trivium.model.named import RUNS
from trivium.serve.chat_search import ROWS, answer_by_search, read_search, summary, tree_lines
from trivium.serve.models import open_engine
from trivium.serve.voice import Voice, printable
from trivium.tokens.pictures import pillow

HELP = """\
/system TEXT    set the system message (without TEXT: show it; /system - removes it)
/temp NUMBER    set the temperature (0 always takes the likeliest token)
/show FILE TEXT ask about a picture or a sound
/search METHOD  search for answers: /search best_of 8 SCORER; /search - draws one answer again
/tree           show what the last search drew
/reset          forget the conversation
/save FILE      write the conversation as JSON
/compare MODEL  let another model answer the same words (/compare - sends it away)
/help           show this
/quit           leave (so does Ctrl-D; Ctrl-C stops an answer)
"""

TEMPERATURE = 0.8
"""Where neither the person nor the model says how to sample."""


@dataclass
class Speaker:
    """One model in the conversation, and the conversation as this model knows it."""

    name: str
    engine: Engine
    messages: list[dict[str, Any]] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    """The same with a summary in place of what was summarised."""
    found: SearchResult | None = None
    """What the last search drew."""

    @cached_property
    def searching(self) -> Engine:
        """The same model in an engine that draws several answers at once."""
        return Engine(self.engine.source, self.engine.tokenizer, max_rows=ROWS)


class Conversation:
    """What the terminal chat knows and does, line by line."""

    def __init__(
        self,
        speakers: Sequence[Speaker],
        sampling: Sampling,
        *,
        system: str | None = None,
        overflow: Overflow = "drop",
        reasoning: Reasoning = "off",
        examples: Sequence[Message] = (),
        out: TextIO | None = None,
        opener: Callable[[str], Engine] = open_engine,
        search: SearchSettings | None = None,
        runs: str = RUNS,
    ) -> None:
        self.speakers, self.sampling, self.system = list(speakers), sampling, system
        self.overflow, self.reasoning, self.examples = overflow, reasoning, examples
        self.search, self.runs = search, runs
        self._out, self._opener = out or sys.stdout, opener
        for speaker in self.speakers:
            self._check(speaker)

    def hear(self, line: str) -> bool:
        """Do what one line asks for; false when it asks to leave."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            for speaker in self.speakers:
                self._answer(speaker, line)
            return True
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        known = {
            "/system": self._set_system,
            "/temp": self._set_temperature,
            "/show": self._show,
            "/search": self._set_search,
            "/tree": self._show_tree,
            "/reset": self._reset,
            "/save": self._save,
            "/compare": self._compare,
            "/help": lambda _: self._say(HELP.rstrip()),
        }
        try:
            if command not in known:
                raise TriviumError(f"there is no command {command}; /help lists them.")
            known[command](rest.strip())
        except TriviumError as error:
            self._say(str(error))
        return True

    def _say(self, text: str) -> None:
        print(printable(text), file=self._out, flush=True)

    def _show(self, rest: str) -> None:
        """Ask about a file; its name stands in quotes if it holds spaces."""
        try:
            path, *words = shlex.split(rest)
        except ValueError:
            raise TriviumError("name a file: /show a.png How many?") from None
        kind = "audio" if Path(path).suffix.lower() == ".wav" else "image"
        part = {"type": kind, "path": str(expanded(path).absolute())}
        content = [part, *([{"type": "text", "text": " ".join(words)}] if words else [])]
        for speaker in self.speakers:
            self._answer(speaker, content)

    def _answer(self, speaker: Speaker, words: str | list[dict[str, Any]]) -> None:
        """Stream one model's answer; what it said before Ctrl-C is kept."""
        if len(self.speakers) > 1:
            self._say(f"[{speaker.name}]")
        asked = {"role": "user", "content": words}
        told = [*speaker.told, asked]
        try:
            fitted = self._fitted(speaker, told)
            answer: str | list[dict[str, Any]]
            if self.search is not None:
                answer = self._search(speaker, fitted, self.search)
            else:
                answer = self._stream(speaker, fitted)
        except TriviumError as error:
            self._say(str(error))
            return
        if fitted.summary is not None:
            told = with_summary(told[fitted.left_out :], fitted.summary)
        answered = {"role": "assistant", "content": answer}
        speaker.messages += [asked, answered]
        speaker.told = [*told, answered]

    def _check(self, speaker: Speaker) -> None:
        """Refuse a model that cannot be asked in the ways that were chosen."""
        plain = self.overflow == "drop" and self.reasoning == "off" and not self.examples and not self.system
        if not plain and not speaker.engine.tokenizer.templates:
            raise TriviumError(
                f"{speaker.name} has no chat template, so it only continues the last line: leave out "
                "the system message, overflow, reasoning and examples."
            )
        length, context = self._length(speaker), speaker.engine.model.config.context
        if length < self.sampling.max_new_tokens:
            self._say(f"({speaker.name} answers in at most {length} tokens, for its context holds {context})")

    def _length(self, speaker: Speaker) -> int:
        """How long this model's answers may be; a quarter of its context is left to what they answer."""
        return min(self.sampling.max_new_tokens, max(1, speaker.engine.model.config.context * 3 // 4))

    def _fitted(self, speaker: Speaker, messages: list[dict[str, Any]]) -> Fitted:
        tokenizer, context = speaker.engine.tokenizer, speaker.engine.model.config.context
        if not tokenizer.templates:
            first = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
            return Fitted(messages, first + tokenizer.encode(messages[-1]["content"]))
        opening = [{"role": "system", "content": self.system}] if self.system else []
        room = context - self._length(speaker)
        fitted = fit_conversation(
            [*opening, *messages],
            tokenizer,
            room,
            overflow=self.overflow,
            summarise=Summariser(tokenizer, context, lambda request: self._complete(speaker.engine, request)),
            reasoning=self.reasoning,
            examples=self.examples,
        )
        if fitted.slide is not None:
            forgotten = fitted.slide.forgotten(len(fitted.tokens), context)
            self._say(f"(the context is full: {forgotten} of {len(fitted.tokens)} tokens are forgotten)")
        elif fitted.summary is not None:
            told = f"{fitted.left_out} earlier messages are summarised: {fitted.summary}"
            self._say(f"(the context is full: {told})")
        elif fitted.left_out:
            self._say(f"(the context is full: {fitted.left_out} earlier messages are left out)")
        return fitted

    def _stream(self, speaker: Speaker, fitted: Fitted) -> str | list[dict[str, Any]]:
        engine, voice = speaker.engine, Voice(self._out, opened=fitted.thinking)
        sampling = replace(self.sampling, max_new_tokens=self._length(speaker))
        request = Request(fitted.tokens, sampling, slide=fitted.slide)
        generation = engine.submit(request, lambda event: voice.hear(event.text))
        whole = self._until_done(engine, generation)
        voice.hear("", last=True)
        if not whole:
            self._out.write(" (stopped)")
        elif voice.thought and not voice.answer:
            cut = generation.completions[0].finish_reason == "length"
            why = "the thoughts took all of the answer's tokens" if cut else "it ended within its thoughts"
            self._out.write(f" ({why})")
        self._say("")
        drawn = self._saved_pictures(speaker, generation.completions[0].tokens) if whole else []
        return [{"type": "text", "text": voice.answer}, *drawn] if drawn else voice.answer

    def _saved_pictures(self, speaker: Speaker, tokens: Sequence[int]) -> list[dict[str, Any]]:
        """The pictures of an answer as parts of its message, written into the current folder."""
        parts = []
        for pixels in speaker.engine.tokenizer.pictures(tokens):
            path = next(one for n in count(1) if not (one := Path(f"picture-{n}.png")).exists())
            try:
                pillow().Image.fromarray(pixels).save(path)
            except OSError as error:
                self._say(f"({speaker.name} drew a picture, which cannot be written: {error})")
                continue
            self._say(f"({speaker.name} drew {path.name})")
            parts.append({"type": "image", "path": str(path.absolute())})
        return parts

    def _search(self, speaker: Speaker, fitted: Fitted, search: SearchSettings) -> str:
        """One model's answer by a search, and what that took."""
        length = self._length(speaker)
        found = answer_by_search(speaker.searching, search, fitted, self.sampling, length)
        speaker.found, voice = found, Voice(self._out, opened=fitted.thinking)
        voice.hear(found.text)
        voice.hear("", last=True)
        self._say("")
        self._say(summary(found))
        return voice.answer

    def _complete(self, engine: Engine, request: Request) -> tuple[str, int]:
        written: list[str] = []

        def keep(event: Event) -> None:
            written.append(event.text)

        generation = engine.submit(request, keep)
        if not self._until_done(engine, generation):
            raise TriviumError("The summary was stopped; nothing was asked.")
        return "".join(written), len(generation.completions[0].tokens)

    @staticmethod
    def _until_done(engine: Engine, generation: RequestHandle) -> bool:
        """Step until the end; false when Ctrl-C brought it about, between two steps or inside one."""
        try:
            while not generation.done:
                engine.step()
        except KeyboardInterrupt:
            engine.cancel(generation)
            while not generation.done:
                engine.step()
            return False
        if (error := generation.failure) is not None:
            raise TriviumError(f"The answer failed: {type(error).__name__}: {error}") from error
        return True

    def _set_system(self, text: str) -> None:
        deaf = [speaker.name for speaker in self.speakers if not speaker.engine.tokenizer.templates]
        if deaf and text not in ("", "-"):
            raise TriviumError(f"{deaf[0]} has no chat template, so it cannot take a system message.")
        if text:
            self.system = None if text == "-" else text
        self._say(f"System message: {self.system or 'none'}")

    def _set_temperature(self, text: str) -> None:
        try:
            temperature = float(text)
        except ValueError:
            raise TriviumError(f"/temp takes a number such as 0.7, not {text!r}.") from None
        self.sampling = replace(self.sampling, temperature=temperature)
        self._say(f"Temperature: {temperature:g}")

    def _set_search(self, text: str) -> None:
        if text:
            self.search = None if text == "-" else read_search(text, self.runs)
        shown = "none" if self.search is None else f"{self.search.method}, n = {self.search.n}"
        self._say(f"Search: {shown}")

    def _show_tree(self, _: str) -> None:
        for speaker in self.speakers:
            if speaker.found is None:
                raise TriviumError("nothing was searched for yet; /search best_of 8, then ask.")
            if len(self.speakers) > 1:
                self._say(f"[{speaker.name}]")
            for line in tree_lines(speaker.found):
                self._say(line)

    def _reset(self, _: str) -> None:
        for speaker in self.speakers:
            speaker.messages.clear()
            speaker.told.clear()
        self._say("The conversation is forgotten.")

    def _save(self, text: str) -> None:
        if not text:
            raise TriviumError("/save takes the name of a file.")
        opening = [{"role": "system", "content": self.system}] if self.system else []
        conversations = [
            {"model": speaker.name, "messages": [*opening, *speaker.messages]} for speaker in self.speakers
        ]
        path = expanded(text)
        if not path.parent.is_dir():
            raise TriviumError(f"there is no folder {path.parent} to save in.")
        try:
            write_json(path, conversations)
        except OSError as error:
            raise TriviumError(f"{path} cannot be written: {error.strerror}.") from None
        self._say(f"Saved to {path}")

    def _compare(self, text: str) -> None:
        if text == "-":
            del self.speakers[1:]
        elif text in [speaker.name for speaker in self.speakers]:
            raise TriviumError(f"{text} answers already.")
        elif text:
            speaker = Speaker(text, self._opener(text))
            self._check(speaker)
            self.speakers.append(speaker)
        self._say("Answering: " + ", ".join(speaker.name for speaker in self.speakers))


def chat(
    model: str,
    *,
    runs: str = RUNS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    system: str | None = None,
    overflow: Overflow = "drop",
    reasoning: Reasoning = "off",
    examples: str | Path | None = None,
    compare: Sequence[str] = (),
    search: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Talk with a model until the person leaves."""

    def opener(name: str) -> Engine:
        return open_engine(
            name, runs=runs, max_rows=1, device=device, dtype=dtype, prefix_cache_size=1, draft=draft
        )

    shown = read_examples(examples) if examples is not None else []
    speakers = [Speaker(name, opener(name)) for name in (model, *compare)]
    shortest = min(speaker.engine.model.config.context for speaker in speakers)
    length = max(1, min(512, shortest // 2)) if max_new_tokens is None else max_new_tokens
    given = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed,
    }  # fmt: skip
    wished = {name: value for name, value in given.items() if value is not None}
    defaults = {"temperature": TEMPERATURE, **speakers[0].engine.sampling_defaults}
    sampling = Sampling(**{**defaults, **wished}, max_new_tokens=length)
    conversation = Conversation(
        speakers,
        sampling,
        system=system,
        overflow=overflow,
        reasoning=reasoning,
        examples=shown,
        opener=opener,
        search=None if search is None else read_search(search, runs),
        runs=runs,
    )
    person = sys.stdin.isatty()
    if person:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` line editing and a history)
        print(f"Talking with {', '.join(speaker.name for speaker in speakers)}. /help lists the commands.")
    while True:
        try:
            line = input("> " if person else "")
        except (EOFError, KeyboardInterrupt):
            break
        if not conversation.hear(line):
            break
    if person:
        print()
