"""What a step is worth, estimated by going on from it: roll-outs of prefixes, each graded by its outcome.

Math-Shepherd (2312.08935): from the end of step k the model completes the solution N times; the soft label is
the share of completions that reach the right answer, the hard label whether any does. Where only the first
error is wanted, binary search over k needs about log2(steps) prefixes in place of all (OmegaPRM, 2406.06592),
if a wrong step cannot be made good later.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined
from trivium.kit.fingerprint import fingerprint
from trivium.stages.parts.prompts import Prompt


@dataclass
class Solution:
    """One solution to a prompt, cut into steps."""

    prompt: Prompt
    text: str
    steps: list[str]
    ends: list[int]
    """The places in the text after each step and its separator."""
    right: bool | None
    """Whether its answer is right; None where the scorer could not say."""

    def prefix(self, steps: int) -> tuple[Prompt, str]:
        """The text up to the end of so many steps, to be gone on from."""
        return self.prompt, self.text[: self.ends[steps - 1]]


@dataclass
class StepRollouts:
    """Draws and grades completions; remembers what prefixes of a prompt were worth, and counts the cost."""

    engine: Engine
    grader: Combined
    sampling: Sampling
    seed: int
    threshold: float = 1.0
    rollouts: int = 8
    least_share: float = 0.0
    """A prefix of which no more roll-outs are right than this share is taken to be wrong."""
    known: dict[str, float] = field(default_factory=dict)
    """By prompt and prefix, the share of roll-outs that are right; NaN where none was judged."""
    cost: dict[str, int] = field(
        default_factory=lambda: {"solution_tokens": 0, "rollouts": 0, "tokens": 0, "unknown_prefixes": 0}
    )

    def draw(self, prompts: Sequence[Prompt], count: int) -> list[tuple[Prompt, str]]:
        """`count` solutions to each prompt."""
        found = self._completed([(prompt, "") for prompt in prompts], count, "solution_tokens")
        return [(prompt, text) for prompt, texts in zip(prompts, found, strict=True) for text in texts]

    def right(self, solutions: Sequence[tuple[Prompt, str]]) -> list[bool | None]:
        """Whether each solution comes to the right answer."""
        if not solutions:
            return []
        # A solution that came with the row is graded as such, and is no column.
        names = sorted({name for prompt, _ in solutions for name in prompt.columns} - {"completions"})
        scores = self.grader(
            [prompt.content for prompt, _ in solutions],
            [
                [{"role": "assistant", "content": text}] if prompt.is_chat else text
                for prompt, text in solutions
            ],
            **{name: [prompt.columns.get(name) for prompt, _ in solutions] for name in names},
        )
        return [None if score is None else score >= self.threshold for score in scores]

    def values(self, prefixes: Sequence[tuple[Prompt, str]]) -> list[float]:
        """The share of right completions of each prefix; one that is known is not sampled again.

        NaN where there is no room for a roll-out, or the grader could judge none: nothing is known then.
        """
        keys = [fingerprint([prompt.id, prompt.ids, text]) for prompt, text in prefixes]
        fresh = {key: pair for key, pair in zip(keys, prefixes, strict=True) if key not in self.known}
        texts = self._completed(list(fresh.values()), self.rollouts, "tokens")
        self.cost["rollouts"] += sum(map(len, texts))
        pairs = [
            (prompt, text + said)
            for (prompt, text), some in zip(fresh.values(), texts, strict=True)
            for said in some
        ]
        verdicts = iter(self.right(pairs))
        for key, some in zip(fresh, texts, strict=True):
            judged = [verdict for verdict in (next(verdicts) for _ in some) if verdict is not None]
            self.known[key] = sum(judged) / len(judged) if judged else math.nan
            self.cost["unknown_prefixes"] += not judged
        return [self.known[key] for key in keys]

    def _completed(self, prefixes: Sequence[tuple[Prompt, str]], count: int, counter: str) -> list[list[str]]:
        """`count` completions of each prefix, drawn from a seed of its own; none where there is no room."""
        requests, asked = [], []
        for prompt, text in prefixes:
            begun = self.engine.tokenizer.encode(text) if text else []
            most = self.sampling.max_new_tokens
            room = min(most - len(begun), self.engine.window - len(prompt.ids) - len(begun))
            asked.append(room > 0)
            if room > 0:
                seed = int(fingerprint([self.seed, prompt.id, text]), 16) % 2**63
                changed = {"max_new_tokens": room, "seed": seed}
                requests.append(
                    Request([*prompt.ids, *begun], Sampling(**{**vars(self.sampling), **changed}), n=count)
                )
        found = iter(self.engine.generate(requests))
        texts = []
        for one in asked:
            completions = next(found) if one else []
            self.cost[counter] += sum(len(completion.tokens) for completion in completions)
            texts.append([completion.text for completion in completions])
        return texts


def values_of_every_step(rollouts: StepRollouts, solutions: Sequence[Solution]) -> list[list[float]]:
    """What each step of each solution is worth; the last one what its own answer is."""
    prefixes = [one.prefix(k) for one in solutions for k in range(1, len(one.steps))]
    found = iter(rollouts.values(prefixes))
    return [[*(next(found) for _ in one.steps[1:]), float(bool(one.right))] for one in solutions]


def values_to_first_error(rollouts: StepRollouts, solutions: Sequence[Solution]) -> list[list[float]]:
    """1 before the first step from which too few roll-outs come to the right answer and 0 from it on.

    A solution with the right answer is right throughout, without a roll-out. Where a prefix says nothing
    (NaN), the search ends, and the steps between its bounds are NaN.
    """
    # The first `low` steps are right, and of the first `high` steps the last one is not.
    bounds = {
        place: (0, len(one.steps)) for place, one in enumerate(solutions) if not one.right and one.steps
    }
    ended: set[int] = set()
    while open_ones := [
        place for place, (low, high) in bounds.items() if high - low > 1 and place not in ended
    ]:
        middles = {place: sum(bounds[place]) // 2 for place in open_ones}
        found = rollouts.values([solutions[place].prefix(middles[place]) for place in open_ones])
        for place, value in zip(open_ones, found, strict=True):
            low, high = bounds[place]
            if math.isnan(value):
                ended.add(place)
            else:
                bounds[place] = (
                    (middles[place], high) if value > rollouts.least_share else (low, middles[place])
                )
    return [
        _labels(len(one.steps), *bounds[place]) if place in bounds else [1.0] * len(one.steps)
        for place, one in enumerate(solutions)
    ]


def _labels(steps: int, low: int, high: int) -> list[float]:
    """1 for the first `low` steps, 0 from step `high` on (counted from 1), NaN for what lies between."""
    return [1.0] * low + [math.nan] * (high - 1 - low) + [0.0] * (steps - high + 1)


def worked_steps(columns: Mapping[str, Any]) -> list[str] | None:
    """The worked lines of a problem, where its row holds them: `steps`, or the world's truth."""
    truth = columns.get("truth")
    listed = columns.get("steps") or (truth.get("steps") if isinstance(truth, Mapping) else None)
    known = isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed)
    return list(listed) if known else None  # type: ignore[arg-type]
