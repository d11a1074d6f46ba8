"""A model under examination: asked as text to continue or through its chat template."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trivium.evals.likelihood import Likelihood, fits, log_likelihoods
from trivium.evals.results import Record
from trivium.evals.searching import Searcher
from trivium.evals.settings import Settings, Style
from trivium.evals.statistics import pass_at_k
from trivium.generate.chat_fit import (
    THINK,
    few_shot,
    few_shot_text,
    fit_conversation,
    opens_thinking,
    split_reasoning,
)
from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, FinishReason, GenerationEngine, Request
from trivium.generate.sampling import Sampling
from trivium.generate.search.explore import Explorer
from trivium.generate.search.run import SearchResult
from trivium.kit.errors import TriviumError
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

Judge = Callable[[str], Mapping[str, float]]
GREETINGS = (
    "What is 2 + 3?", "Hello!", "Say yes.", "Name an animal.",
    "What is your name?", "Write one word.", "Which is larger: 4 or 7?", "Thank you.",
)  # fmt: skip
LONGEST_GREETING = 96
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_NEXT_BLOCK = re.compile(r"\n\s*\n|\n(?=Question:)")


@dataclass(frozen=True)
class Item:
    """One question in both styles, its right answer, and the program that judges what a model says."""

    id: str
    prompt: str
    """The text to continue."""
    messages: Sequence[Mapping[str, Any]]
    expected: str
    judge: Judge
    choices: tuple[str, ...] = ()
    cluster: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)
    style: Style | None = None
    """Set where only one way of asking makes sense."""
    begin: str = ""
    """What the answer begins with, written for the model."""


def first_sentence(text: str) -> str:
    """The first line up to the end of its first sentence: a base model writes on and on."""
    line = text.strip().split("\n")[0]
    end = _SENTENCE_END.search(line)
    return line[: end.end()] if end else line


def first_block(text: str) -> str:
    """Everything before an empty line or the next question."""
    return _NEXT_BLOCK.split(text.strip())[0]


def with_shots(
    examples: Sequence[tuple[str, str]], question: str, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """A question after answered ones, as text and as a conversation."""
    shown = few_shot(examples, question)[:-1]
    return few_shot_text(examples, question), [*shown, *(dict(message) for message in messages)]


class Subject:
    """A model with its tokenizer, and the ways of asking it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 32,
        engine: GenerationEngine | None = None,
    ) -> None:
        """`engine` answers in place of ours; likelihoods and hidden states come from the model here."""
        model.eval()
        self.model, self.tokenizer = model, tokenizer
        self.engine = engine or Engine(model, tokenizer, max_rows=max_rows, seed=0)
        self.window = model.config.reach
        self._ends_turns: bool | None = None
        self._searchers: dict[str, Searcher] = {}

    @property
    def ends_turns(self) -> bool:
        """Whether the model, asked through its template, mostly ends its turn: what makes it a chat model."""
        if self._ends_turns is None:
            self._ends_turns = self._greet()
        return self._ends_turns

    def _greet(self) -> bool:
        end = self.tokenizer.end_of_turn_id
        if end is None:
            return False
        try:
            asked = [self.chat_ids([{"role": "user", "content": text}]) for text in GREETINGS]
        except TriviumError:
            return False
        most = min(LONGEST_GREETING, self.window - max(map(len, asked)))
        if most < 1:
            return False
        greedy = Sampling(temperature=0, max_new_tokens=most)
        answers = [one[0] for one in self.engine.generate([Request(ids, greedy) for ids in asked])]
        return sum(answer.tokens[-1] == end for answer in answers) * 2 >= len(answers)

    def style(self, settings: Settings) -> Style:
        """How this model is asked under these settings."""
        if settings.style == "auto":
            return "chat" if self.ends_turns else "continue"
        return settings.style

    def text_ids(self, text: str) -> list[int]:
        """A text as the beginning of a document."""
        begin = self.tokenizer.beginning_id
        ids = [*([] if begin is None else [begin]), *self.tokenizer.encode(text)]
        return ids or [self.tokenizer.end_of_text_id]

    def chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.tokenizer.encode_prompt([dict(message) for message in messages])

    def prompt_ids(self, item: Item, style: Style) -> list[int]:
        """What the model reads before it answers."""
        if (item.style or style) == "chat":
            return [*self.chat_ids(item.messages), *self.tokenizer.encode(item.begin)]
        return self.text_ids(f"{item.prompt} {item.begin}" if item.begin else item.prompt)

    def asked_ids(self, item: Item, style: Style, settings: Settings) -> list[int]:
        """The same where the model is to think first, if the settings say so."""
        if settings.reasoning == "off":
            return self.prompt_ids(item, style)
        assert (item.style or style) == "chat", "thoughts are asked for through a template"
        assert not item.begin, "where a model is to think first, nothing begins its answer"
        # The caller checks whether they fit.
        return fit_conversation(
            item.messages, self.tokenizer, sys.maxsize, reasoning=settings.reasoning
        ).tokens

    def choose(self, items: Sequence[Item], style: Style) -> list[list[Likelihood] | None]:
        """How likely the model finds each choice of each item; None where the window is too small."""
        prompts: list[list[int]] = []
        continuations: list[list[int]] = []
        fit: list[bool] = []
        for item in items:
            pairs = [self._continued(item, style, choice) for choice in item.choices]
            fit.append(all(fits(self.model, len(before) + len(after) - 1) for before, after in pairs))
            if fit[-1]:
                prompts += [before for before, _ in pairs]
                continuations += [after for _, after in pairs]
        found = iter(log_likelihoods(self.model, prompts, continuations))
        return [[next(found) for _ in item.choices] if one else None for item, one in zip(items, fit)]

    def _continued(self, item: Item, style: Style, choice: str) -> tuple[list[int], list[int]]:
        before = self.prompt_ids(item, style)
        if (item.style or style) == "chat":
            return before, self.tokenizer.encode(choice)
        whole = self.text_ids(f"{item.prompt} {choice}")
        # Tokens may grow together across the border: what the choice changes is scored.
        shared = next(
            (place for place, (one, other) in enumerate(zip(before, whole)) if one != other),
            min(len(before), len(whole) - 1),
        )
        return whole[: max(shared, 1)], whole[max(shared, 1) :]

    def answer(
        self, items: Sequence[Item], style: Style, settings: Settings, most: int
    ) -> list[list[Completion] | None]:
        """The likeliest answer to each item and the samples after it; None where the window is too small.

        Where a prompt ends in `<think>`, the texts begin with it.
        """
        longest = settings.max_new_tokens or most
        requests: list[Request] = []
        begun: list[str | None] = []
        for number, item in enumerate(items):
            ids = self.asked_ids(item, style, settings)
            room = min(longest, self.window - len(ids))
            if room < 1:
                begun.append(None)
                continue
            begun.append(self._thought(ids))
            requests.append(Request(ids, Sampling(temperature=0, max_new_tokens=room)))
            if settings.samples:
                seed = settings.seed * 1_000_003 + number
                drawn = Sampling(temperature=settings.temperature, max_new_tokens=room, seed=seed)
                requests.append(Request(ids, drawn, n=settings.samples))
        with torch.inference_mode():
            found = iter(self.engine.generate(requests))
        answers: list[list[Completion] | None] = []
        for thought in begun:
            said = [] if thought is None else [*next(found), *(next(found) if settings.samples else [])]
            answers.append([replace(one, text=f"{thought}{one.text}") for one in said] or None)
        return answers

    def _thought(self, ids: list[int]) -> str:
        """What a prompt that ends in `<think>` has begun of the answer."""
        return f"{THINK}\n" if opens_thinking(ids, self.tokenizer) else ""

    def begun(self, item: Item, style: Style, settings: Settings) -> str:
        """What the prompt has begun of the answer to an item."""
        return item.begin + self._thought(self.asked_ids(item, style, settings))

    def searched(
        self, items: Sequence[Item], style: Style, settings: Settings, most: int
    ) -> list[SearchResult | None]:
        """The answer to each item that a search finds; None where the window is too small."""
        assert settings.search is not None
        if not isinstance(self.engine, Engine):
            raise TriviumError("`search` needs our engine; leave out `engine`, or `search`.")
        searcher = self._searchers.setdefault(
            settings.search.model_dump_json(), Searcher(self.engine, settings.search)
        )
        longest = settings.max_new_tokens or most
        explorers: dict[int, Explorer] = {}
        for number, item in enumerate(items):
            chat = (item.style or style) == "chat"
            ids = self.asked_ids(item, style, settings)
            if len(ids) < self.window:
                # A base model writes on and on; a chat model ends its turn.
                stop = () if chat else ("\n\n", "\nQuestion:")
                asked = [dict(one) for one in item.messages] if chat else item.prompt
                place = settings.seed * 1_000_003 + number
                explorers[number] = searcher.explorer(ids, asked, longest, stop, place)
        with torch.inference_mode():
            found = dict(zip(explorers, searcher.run(list(explorers.values())), strict=True))
        return [found.get(number) for number in range(len(items))]


