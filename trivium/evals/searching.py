"""Answers that are searched for: who scores, which answers are the same, and many searches in one engine."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trivium.generate.engine import Engine
from trivium.generate.search.explore import Explorer, Scorer, of_answers, of_texts, own_probability
from trivium.generate.search.run import SearchResult, last_line, search_all
from trivium.generate.search.settings import SearchSettings
from trivium.grade.learned import LearnedScorer, learned_scorer
from trivium.grade.maths.extract import marked_answers
from trivium.grade.rewards import is_in_a_file, reward_from_file
from trivium.grade.scorer import Score, scorer, scorer_names
from trivium.kit.errors import TriviumError
from trivium.model.named import RUNS, find_reward_model

OWN_PROBABILITY = "logprob"


def answer_key(text: str) -> str | None:
    """What two solutions with the same answer share: the marked answer, else the last line."""
    marked = marked_answers(text)
    found = marked.answers[-1] if marked.answers else last_line(text)
    return None if found is None else " ".join(found.split()).rstrip(".").casefold()


class _Function:
    """A function with TRL's reward signature as a scorer of many."""

    def __init__(self, place: str) -> None:
        self.function = reward_from_file(place)

    def many(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Score]:
        """One score per completion."""
        return self.function.scores(prompts, list(completions))


def find_scorer(named: Any, runs: str | Path = RUNS) -> Any:
    """A scorer as a person names it; a reward model, which may be a stage, by its folder."""
    if isinstance(named, Mapping):
        return {**named, "model": find_scorer(named["model"], runs)} if "model" in named else named
    if not isinstance(named, str | Path) or is_in_a_file(str(named)):
        return named
    known = str(named) in (OWN_PROBABILITY, *scorer_names())
    return named if known else str(find_reward_model(named, runs))


def open_judge(named: Any) -> Any:
    """Who scores, from what settings name; None is the model's own probability."""
    if named is None or named == OWN_PROBABILITY:
        return None
    if isinstance(named, Mapping):
        options = dict(named)
        if "model" in options:
            return learned_scorer(Path(options.pop("model")), **options)
        return scorer(options.pop("name", ""), **options)
    if not isinstance(named, str | Path):
        return named
    if is_in_a_file(str(named)):
        return _Function(str(named))
    if str(named) in scorer_names():
        return scorer(str(named))
    if not (Path(named) / "config.json").is_file():
        raise TriviumError(
            f"search.scorer: {named} is no reward model's folder, no `file.py:function`, not "
            f"`{OWN_PROBABILITY}` and no scorer ({', '.join(scorer_names())})."
        )
    return learned_scorer(Path(named))


def scorer_of(judge: Any, prompt: Any) -> Scorer:
    """The scorer of partial answers to this prompt."""
    if judge is None:
        return own_probability
    if hasattr(judge, "many") or isinstance(getattr(judge, "name", None), str):
        # A model of whole answers gives any number; its sigmoid is what a threshold and a sum can read.
        return of_answers(judge, prompt, logits=isinstance(judge, LearnedScorer))
    return of_texts(judge)


def seeded(settings: SearchSettings, place: int = 0) -> SearchSettings:
    """The settings of one of several searches: each draws with a seed of its own."""
    return settings.model_copy(update={"seed": settings.seed * 1_000_003 + place})


class Searcher:
    """Makes searches of one kind; a reward model is loaded once for all of them."""

    def __init__(self, engine: Engine, settings: SearchSettings, scorer: Any = None) -> None:
        """`scorer` is any callable over a partial text, or a scorer; else the settings name it."""
        self.engine, self.settings, self._given = engine, settings, scorer

    @cached_property
    def _judge(self) -> Any:
        return open_judge(self.settings.scorer if self._given is None else self._given)

    def explorer(
        self, ids: list[int], prompt: Any, most: int, stop: tuple[str, ...] = (), place: int = 0
    ) -> Explorer:
        """A search to a prompt, tokenised and as the scorer reads it, of solutions up to `most` tokens."""
        room = self.engine.window - len(ids)
        longest = min(self.settings.max_new_tokens or most, room)
        if longest < 1:
            raise TriviumError(
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer in the model's window "
                f"of {self.engine.window}: shorten it."
            )
        settings, judge = seeded(self.settings, place), scorer_of(self._judge, prompt)
        return Explorer(ids, settings, judge, self.engine.tokenizer, longest, stop)

    def run(self, explorers: Sequence[Explorer]) -> list[SearchResult]:
        """All searches side by side."""
        return search_all(self.engine, explorers, answer_key)
