"""Processes share out what they generate: who is slow takes less, and no text depends on it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from test_parallel import meet, together
from test_rlvr import even
from tuning import own, small_model

from trivium.generate.engine import Engine
from trivium.generate.exactness import Exactness
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, FunctionReward
from trivium.kit import processes
from trivium.kit.files import read_json, write_json
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.stages.parts import shared_generation
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_worker import EngineWorker, Rollout
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings
from trivium.stages.parts.shared_generation import SharedRequests, may_steal

WORDS = "the river and the miller counts in the hills"
PROMPTS = 12


class Elsewhere:
    """A worker that is not our engine alone: it is asked for a few prompts at a time."""

    def __init__(self, worker: EngineWorker) -> None:
        self.worker, self.engine = worker, worker.engine

    def generate(self, prompts: Any, count: int, seeds: Any) -> list[list[Rollout]]:
        return self.worker.generate(prompts, count, seeds)


def batches(*, engine_alone: bool = True) -> RolloutBatches:
    """Twelve prompts of unlike lengths."""
    model, tokenizer, sampling = small_model(own()), own(), Sampling(max_new_tokens=12)
    texts = [f"{number} {WORDS[: 3 + 7 * number % 40]}" for number in range(PROMPTS)]
    worker: Any = EngineWorker(Engine(model, tokenizer, max_rows=6), sampling)
    return RolloutBatches(
        model, worker if engine_alone else Elsewhere(worker),
        [Prompt(tokenizer.encode(text), text, {}, text) for text in texts],
        Combined([FunctionReward("even", even)], [1.0]), ALGORITHMS["dapo"],
        RolloutSettings(steps=4, prompts_per_step=PROMPTS, num_generations=3), sampling=sampling, seed=3,
    )  # fmt: skip


def drawn(feed: RolloutBatches) -> list[Any]:
    return [
        [one.prompt_index, one.rewards, [[r.tokens, r.logprobs, r.advantages.tolist()] for r in one.rollouts]]
        for one in feed._groups(0, 0, PROMPTS)
    ]


def generate(rank: int, size: int, port: int, folder: str, engine_alone: bool, exact: bool) -> None:
    """The last process does not get on before all others have nothing left to take."""
    meet(rank, size, port)
    feed = batches(engine_alone=engine_alone)
    engine: Any = feed.worker.engine  # type: ignore[attr-defined]
    if not exact:
        engine._forward.exactness = Exactness()
    store, step, answered = distributed.distributed_c10d._get_default_store(), engine.step, [0]
    submit = engine.submit

    def slow() -> bool:
        while rank == size - 1 and store.add("done", 0) < size - 1:
            time.sleep(0.01)
        return bool(step())

    def counting(request: Any) -> Any:
        answered[0] += 1
        return submit(request)

    engine.step, engine.submit = slow, counting
    gather = processes.everyone
    finished: list[int] = []

    def everyone(value: Any) -> list[Any]:
        # The first thing after its own requests that a process says to the others is what it answered.
        if isinstance(value, tuple) and not finished:
            finished.append(store.add("done", 1))
        return gather(value)

    shared_generation.everyone = everyone
    found = drawn(feed)
    write_json(Path(folder) / f"{rank}.json", {"rollouts": found, "answered": answered[0]})
    processes.stop()


@pytest.mark.parametrize(
    ("size", "engine_alone"), [(2, True), (4, True), (2, False)], ids=["2", "4", "2-any-worker"]
)
def test_a_slow_process_answers_less_and_the_rollouts_are_the_same(tmp_path, size, engine_alone):
    torch.set_num_threads(1)
    whole = tmp_path / "whole.json"
    write_json(whole, drawn(batches()))
    together(generate, size, str(tmp_path), engine_alone, True)
    said = [read_json(tmp_path / f"{rank}.json") for rank in range(size)]
    assert all(one["rollouts"] == read_json(whole) for one in said)
    assert sum(one["answered"] for one in said) == PROMPTS
    # No more than fit at once, where a fixed share were three or six.
    assert said[-1]["answered"] <= 2


def test_shares_are_fixed_where_a_text_depends_on_what_is_beside_it(tmp_path):
    """On a processor a run resumes bit for bit, so who answers must not follow from the clock."""
    together(generate, 2, str(tmp_path), True, False)
    assert [read_json(tmp_path / f"{rank}.json")["answered"] for rank in range(2)] == [6, 6]


@pytest.mark.parametrize(
    ("requests", "samples", "max_rows", "at_once"),
    [(8, 8, 64, 32), (8, 16, 64, 32), (128, 1, 64, 32), (128, 1, 8, 8), (128, 64, 32, 32), (128, 3, 999, 96)],
)
def test_enough_is_under_way_to_fill_the_engine_and_no_more_than_a_share(
    requests, samples, max_rows, at_once, monkeypatch
):
    """Of two processes: 32 sequences if there are so many, else half of an even share, if that fits."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(shared_generation.machine, "device", lambda: "cpu")
    assert SharedRequests(range(requests), iter(())).at_once(samples, max_rows) == at_once


def test_a_row_that_ends_makes_room_for_the_next_request():
    """Even while other samples of its own request go on."""
    engine = Engine(small_model(own()), own(), max_rows=4)
    asked = [
        Request(own().encode(text), Sampling(max_new_tokens=30, seed=1), n=4) for text in ("2 + 2", "the")
    ]
    ((*first,), _) = engine.generate(asked)
    stop = next(token for token in first[0].tokens[5:] if token not in first[1].tokens)
    ends = replace(asked[0], sampling=replace(asked[0].sampling, stop_ids=(stop,)))
    submit, unfinished = engine.submit, []

    def noted(request):
        unfinished.append(sum(handle.results.count(None) for handle in engine._under_way))
        return submit(request)

    engine.submit = noted
    engine.generate_from(iter([ends, asked[1]]), 4)
    assert unfinished[0] == 0
    assert unfinished[1] == 3


def test_on_a_gpu_a_whole_share_is_under_way_where_it_fits(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(shared_generation.machine, "device", lambda: "cuda:0")
    assert SharedRequests(range(128), iter(())).at_once(3, 999) == 192


def test_what_is_promised_decides_whether_shares_may_depend_on_speed():
    model = small_model(own())
    assert may_steal(Engine(model, own()).exactness, model)
    assert not may_steal(Exactness(), model)
    assert not may_steal(None, model)