def _as_completion(result: SearchResult) -> Completion:
    """The handed-over text as the completion it is."""
    reason: FinishReason = "stop" if result.ended else "length"
    tokens = [] if result.chosen is None else result.chosen.node.all_tokens
    return Completion(result.text, tokens, [], reason, 0)


def ask(
    subject: Subject,
    items: Sequence[Item],
    settings: Settings,
    *,
    most: int,
    cut: Callable[[str], str] = first_block,
) -> list[Record]:
    """Let a model answer, cut what a base model writes after its answer, and judge the rest."""
    style = subject.style(settings)
    records = []
    searched: Sequence[SearchResult | None] = [None] * len(items)
    answered: Sequence[list[Completion] | None]
    if settings.search is not None:
        searched = subject.searched(items, style, settings, most)
        answered = [None if one is None else [_as_completion(one)] for one in searched]
    else:
        answered = subject.answer(items, style, settings, most)
    for item, completions, search in zip(items, answered, searched):
        asked = item.prompt if (item.style or style) == "continue" else _spoken(item.messages)
        if completions is None:
            empty = dict.fromkeys(item.judge(""), 0.0)
            none = ({"text": "", "tokens": 0, "finish": "too long for the window"},)
            records.append(Record(item.id, asked, item.expected, none, empty, {}, item.cluster, item.groups))
            continue
        begun = "" if search is None else subject.begun(item, style, settings)
        answers, judged = [], []
        for completion in completions:
            said = (item.begin if search is None else begun) + completion.text
            answer = split_reasoning(said).answer
            if (item.style or style) == "continue":
                answer = cut(answer)
            scores = dict(item.judge(answer))
            judged.append(scores)
            answers.append(
                {
                    "text": said,
                    "answer": answer,
                    "tokens": len(completion.tokens),
                    "finish": completion.finish_reason,
                    "scores": scores,
                }
            )
        scores = {
            **judged[0],
            "ended": float(completions[0].finish_reason == "stop"),
            "tokens": float(len(completions[0].tokens)),
        }
        if search is not None:
            answers[0]["search"] = search.as_json()
            scores["tokens drawn"] = float(search.tokens)
            scores["oracle"] = _oracle(search, item, begun, style, cut)
        records.append(
            Record(item.id, asked, item.expected, tuple(answers), scores, {}, item.cluster, item.groups)
        )
    return [_with_pass_at_k(record, settings.temperature) for record in records]


