"""What two exact savings of the training pass are worth: prompts computed once, useless answers left out.

python benchmarks/rl_passes.py --threads 1      # processor seconds of forward and backward, in turns, medians
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sft_worker import shared_model

from trivium.data.rows import PackedSequence, collate
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, FunctionReward
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.model.folder import load_model
from trivium.model.transformer import Transformer
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_worker import Rollout
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings

SHAPE = {"layers": 4, "width": 256, "heads": 4, "inner": 768, "vocabulary": 512}
PROMPTS, GROUP = 8, 8


class Scripted:
    """Answers of a given length, drawn from nothing: what they say does not change how long a pass takes."""

    def __init__(self, length: int) -> None:
        self.length, self.chance = length, np.random.default_rng(0)

    def generate(self, prompts: Sequence[Prompt], group: int, seeds: Sequence[int]) -> list[list[Rollout]]:
        return [[self._answer() for _ in range(group)] for _ in prompts]

    def _answer(self) -> Rollout:
        tokens = self.chance.integers(10, 500, self.length).tolist()
        return Rollout(tokens, [-1.0] * self.length, [True] * self.length, False, str(tokens[0]))


def rows_of(
    model: Transformer, prompt: int, answer: int, *, share: bool, equal: float
) -> list[PackedSequence]:
    """One rollout's rows; in a share of all groups every answer is worth the same."""
    chance = np.random.default_rng(1)
    prompts = [
        Prompt(chance.integers(10, 500, prompt).tolist(), f"{n}", {"equal": n < equal * PROMPTS}, f"{n}")
        for n in range(PROMPTS)
    ]

    def worth(completions: list[str], equal: list[bool], **columns: object) -> list[float]:
        return [0.0 if same else float(int(text) % 2) for text, same in zip(completions, equal, strict=True)]

    feed = RolloutBatches(
        model, Scripted(answer), prompts, Combined([FunctionReward("worth", worth)], [1.0]),
        ALGORITHMS["dapo"],
        RolloutSettings(steps=1, prompts_per_step=PROMPTS, num_generations=GROUP, share_prompts=share),
        sampling=Sampling(max_new_tokens=answer), seed=0,
    )  # fmt: skip
    return feed.rows(0)


def seconds(model: Transformer, rows: Sequence[PackedSequence]) -> float:
    """Processor time of one training pass over the rows."""
    objective = PolicyGradient(ALGORITHMS["dapo"], ALGORITHMS["dapo"].numbers)
    start = time.process_time()
    for row in rows:
        objective.loss(model, collate([row])).sum.backward()
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    wishes = parser.parse_args()
    torch.set_num_threads(wishes.threads)
    with tempfile.TemporaryDirectory() as folder:
        shared_model(Path(folder), SHAPE)
        model = load_model(Path(folder), dtype=torch.float32)
    print(f"{PROMPTS} prompts x {GROUP} answers, {SHAPE}; medians of {wishes.rounds}")
    for prompt, answer in ((32, 64), (128, 64), (384, 64)):
        plans = {
            "every prompt with every answer": rows_of(model, prompt, answer, share=False, equal=0),
            "prompts once": rows_of(model, prompt, answer, share=True, equal=0),
            "prompts once, half of the groups left out": rows_of(
                model, prompt, answer, share=True, equal=0.5
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in plans}
        for _ in range(wishes.rounds + 1):
            for name, rows in plans.items():
                times[name].append(seconds(model, rows))
        slowest = statistics.median(next(iter(times.values()))[1:])
        print(f"prompts of {prompt} tokens, answers of {answer}")
        for name, found in times.items():
            middle = statistics.median(found[1:])
            print(f"  {name:42s} {middle:7.2f} s  x{slowest / middle:.2f}")


if __name__ == "__main__":
    main()
