"""Requests that several processes answer: the longest first, and who is free takes the next ones.

Processes that each had a fixed share would wait for the one with the longest answers. Here a request goes to
the first process that has room (work stealing from one list, as in list scheduling with the longest jobs
first, Graham 1969). Which of them answers must not show: each request has a seed of its own, and the engine
promises that a text does not depend on what else is computed beside it. Where it promises that only within
rounding though a run is to resume bit for bit, shares are fixed; where a run resumes within rounding only, as
on a GPU without `deterministic`, texts may depend on who answered, as they may on the rows beside them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from trivium.generate.engine import Engine
from trivium.generate.exactness import BIT_EXACT, Exactness
from trivium.generate.requests import Completion, Request
from trivium.kit import machine
from trivium.kit.processes import everyone, shared_counter, world
from trivium.learn.determinism import WITHIN_ROUNDING, how_it_resumes
from trivium.model.transformer import Transformer

Answer = TypeVar("Answer")
FULL_ROWS = 32
"""With fewer sequences at once a processor decodes each of them slower; a GPU gains by all that fit."""


@dataclass
class SharedRequests:
    """The requests of one call; to iterate is to take their numbers, each given to one process only."""

    order: Sequence[int]
    """Numbers of requests, in the order in which they are given away."""
    places: Iterator[int]
    """Places in that order that are this process's."""

    def __iter__(self) -> Iterator[int]:
        for place in self.places:
            if place >= len(self.order):
                return
            yield self.order[place]

    def at_once(self, samples: int, max_rows: int) -> int:
        """How many sequences a process has under way: half of an even share, if that fits.

        Something has to be left for the others, but not at the price of an engine that is half empty.
        """
        share = -(-len(self.order) // world().size) * samples
        least = share if machine.device() != "cpu" else FULL_ROWS
        return max(1, min(max(share // 2, least), share, max_rows))

    def answered_by(self, engine: Engine, requests: Sequence[Request]) -> dict[int, list[Completion]]:
        """The completions of those requests that this process takes, by their numbers."""
        taken: list[int] = []

        def mine() -> Iterator[Request]:
            for number in self:
                taken.append(number)
                yield requests[number]

        # All have as many samples.
        found = engine.generate_from(mine(), self.at_once(requests[0].n, engine.max_rows))
        return dict(zip(taken, found, strict=True))


def answered_by_all(
    lengths: Sequence[int], answer: Callable[[SharedRequests], dict[int, Answer]], *, steals: bool
) -> tuple[list[Answer], float]:
    """What all processes answer, in the order of the requests; and how many seconds they waited on average.

    `lengths` are the requests' expected lengths: [requests]. `answer` takes numbers of requests until none
    is left, and returns the answer to each.
    """
    here = world()
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    places = shared_counter() if steals else iter(range(here.rank, len(order), here.size))
    start = time.perf_counter()
    mine = answer(SharedRequests(order, places))
    said = everyone((mine, time.perf_counter() - start))
    answers = {number: one for some, _ in said for number, one in some.items()}
    seconds = [took for _, took in said]
    waited = max(seconds) - sum(seconds) / len(seconds)
    return [answers[number] for number in range(len(lengths))], waited


def may_steal(exactness: Exactness | None, model: Transformer) -> bool:
    """Whether it may depend on speed which process answers; all processes say the same."""
    exact = exactness is not None and exactness.promise == BIT_EXACT
    return all(everyone(exact or how_it_resumes(model.device) == WITHIN_ROUNDING))
