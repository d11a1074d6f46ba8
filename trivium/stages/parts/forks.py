"""Rollouts that fork: a completion is drawn, and others go on from a place in it where the model wavered.

Where to fork may depend on what was said up to there and on nothing after it: the first token at which the
likeliest one has less than a given probability, or the end of a step whose number is drawn beforehand. Then
all completions of a trunk are equally distributed from the fork on, and each weighs 1 / branches of one that
stands alone (`step_advantages.tree_advantages`). A trunk in which no such place comes stays alone; as many
further completions are drawn from the prompt in place of its branches. They are samples of their own, so the
weights are then scaled to add up to `num_generations` for every prompt: else one on which the model is sure
would weigh up to `branches` times as much as one on which it wavers. That a prompt's sum of weights depends
on what was drawn costs a bias of the order 1 / trunks, as with every self-normalised mean.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import numpy as np
from pydantic import Field

from trivium.data.steps import SEPARATOR
from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_engine import RolloutEngine
from trivium.stages.parts.rollout_worker import Rollout


class Forks(Settings):
    """How completions of a prompt share beginnings."""

    branches: Count = Field(default=2, ge=2)
    """Completions that share a beginning; `num_generations` is a multiple of it."""
    at: Literal["token", "step"] = "token"
    """Whether they part at the first uncertain token, or at the end of a step."""
    below: float = Field(default=0.7, gt=0, le=1)
    """A token is uncertain where the likeliest one has less than this probability (at temperature 1)."""
    within: Count = Field(default=3, ge=1)
    """The end of which of the first steps they part at is drawn among so many."""
    separator: str = Field(default=SEPARATOR, min_length=1)
    """The text that ends a step."""


class ForkingWorker:
    """Samples trunks, and branches from a place in each, on the trainer's own weights."""

    def __init__(self, engine: RolloutEngine, sampling: Sampling, forks: Forks) -> None:
        # Branches go on from prefixes that our own engine keeps; with another a stage refuses them.
        self.engine, self.sampling, self.forks = cast(Engine, engine), sampling, forks

    def generate(self, prompts: Sequence[Prompt], count: int, seeds: Sequence[int]) -> list[list[Rollout]]:
        self.engine.refresh()
        branches = self.forks.branches
        with self.engine.keeping_prefixes(self.engine.max_rows):
            trunks = self._drawn(prompts, [prompt.ids for prompt in prompts], seeds, count // branches)
            places = [
                [self._fork(one, seed, number) for number, one in enumerate(some)]
                for some, seed in zip(trunks, seeds, strict=True)
            ]
            grown, owners = [], []
            for number, (prompt, some) in enumerate(zip(prompts, trunks, strict=True)):
                for place, (one, fork) in enumerate(zip(some, places[number], strict=True)):
                    if fork is not None:
                        owners.append((number, place))
                        grown.append([*prompt.ids, *one.tokens[:fork]])
            branched = self._drawn(
                [prompts[number] for number, _ in owners], grown,
                [seed_of_sample(seeds[number], 1_000_003 + place) for number, place in owners],
                branches - 1,
            )  # fmt: skip
            alone = [sum(fork is None for fork in some) * (branches - 1) for some in places]
            further = self._further(prompts, seeds, alone)
        found: list[list[Rollout]] = []
        ready = dict(zip(owners, branched, strict=True))
        for number, (prompt, some) in enumerate(zip(prompts, trunks, strict=True)):
            mine: list[Rollout] = []
            for place, (one, fork) in enumerate(zip(some, places[number], strict=True)):
                mine.append(self._rollout(prompt, one.tokens, one.logprobs, one, place, fork or 0))
                for branch in ready.get((number, place), []):
                    tokens = [*one.tokens[:fork], *branch.tokens]
                    logprobs = [*one.logprobs[:fork], *branch.logprobs]
                    mine.append(self._rollout(prompt, tokens, logprobs, branch, place, fork or 0, new=True))
            for place, one in enumerate(further[number]):
                mine.append(self._rollout(prompt, one.tokens, one.logprobs, one, len(some) + place, 0))
            scale = len(mine) / sum(rollout.weight for rollout in mine)
            for rollout in mine:
                rollout.weight *= scale
            found.append(mine)
        return found

    def _drawn(
        self, prompts: Sequence[Prompt], begun: Sequence[list[int]], seeds: Sequence[int], count: int
    ) -> list[list[Completion]]:
        requests = []
        for prompt, ids, seed in zip(prompts, begun, seeds, strict=True):
            room = self.sampling.max_new_tokens - (len(ids) - len(prompt.ids))
            sampling = replace(
                self.sampling, seed=seed, logprobs=True, max_new_tokens=room,
                top_logprobs=1 if self.forks.at == "token" else 0,
            )  # fmt: skip
            requests.append(Request(ids, sampling, n=count))
        return self.engine.generate(requests)

    def _further(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], counts: Sequence[int]
    ) -> list[list[Completion]]:
        """So many independent completions of each prompt."""
        wanted = [place for place, count in enumerate(counts) if count]
        requests = [
            Request(
                prompts[place].ids,
                replace(self.sampling, seed=seed_of_sample(seeds[place], 2_000_003), logprobs=True),
                n=counts[place],
            )
            for place in wanted
        ]
        found = dict(zip(wanted, self.engine.generate(requests), strict=True))
        return [found.get(place, []) for place in range(len(counts))]

    def _fork(self, trunk: Completion, seed: int, number: int) -> int | None:
        """How many tokens of a trunk its branches share; None where it has no such place."""
        last = len(trunk.tokens) - 1
        if self.forks.at == "token":
            border = math.log(self.forks.below)
            # Branches share one token at least, or they were independent.
            for place, likely in enumerate(trunk.top_logprobs[1:], start=1):
                if max(likely.values()) < border:
                    return place
            return None
        step = 1 + int(np.random.default_rng([seed % 2**63, number]).integers(self.forks.within))
        for place in range(last):
            text = self.engine.tokenizer.decode(trunk.tokens[: place + 1])
            if text.count(self.forks.separator) >= step:
                return place + 1
        return None

    def _rollout(
        self, prompt: Prompt, tokens: Sequence[int], logprobs: Sequence[float], end: Completion, trunk: int,
        fork: int, *, new: bool = False,
    ) -> Rollout:  # fmt: skip
        stopped = end.finish_reason == "stop"
        ended = bool(tokens) and tokens[-1] in self.engine.tokenizer.stop_ids
        text = self.engine.tokenizer.decode(list(tokens[:-1] if ended else tokens))
        for stop in self.sampling.stop:
            text = text.split(stop)[0]
        rollout = Rollout(
            tokens=list(tokens), logprobs=list(logprobs), learned=[True] * len(tokens), truncated=not stopped,
            completion=[{"role": "assistant", "content": text}] if prompt.is_chat else text,
        )  # fmt: skip
        rollout.trunk, rollout.fork = trunk, fork
        rollout.weight = 1 / self.forks.branches if fork else 1.0
        rollout.drawn = len(tokens) - (fork if new else 0)
        return rollout
