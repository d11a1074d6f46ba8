"""Reward models among the rewards of a recipe: references in its graph, folders when it runs."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from trivium.grade.rewards import Combined, combine, reward, with_models
from trivium.kit.errors import TriviumError
from trivium.stages.parts.stage import Reference, Work


def _known(one: str | dict[str, Any]) -> str | dict[str, Any]:
    """Refuse a scorer, or a setting of one, that there is not; files and models are found when it runs."""
    name, learnt = (one, False) if isinstance(one, str) else (one.get("name"), "model" in one)
    if not learnt and ":" not in str(name):
        try:
            reward(one)
        except TriviumError as error:
            raise ValueError(str(error)) from None
    return one


Named = Annotated[str | dict[str, Any], AfterValidator(_known)]
"""A scorer, `file.py:function`, or a mapping: {name: math, weight: 0.5}, {model: rm} for a reward stage."""


def model_references(rewards: Sequence[Named], setting: str = "reward") -> list[Reference]:
    """The reward models that a list of rewards names."""
    return [
        Reference(f"{setting}.{place}.model", one["model"], ("reward",))
        for place, one in enumerate(rewards)
        if isinstance(one, dict) and isinstance(one.get("model"), str)
    ]


def file_references(rewards: Sequence[Named], setting: str = "reward_files") -> list[Reference]:
    """The files that hold rewards as functions."""
    return [Reference(setting, file, ("source",)) for file in reward_files(rewards)]


def reward_files(rewards: Sequence[Named]) -> list[str]:
    """The files that hold rewards as functions, each once."""
    names = [one if isinstance(one, str) else str(one.get("name", "")) for one in rewards]
    return sorted({name.rpartition(":")[0] for name in names if ":" in name})


def judges_of(rewards: Sequence[Named], work: Work) -> Combined:
    """The weighted list of rewards that a recipe names."""
    return combine(with_models(rewards, work.path), work.base)
