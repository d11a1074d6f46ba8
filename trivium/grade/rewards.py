"""Rewards under TRL's signature: scorers, a user's own function, and weighted lists of both."""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from trivium.grade.scorer import Score, Scorer, ready, scorer
from trivium.kit.errors import TriviumError, nearest
from trivium.model.hub import resolve

Completion = str | list[dict[str, Any]]
Completions = Sequence[Completion]
Values = list[float | None]
RewardFunction = Callable[..., Sequence[float | None]]


def text_of(completion: Completion) -> str:
    """The words of a completion, which TRL hands over as text or as a list of messages."""
    if isinstance(completion, str):
        return completion
    replies = [message for message in completion if message.get("role") == "assistant"] or completion
    content = replies[-1].get("content") if replies else ""
    return content if isinstance(content, str) else ""


@dataclass
class ScorerReward:
    """A scorer under TRL's reward signature."""

    scorer: Scorer

    @property
    def name(self) -> str:
        return self.scorer.name

    def ready(self) -> None:
        ready(self.scorer)

    def scores(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> list[Score]:
        many = getattr(self.scorer, "many", None)
        if many is not None:
            # A model judges all answers at once.
            return many(prompts, completions)
        # A reference completion in the data would take the place of the one to be scored.
        apart = {name: one for name, one in columns.items() if name not in ("prompt", "completion")}
        rows = _rows(len(completions), apart)
        work = list(zip(prompts, completions, rows, strict=True))
        # A scorer that waits for other processes says how many of them it may keep busy at once.
        with ThreadPoolExecutor(getattr(self.scorer, "together", 1)) as pool:
            return list(pool.map(self._score, work))

    def _score(self, work: tuple[Any, Completion, dict[str, Any]]) -> Score:
        prompt, completion, row = work
        columns = {name: value for name, value in row.items() if name != "completion"}
        return self.scorer(text_of(completion), prompt=prompt, **columns)

    def __call__(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> Values:
        return [score.value for score in self.scores(prompts, completions, **columns)]


class RewardFailedError(TriviumError):
    """A person's reward function raised an exception."""


@dataclass
class FunctionReward:
    """A user's function with TRL's reward signature, whose faults are named instead of trained on."""

    name: str
    function: RewardFunction

    def ready(self) -> None:
        """A function needs nothing."""

    def check_arguments(self, columns: Iterable[str]) -> None:
        """Refuse a function that cannot be called as it will be, with rows of these columns."""
        names = sorted({"prompts", "completions", "completion_ids", *columns})
        try:
            inspect.signature(self.function).bind(**dict.fromkeys(names))
        except TypeError as error:
            raise TriviumError(
                f"the reward {self.name} cannot be called with {', '.join(names)} ({error}); "
                f"take them as `def {self.name}(prompts, completions, **columns)`."
            ) from None
        except ValueError:
            # Some callables of C do not say what they take.
            return

    def scores(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> list[Score]:
        """One Score per completion, with what the function returned as the reason."""
        return [
            Score(None, f"{self.name} returned None", "fault")
            if value is None
            else Score(value, f"{self.name} returned {value}", "ok")
            for value in self(prompts, completions, **columns)
        ]

    def __call__(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> Values:
        try:
            values = list(self.function(prompts=prompts, completions=completions, **columns))
        except Exception as error:
            raise RewardFailedError(self._failed(error, prompts, completions, columns)) from error
        if len(values) != len(completions):
            raise TriviumError(
                f"The reward {self.name} returned {len(values)} values for {len(completions)} completions; "
                "return one number, or None, for each."
            )
        # NaN is how some rewards say "not applicable"; it must not reach an average.
        return [None if value is None or math.isnan(value) else float(value) for value in values]

    def _failed(
        self,
        error: Exception,
        prompts: Sequence[Any],
        completions: Completions,
        columns: dict[str, Any],
    ) -> str:
        """Where a person's function failed: its file and line, and the first row it fails on alone."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if len(frames) > 1 else "its call"
        row = "no single row, only all together"
        for number, completion in enumerate(completions):
            some = {
                name: values[number : number + 1]
                for name, values in columns.items()
                if isinstance(values, (list, tuple)) and len(values) == len(completions)
            }
            try:
                list(self.function(prompts=prompts[number : number + 1], completions=[completion], **some))
            except Exception:
                asked, said = str(prompts[number])[:60], str(completion)[:60]
                row = f"the row with the prompt {asked!r} and the answer {said!r}"
                break
        what = f"{type(error).__name__}: {error}"
        return f"The reward {self.name} failed at {place} ({what}) on {row}; fix the function."


Reward = ScorerReward | FunctionReward


class FunctionScorer:
    """A user's function as a scorer of one text at a time."""

    def __init__(self, place: str) -> None:
        self.reward = reward_from_file(place)
        self.name = self.reward.name

    def __call__(self, completion: str, **columns: Any) -> Score:
        prompt = columns.pop("prompt", None)
        many = {name: [value] for name, value in columns.items()}
        return self.reward.scores([prompt], [completion], **many)[0]


def is_in_a_file(name: object) -> TypeGuard[str]:
    """Whether this is `file.py:function`."""
    return isinstance(name, str) and ".py:" in name


def reward_from_file(place: str, folder: Path | None = None) -> FunctionReward:
    """The reward function that `file.py:function` names, the file relative to `folder`."""
    file_name, _, function_name = place.rpartition(":")
    path = (folder or Path()) / file_name
    if not file_name.endswith(".py") or not function_name:
        raise TriviumError(f"A reward from a file is written file.py:function, not {place!r}.")
    if not path.is_file():
        raise TriviumError(f"The reward file {path} does not exist; its path is relative to the recipe.")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        near = nearest(function_name, [name for name, one in vars(module).items() if callable(one)])
        raise TriviumError(
            f"The reward file {path} has no function {function_name!r}{near or '; define it.'}"
        )
    return FunctionReward(function_name, function)


def reward(setting: str | dict[str, Any], folder: Path | None = None) -> tuple[Reward, float]:
    """One reward and its weight from a recipe: a name, `file.py:function`, or {name, weight, settings}."""
    if isinstance(setting, str):
        setting = {"name": setting}
    settings = dict(setting)
    name = settings.pop("name", None)
    weight = settings.pop("weight", 1.0)
    if not isinstance(name, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TriviumError(
            f"A reward needs a name and, if it has one, a weight that is a number; not {setting!r}."
        )
    if ":" in name:
        if settings:
            raise TriviumError(
                f"The reward {name} is a function and takes no settings: {', '.join(settings)}."
            )
        return reward_from_file(name, folder), float(weight)
    return ScorerReward(scorer(name, **settings)), float(weight)


@dataclass
class Combined:
    """A weighted list of rewards, whose parts an objective may normalise before it sums them."""

    rewards: list[Reward]
    weights: list[float]

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.rewards]

    def scores(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> list[list[Score]]:
        """For each reward, one Score per completion."""
        return [part.scores(prompts, completions, **columns) for part in self.rewards]

    def parts(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> list[Values]:
        """For each reward, one unweighted number, or None, per completion."""
        return [part(prompts, completions, **columns) for part in self.rewards]

    def total(self, parts: Sequence[Sequence[float | None]]) -> Values:
        """The weighted sum of what applies to each completion, None where nothing does."""
        totals: Values = []
        for values in zip(*parts, strict=True):
            applicable = [
                weight * value
                for weight, value in zip(self.weights, values, strict=True)
                if value is not None
            ]
            totals.append(sum(applicable) if applicable else None)
        return totals

    def __call__(self, prompts: Sequence[Any], completions: Completions, **columns: Any) -> Values:
        return self.total(self.parts(prompts, completions, **columns))


def ready_scorers(settings: Sequence[str | dict[str, Any]]) -> None:
    """Try every scorer of a recipe's list before work begins; files and reward models are found later."""
    for setting in settings:
        name, learned = (
            (setting, False) if isinstance(setting, str) else (setting.get("name"), "model" in setting)
        )
        if not learned and ":" not in str(name):
            part, _ = reward(setting)
            part.ready()


def combine(settings: Sequence[str | dict[str, Any]], folder: Path | None = None) -> Combined:
    """The weighted list of rewards that a recipe names."""
    if not settings:
        raise TriviumError("The list of rewards is empty; name at least one scorer or file.py:function.")
    pairs = [reward(setting, folder) for setting in settings]
    for part, _ in pairs:
        part.ready()
    return Combined([part for part, _ in pairs], [weight for _, weight in pairs])


def _rows(count: int, columns: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in columns.items():
        # What is not one value per completion (a trainer's state, say) concerns the whole batch, not a row.
        if isinstance(values, list | tuple) and len(values) == count and name != "prompt":
            for row, value in zip(rows, values, strict=True):
                row[name] = value
    return rows


def with_models(
    settings: Sequence[str | dict[str, Any]], place_of: Callable[[str], Path]
) -> list[str | dict[str, Any]]:
    """The list with every reward model as the scorer `learned`, called as the recipe calls its stage."""
    return [
        {"name": "learned", "called": one["model"], **one, "model": str(resolve(str(place_of(one["model"]))))}
        if isinstance(one, dict) and isinstance(one.get("model"), str)
        else one
        for one in settings
    ]
