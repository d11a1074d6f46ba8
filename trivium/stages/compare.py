"""Two models answer the same prompts, judges score both, and the share of prompts won says who is better."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from trivium.curate.examination import Examination, Examined
from trivium.data.settings import Mixture
from trivium.evals.pairwise import outcome
from trivium.grade.rewards import Combined, ready_scorers
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.numbers import Count
from trivium.learn.settings import Settings
from trivium.stages.parts.documents import PROMPTS, ROWS, mixture_references
from trivium.stages.parts.gauges import drift_from
from trivium.stages.parts.judges import Named, file_references, judges_of, model_references, reward_files
from trivium.stages.parts.model_folders import folder_of
from trivium.stages.parts.prompts import Prompt, answers_to, read_prompts
from trivium.stages.parts.stage import Product, Reference, Stage, Work


class BestOf(Settings):
    """The first model draws several answers to a prompt and hands in the one that these rewards like most."""

    n: Count = Field(ge=2)
    """How many answers to choose from."""
    by: list[Named] = Field(min_length=1)
    """The rewards that choose."""


class Compare(Stage):
    """Let two models answer the same prompts and count who is judged better."""

    kind: Literal["compare"]
    """Compare two models by win rate."""
    formerly: ClassVar[Mapping[str, str]] = {"wording": "prompt_template"}
    formerly_kind: ClassVar[tuple[str, ...]] = ("duel",)
    version: ClassVar[int] = 2
    produces: ClassVar[Product] = "report"

    start: str = Field(alias="from")
    """The model."""
    against: str
    """The model it is compared with."""
    data: Mixture
    """The prompts."""
    judge: list[Named] = Field(min_length=1)
    """Who decides: scorers, functions or reward models, summed with their weights."""
    best_of: BestOf | None = None
    """Choose the best of several answers by a reward, and measure the curve over n."""
    temperature: float = Field(default=1.0, ge=0)
    """The sampling temperature; 0 is greedy."""
    max_new_tokens: Count = Field(default=64, ge=1)
    """The longest answer in tokens."""
    prompt_template: str | None = None
    """The prompt template for a model without a chat template, such as `Question: {prompt}\\nAnswer:`."""

    def references(self) -> list[Reference]:
        found = [Reference("from", self.start, ("model",)), Reference("against", self.against, ("model",))]
        found += [
            *mixture_references(self.data, needs=ROWS, without=PROMPTS),
            *model_references(self.judge, "judge"),
        ]
        chosen_by = [] if self.best_of is None else self.best_of.by
        found += model_references(chosen_by, "best_of.by")
        return found + file_references([*self.judge, *chosen_by])

    def examines(self) -> Examined:
        return Examined([Examination(**one.at(one.path).model_dump()) for one in self.data.values()])

    def counted(self) -> dict[str, Any]:
        chosen_by = [] if self.best_of is None else self.best_of.by
        return {**super().counted(), "reward_files": reward_files([*self.judge, *chosen_by])}

    def check_machine(self) -> None:
        ready_scorers([*self.judge, *([] if self.best_of is None else self.best_of.by)])

    def run(self, work: Work) -> dict[str, Any]:
        judge = judges_of(self.judge, work)
        folders = [folder_of(work, name) for name in (self.start, self.against)]
        tokenizer = folders[0].tokenizer
        room = min(folder.config.context for folder in folders) - self.max_new_tokens
        prompts = read_prompts(work, self.data, tokenizer, room=room, prompt_template=self.prompt_template)
        if len({folder.tokenizer.fingerprint for folder in folders}) > 1:
            raise TriviumError(
                f"{work.stage}: {self.start} and {self.against} have different tokenizers, so their answers "
                "cannot be laid side by side token by token; name two models of one family tree."
            )
        several = 1 if self.best_of is None else self.best_of.n
        models = [folder.load(torch.float32) for folder in folders]
        drawn: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens}
        first, second = (
            answers_to(prompts, model, tokenizer, n=n, seed=work.seed, **drawn)
            for model, n in zip(models, (several, 1), strict=True)
        )
        found: dict[str, Any] = {}
        mine = [some[0] for some in first]
        if self.best_of is not None:
            chosen = self._curve(judges_of(self.best_of.by, work), judge, prompts, first)
            found["best_of"] = [row for row, _ in chosen]
            mine = chosen[-1][1]
        scores = _scores(judge, prompts, mine), _scores(judge, prompts, [some[0] for some in second])
        found |= outcome(*scores)
        if self.best_of is None:
            asked = [prompt.ids for prompt in prompts[:64]]
            longest = self.max_new_tokens
            found["kl"] = drift_from(models[1], models[0], tokenizer, asked, longest=longest, seed=work.seed)
        with whole_folder(work.output("report")) as report:
            write_json(report / "compare.json", found)
            log = MetricsLog(report / "answers.jsonl")
            for prompt, one, other, *both in zip(prompts, mine, second, *scores, strict=True):
                said = {"answers": [one, other[0]], "scores": both}
                log.write({"id": prompt.id, "prompt": prompt.content, **said})
        rate = found["win_rate"]
        work.say(
            f"{self.start} beats {self.against} in {rate['value']:.1%} of {found['prompts']} prompts "
            f"({rate['low']:.1%} to {rate['high']:.1%}; {found['ties']:.0%} ties)"
        )
        return found

    def _curve(
        self, chooser: Combined, judge: Combined, prompts: Sequence[Prompt], drawn: Sequence[Sequence[str]]
    ) -> list[tuple[dict[str, float], list[str]]]:
        """For every power of two up to n: the divergence, what the chooser and what the judge make of it."""
        assert self.best_of is not None
        liked = np.stack(
            [_scores(chooser, prompts, [some[place] for some in drawn]) for place in range(self.best_of.n)], 1
        )
        sizes = [2**power for power in range(int(math.log2(self.best_of.n)) + 1)]
        found = []
        for size in sizes if sizes[-1] == self.best_of.n else [*sizes, self.best_of.n]:
            best = np.nanargmax(np.nan_to_num(liked[:, :size], nan=-np.inf), 1)
            texts = [some[place] for some, place in zip(drawn, best, strict=True)]
            row = {
                "n": float(size),
                # What choosing the best of n costs in nats, exactly where no two answers tie.
                "kl": math.log(size) - (size - 1) / size,
                "proxy": float(np.nanmean(liked[np.arange(len(best)), best])),
                "truth": float(np.nanmean(_scores(judge, prompts, texts))),
            }
            found.append((row, texts))
        return found


def _scores(judge: Combined, prompts: Sequence[Prompt], texts: Sequence[str]) -> np.ndarray:
    """One number per answer, NaN where no judge could say."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    found = judge([prompt.content for prompt in prompts], list(texts), **columns)
    return np.array([np.nan if value is None else value for value in found], dtype=float)
