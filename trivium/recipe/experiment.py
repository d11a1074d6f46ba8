"""An experiment: the same stages under several arms and seeds, what is measured, and what is claimed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field, model_validator

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.recipe.read import laid_over
from trivium.stages.parts.stage import Stage

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
MOST_CELLS = 2000
"""Arms times seeds; every one of them is a whole run of the recipe."""
PLAIN = ""
"""The recipe as written, before any arm is laid over it; no arm can be called so."""


class Measure(Settings):
    """One number of every arm and seed."""

    stage: str
    """The stage that holds the number."""
    take: str
    """Of an `evaluate` stage `task: measure`, or `task: measure, group=value`; else a column of its log."""
    since: str | None = None
    """Another stage of the same arm and seed, whose number is taken off."""


class Claim(Settings):
    """What an arm is said to do, and the control that must not do it."""

    says: str
    """The claim in words."""
    on: str
    """The measure."""
    arm: str
    """The arm the claim is about."""
    against: str | None = None
    """The arm it is compared with, seed by seed; without one the arm's own number is judged."""
    above: float | None = None
    """The bound that the effect must lie above."""
    below: float | None = None
    """The bound that the effect must lie below."""
    control: str
    """An arm without what is said to matter: where it does the same, the claim falls."""

    @model_validator(mode="after")
    def _one_bound(self) -> Claim:
        if self.above is None and self.below is None and self.against is not None:
            self.above = 0.0
        if (self.above is None) == (self.below is None):
            raise ValueError("a claim needs one of `above` and `below`")
        if self.arm in (self.against, self.control):
            raise ValueError("`arm` cannot be its own `against` or `control`")
        return self

    @property
    def bound(self) -> float:
        """What the number has to pass."""
        found = self.above if self.above is not None else self.below
        assert found is not None
        return found

    @property
    def sign(self) -> int:
        """1 where the number has to lie above the bound, -1 where below."""
        return 1 if self.above is not None else -1


class ComputeCurve(Settings):
    """A falling number of the training log, drawn against all FLOPs that an arm spent."""

    take: str = "bits_per_byte"
    """The column of the log."""
    stages: list[str] = Field(min_length=1)
    """The stages along which it is drawn; what each cost counts for those after it."""
    targets: list[float] = []
    """The values whose price is reported; two between the arms' ends, if not said."""


