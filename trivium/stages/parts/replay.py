"""Replay: what the parent learnt from, or another mixture, seen again at a share against forgetting."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trivium.data.settings import Mixture, MixtureSource
from trivium.kit.errors import TriviumError
from trivium.kit.settings import Settings
from trivium.stages.parts.inheritance import learnt_by
from trivium.stages.parts.mixtures import mixture_references
from trivium.stages.parts.stage import Reference, Work


class Replay(Settings):
    """What the parent learnt from, or `data` in its place, seen again at a share of every stretch."""

    data: Mixture | None = None
    """What is replayed; the parent's own mixture where it is left out."""
    share: float = Field(gt=0, lt=1)
    """The share of all tokens that is replayed."""


def _share(value: Any) -> Any:
    """A bare number is the share of what the parent learnt from."""
    return {"share": value} if isinstance(value, (int, float, str)) else value


Replayed = Annotated[Replay, BeforeValidator(_share, json_schema_input_type=float | Replay)]


def replay_references(replay: Replay | None, *, by_length: bool = False) -> list[Reference]:
    """The references that a replay with data of its own makes."""
    if replay is None or replay.data is None:
        return []
    return mixture_references(replay.data, "replay.data", by_length=by_length)


def replayed(
    work: Work,
    replay: Replay | None,
    start: str,
    folder: Path,
    taken: Mapping[str, Mapping[str, MixtureSource]],
    *,
    examples: bool = False,
) -> tuple[Work, dict[str, MixtureSource]]:
    """What is seen again, and the work that knows where it is; `taken` are the stage's other mixtures.

    `examples` says whether conversations, and prompts with completions, can be seen again as well.
    """
    if replay is None:
        return work, {}
    again = replay.data
    if again is None:
        learnt = learnt_by(work.stage, start, folder, examples=examples)
        work, again = replace(work, inputs={**work.inputs, **learnt.places}), learnt.mixture
        for name, source in again.items():
            if examples and source.within != (0, None):
                raise TriviumError(
                    f"{work.stage}: `replay` is a bare share, but {start} chose `{name}` by the length of "
                    "its documents, which this stage cannot do; say `replay: {share: 0.2, data: ...}`."
                )
    for setting, mixture in taken.items():
        for name in sorted(mixture.keys() & again.keys()):
            raise TriviumError(f"{work.stage}: `{name}` is in `{setting}` and in `replay`; leave it in one.")
    weights = {name: "by its tokens" if one.weight is None else one.weight for name, one in again.items()}
    work.change("replay", "nothing", {"share": replay.share, **weights})
    return work, again