def _oracle(search: SearchResult, item: Item, begun: str, style: Style, cut: Callable[[str], str]) -> float:
    """Whether any solution that the search has found is right: what a perfect scorer would hand over."""
    texts = dict.fromkeys(split_reasoning(begun + one.node.text).answer for one in search.solutions)
    return max(
        (
            item.judge(cut(text) if (item.style or style) == "continue" else text).get("accuracy", 0.0)
            for text in texts
        ),
        default=0.0,
    )


def _with_pass_at_k(record: Record, temperature: float) -> Record:
    """Add the chance that at least one of k of the samples is right, for k = 1, 2, 4..."""
    # A sample the grader itself could not judge is neither right nor wrong.
    judged = [answer.get("scores", {}) for answer in record.answers[1:]]
    drawn = [scores["accuracy"] for scores in judged if "accuracy" in scores]
    right = sum(score == 1 for score in drawn)
    scores = dict(record.scores)
    k = 1
    while k <= len(drawn):
        scores[f"pass@{k} at temperature {temperature:g}"] = pass_at_k(right, len(drawn), k)
        k *= 2
    return replace(record, scores=scores)


def _spoken(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {_words(message['content'])}" for message in messages)


def _words(content: Any) -> str:
    """A message's text, with a word for each picture or sound."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or f"[{part.get('type')}]" for part in content)