class Ladder(Settings):
    """Growing sizes of one stage: their losses forecast the next size's, before that one is trained."""

    depths: list[Annotated[int, Field(ge=1)]] = Field(min_length=3)
    """The depths that are fitted, in rising order."""
    next: int | None = None
    """The depth that is forecast, trained and judged; one step beyond the last where it is left out."""
    stage: str | None = None
    """The stage that is trained in every size; the only `pretrain` stage where it is left out."""
    take: str = "bits_per_byte"
    """The column of its log that is forecast."""
    tokens: list[Annotated[Count, Field(ge=1)]] | None = None
    """The token budget of every depth, the next one last; the stage's own in all where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, written: Any) -> Any:
        """A list is the depths; the first may be written `depth 2`."""
        if not isinstance(written, list):
            return written
        return {"depths": [one.removeprefix("depth ") if isinstance(one, str) else one for one in written]}

    @model_validator(mode="after")
    def _rising(self) -> Ladder:
        if self.next is None:
            self.next = 2 * self.depths[-1] - self.depths[-2]
        if sorted({*self.depths, self.next}) != [*self.depths, self.next]:
            raise ValueError("the depths of a ladder rise, and `next` is larger than all of them")
        if self.tokens is not None and len(self.tokens) != len(self.depths) + 1:
            raise ValueError(
                f"`tokens` of a ladder needs {len(self.depths) + 1} numbers, the next depth's last"
            )
        return self

    def named(self, stages: Mapping[str, Any]) -> str:
        """The stage that is trained in every size."""
        able = [name for name, one in stages.items() if one.kind == "pretrain"]
        if self.stage is None and len(able) == 1:
            return able[0]
        if self.stage not in able:
            raise TriviumError(
                f"a ladder needs the `stage` to train; one of {', '.join(able) or 'none here'}."
            )
        return self.stage

    def arms(self, stage: str) -> dict[str, dict[str, Any]]:
        """An arm for every depth, the next one last."""
        assert self.next is not None
        budgets = (
            [{}] * (len(self.depths) + 1) if self.tokens is None else [{"tokens": one} for one in self.tokens]
        )
        return {
            rung(depth): {stage: {"model": {"depth": depth}, **budget}}
            for depth, budget in zip((*self.depths, self.next), budgets, strict=True)
        }


def rung(depth: int) -> str:
    """What a ladder calls the arm of a depth."""
    return f"depth-{depth}"


FORECAST = "forecast"
"""The stage that a ladder adds."""


class Experiment(Settings):
    """Arms are laid over the stages as a recipe over the one it extends; each runs with every seed."""

    question: str = ""
    """What the experiment asks."""
    seeds: int | Annotated[list[int], Field(min_length=1)] = Field(default=3)
    """The seeds, or how many."""
    arms: dict[Name, dict[str, Any] | None] = {}
    """Changes laid over the stages, by name; two or more, unless there is a `ladder`, which makes its own."""
    measure: dict[str, Measure] = {}
    """The numbers taken of every arm and seed, by name."""
    claims: list[Claim] = []
    """What is claimed, and the control that must fail."""
    ladder: Ladder | None = None
    """Growing sizes whose losses forecast the next one's; it stands in the place of arms and claims."""
    compute: ComputeCurve | None = None
    """A curve of what the arms reach for how many FLOPs."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Experiment:
        if self.ladder is None and (len(self.arms) < 2 or not self.measure or not self.claims):
            raise ValueError(
                "an experiment needs two `arms`, a `measure` and a claim in `claims`, or a `ladder`"
            )
        if self.ladder is not None and self.arms:
            raise ValueError("a `ladder` makes the arms itself; leave `arms` or `ladder` out")
        count = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        if count < 1:
            raise ValueError("`seeds` needs to be one at least")
        if count * len(self.arms) > MOST_CELLS:
            raise ValueError(
                f"{len(self.arms)} arms with {count} seeds each are more than {MOST_CELLS} runs; "
                "give fewer `seeds`"
            )
        if isinstance(self.seeds, list) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` names one of them twice")
        for claim in self.claims:
            if claim.on not in self.measure:
                raise ValueError(f"no measure is called `{claim.on}`; there are {', '.join(self.measure)}")
            for arm in filter(None, (claim.arm, claim.against, claim.control)):
                if arm not in self.arms:
                    raise ValueError(f"no arm is called `{arm}`; there are {', '.join(self.arms)}")
        return self

    def numbers(self, first: int) -> list[int]:
        """The seeds: those named, or so many from the recipe's own on."""
        return [first + place for place in range(self.seeds)] if isinstance(self.seeds, int) else self.seeds

    def arm(self, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's content with an arm laid over its stages."""
        return {**content, "stages": laid_over(content["stages"], self.arms[name] or {})}


@dataclass(frozen=True)
class Expanded:
    """An experiment as one graph: a stage that is the same in several arms or seeds stands there once."""

    stages: Mapping[str, Stage]
    meant: Mapping[str, Mapping[str, str]]
    """For every stage of the graph, what the names written in it stand for."""
    cells: Mapping[tuple[str, int], Mapping[str, str]]
    """For every arm and seed, the graph's name of each stage."""
    after: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Stages that wait for others of which they read nothing."""


def expand(
    arms: Mapping[str, Mapping[str, Stage]],
    seeds: Sequence[int],
    finished: Callable[[Mapping[str, Stage]], Mapping[str, Stage]] = dict,
) -> Expanded:
    """One graph of all arms under all seeds; `arms` holds the plain recipe, too, which gives plain names.

    `base` is the same everywhere, `base.2` that of seed 2, `mid.replay.2` that of the arm `replay`.
    `finished` is what becomes of the stages of an arm once their seed is known.
    """
    seeded = {
        (arm, seed): finished(
            {
                name: stage if stage.seed is not None else stage.model_copy(update={"seed": seed})
                for name, stage in stages.items()
            }
        )
        for arm, stages in arms.items()
        for seed in seeds
    }
    identities = {cell: _identities(stages) for cell, stages in seeded.items()}
    graph: dict[str, Stage] = {}
    meant: dict[str, dict[str, str]] = {}
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for (arm, seed), stages in seeded.items():
        if arm == PLAIN:
            continue
        names = {name: _name(name, identities[arm, seed][name], identities) for name in stages}
        cells[arm, seed] = names
        for name, stage in stages.items():
            graph.setdefault(names[name], stage)
            meant.setdefault(names[name], names)
    return Expanded(graph, meant, cells)


def _identities(stages: Mapping[str, Stage]) -> dict[str, str]:
    """For every stage a text that is the same where its result is: what counts of it and of what it needs."""
    found: dict[str, str] = {}

    def identity(name: str, above: tuple[str, ...]) -> str:
        # A circle is left for the graph to complain about.
        if name not in found and name not in above:
            stage = stages[name]
            parents = sorted({one.name.partition("@")[0] for one in stage.references()} & stages.keys())
            inputs = [identity(parent, (*above, name)) for parent in parents]
            found[name] = json.dumps([stage.counted(), parents, inputs], sort_keys=True)
        return found.get(name, name)

    for name in stages:
        identity(name, ())
    return found


def _name(stage: str, identity: str, identities: Mapping[tuple[str, int], Mapping[str, str]]) -> str:
    """The stage, the first arm if it is not the plain recipe's, and the first seed if not all share it."""
    same = [cell for cell, found in identities.items() if found.get(stage) == identity]
    arm, seed = next((cell for cell in same if cell[0] == PLAIN), same[0])
    parts = [stage] if arm == PLAIN else [stage, arm]
    everywhere = all((arm, other) in same for one, other in identities if one == arm)
    return ".".join(parts if everywhere else [*parts, str(seed)])


def forecast_between(found: Expanded, ladder: Ladder, stage: str, make: Callable[..., Stage]) -> Expanded:
    """The graph with a forecast from the ladder's sizes, for which the next size waits."""
    assert ladder.next is not None

    def trained(depth: int) -> list[str]:
        return list(
            dict.fromkeys(names[stage] for (arm, _), names in found.cells.items() if arm == rung(depth))
        )

    made = make(of=[trained(depth) for depth in ladder.depths], take=ladder.take)
    return replace(
        found,
        stages={**found.stages, FORECAST: made},
        meant={**found.meant, FORECAST: {}},
        cells={cell: {**names, FORECAST: FORECAST} for cell, names in found.cells.items()},
        after={name: [FORECAST] for name in trained(ladder.next)},
    )
