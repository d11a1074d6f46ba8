"""What holds of every kind of stage: killed and resumed, in two processes, with little data, as planned."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import Bench
from lines import BASES, DOCUMENTS, INHERITS, TRAINS, put
from lines_sources import PLACES, Place
from ports import free_port
from products import differences
from pydantic import ValidationError
from tiny_run import Inputs, Seen, run_stage

from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.model.adapters import load_adapter
from trivium.model.attention import Documents
from trivium.model.folder import load_model

TIMED = ("tokens_per_second", "data_wait", "rollout_seconds", "generation_seconds", "scoring_seconds")
FORK = multiprocessing.get_context("fork")


def settings_of(kind: str, **changes: Any) -> dict[str, Any]:
    """The kind's usual stage with these changes; `__` stands for a dot."""
    found: dict[str, Any] = {}
    for path, value in {**BASES[kind], **changes}.items():
        put(found, path.replace("__", "."), value)
    return found


def log_of(seen: Seen) -> list[dict[str, Any]]:
    """The steps' measures, without those that tell the time."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in seen.log]


# killed and resumed


@contextmanager
def moves_counted(last: int | None = None) -> Iterator[list[int]]:
    """Count how often a file or folder takes its name; at the `last` time the process dies instead."""
    count = [0]

    def counting(move: Callable[..., None]) -> Callable[..., None]:
        def moved(*places: Any) -> None:
            count[0] += 1
            if count[0] == last:
                os._exit(9)
            move(*places)

        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", counting(os.rename))
        patch.setattr(os, "replace", counting(os.replace))
        yield count


def until_death(inputs: Inputs, kind: str, settings: dict[str, Any], folder: Path, last: int) -> None:
    """What the process does that dies."""
    torch.set_num_threads(1)
    with moves_counted(last):
        run_stage(inputs, kind, settings, folder=folder)
    os._exit(0)


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in ("anneals", "compare") else kind
        for kind in sorted(BASES)
    ],
)
def test_killed_while_it_writes_and_run_again_it_leaves_the_same(bench: Bench, kind: str) -> None:
    """L1, bit for bit, in the middle of a run and shortly before its end."""
    steps = {"steps": 4, "checkpoint__every_steps": 1} if kind in TRAINS else {}
    settings = settings_of(kind, **steps)
    inputs = bench.inputs
    with moves_counted() as moves:
        whole = bench.run(kind, settings)
    for last in sorted({max(1, moves[0] // 2), max(1, moves[0] - 1)}):
        folder = inputs.new_folder()
        process = FORK.Process(target=until_death, args=(inputs, kind, settings, folder, last))
        process.start()
        process.join()
        assert process.exitcode == 9, "it ended before it was to die"
        again = bench.run(kind, settings, folder=folder, resume=True)
        assert differences(whole, again, exact=True) == []
        assert log_of(whole) == log_of(again)


# two processes


def in_company(
    rank: int, port: int, inputs: Inputs, kind: str, settings: dict[str, Any], folder: Path
) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    processes.start()
    run_stage(inputs, kind, settings, folder=folder)
    processes.stop()
    os._exit(0)


# A reward model and PPO train a head of their own, and what sees or hears is not divided.
SHARDED = [(kind, "all") for kind in TRAINS if kind not in ("reward", "ppo", "multimodal")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shard"), [*((kind, 1) for kind in TRAINS), *SHARDED])
def test_two_processes_make_what_one_makes(bench: Bench, kind: str, shard: int | str) -> None:
    """L2 and L3: the same documents, loss, gradient and weights."""
    two_make_what_one_makes(bench, kind, parallel__shard=shard)


ONLINE = {"data": "problems.jsonl", "reward": ["mine.py:spread"], "online": {"max_new_tokens": 6}}
DIVIDED = [
    ("distill", {"on_policy": {"max_new_tokens": 6}}),
    ("distill", {"top_k": 4}),
    ("preference", ONLINE),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), DIVIDED, ids=str)
def test_two_processes_divide_what_is_sampled_or_stored(
    bench: Bench, kind: str, changes: dict[str, Any]
) -> None:
    """Each samples its share of the answers, and one stores the teacher's words for both."""
    two_make_what_one_makes(bench, kind, **changes)


def two_make_what_one_makes(bench: Bench, kind: str, **changes: Any) -> None:
    """Run a stage alone and in two processes, and compare what it logged and left."""
    settings = settings_of(kind, optimiser="adamw", learning_rate__from=0.001, **changes)
    alone = bench.known_run(kind, settings)
    folder = bench.inputs.new_folder()
    port = free_port()
    both = [
        FORK.Process(target=in_company, args=(rank, port, bench.inputs, kind, settings, folder))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    together = Seen(alone.stage, folder, alone.inputs)
    for name in ("loss", "grad_norm"):
        assert together.column(name) == pytest.approx(alone.column(name), rel=1e-3, abs=1e-5)
    assert together.column("tokens") == alone.column("tokens")
    for name, weight in alone.weights.items():
        torch.testing.assert_close(together.weights[name], weight, atol=2e-4, rtol=0, msg=name)


# adapters and types


@pytest.mark.parametrize("kind", [kind for kind in INHERITS if kind != "reward"])
def test_an_adapter_alone_makes_the_difference(bench: Bench, kind: str) -> None:
    """Off, it is the parent; on, it is the model that was left merged."""
    settings = settings_of(kind, adapter={"rank": 2}, learning_rate__from=0.01)
    seen = bench.known_run(kind, settings)
    tokens = torch.arange(40, 60)
    parent, merged, on = (
        load_model(folder, dtype=torch.float32)
        for folder in (seen.inputs["base"], seen.place / "model", seen.inputs["base"])
    )
    load_adapter(on, seen.place / "model" / "adapter")
    whole, left, laid_on = (logits(model, tokens) for model in (parent, merged, on))
    torch.testing.assert_close(left, laid_on, atol=1e-4, rtol=0)
    assert (left - whole).abs().max() > 1e-3
    for name, weight in parent.named_parameters():
        if "embedding" in name or "norm" in name or name.startswith("head"):
            assert torch.equal(merged.get_parameter(name), weight), name


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens, Documents([len(tokens)])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINS)
def test_in_bfloat16_it_follows_the_curve_of_float32(bench: Bench, kind: str) -> None:
    """L15: the weights stay float32 and the losses near, to the end."""
    changes = {"steps": 6, "learning_rate__from": 0.003}
    plain = bench.known_run(kind, settings_of(kind, **changes, precision="float32"))
    rounded = bench.known_run(kind, settings_of(kind, **changes, precision="bfloat16"))
    assert {weight.dtype for weight in rounded.weights.values()} == {torch.float32}
    if kind in ("rlvr", "ppo"):
        # What is drawn differs, and with it the losses; the first rollout is drawn before any step.
        assert rounded.losses[0] == pytest.approx(plain.losses[0], abs=0.05)
    else:
        assert rounded.losses == pytest.approx(plain.losses, rel=0.02, abs=0.02)
    assert rounded.losses != plain.losses or kind in ("rlvr", "ppo")


# little data


@pytest.mark.quick_cases(16)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.kind}.{place.setting}")
@pytest.mark.parametrize("rows", ["none", "one"])
def test_of_little_data_it_makes_something_or_says_why_not(bench: Bench, place: Place, rows: str) -> None:
    """Never a traceback: a sentence that names the source or the setting."""
    name = f"{rows}-{place.file}.jsonl"
    base = settings_of(place.kind)
    for path, value in {**place.both, **place.naming(**{name: {}})}.items():
        put(base, path, value)
    try:
        seen = bench.run(place.kind, base)
    except (TriviumError, ValidationError) as error:
        said = str(error)
        assert "\n" not in said
        assert name in said or place.setting.split(".")[0] in said, said
    else:
        assert rows == "one", f"{place.kind} made something of an empty `{place.setting}`"
        assert differences(seen, seen) == []


# as planned


@pytest.mark.parametrize("kind", sorted(BASES))
def test_the_plan_says_what_the_run_does(bench: Bench, kind: str) -> None:
    seen = bench.known_run(kind, settings_of(kind))
    planned = seen.stage.plan(seen.inputs)
    check_plan(planned, seen)


LENGTHS = [{"tokens": 300}, {"steps": 3}, {"epochs": 1}, {"tokens": 300, "batch": 32}]
# Pre-training and fine-tuning have a length of their own, where none is said.
CASES = [(kind, length) for kind in DOCUMENTS for length in LENGTHS] + [("pretrain", {}), ("sft", {})]


@pytest.mark.parametrize(("kind", "length"), CASES, ids=str)
def test_the_plan_of_a_length_is_what_is_to_be_trained(
    bench: Bench, kind: str, length: dict[str, Any]
) -> None:
    """However the length is said, also where a batch is smaller than a row."""
    seen = bench.run(kind, settings_of(kind, **{"steps": None, **length}), trained=False)
    planned = seen.stage.plan(seen.inputs)
    batches = seen.trainer.batches
    rows = batches.rows(0)
    if "batch" in planned:
        assert planned["batch"] == len(rows) * 64
    if "steps" in planned and "steps" in length:
        assert planned["steps"] == batches.steps
    elif "steps" in planned:
        # Before documents are tokenised rows count as full. These are full to 15 %.
        assert planned["steps"] <= batches.steps <= 1.15 * planned["steps"] + 1
        assert planned["steps"] == max(1, round(planned["tokens"] / planned["batch"]))


def check_plan(planned: dict[str, Any], seen: Seen) -> None:
    """Every number that is planned is the one that was."""
    trainings = len(seen.trainers)
    if "steps" in planned:
        assert planned["steps"] == len(seen.log)
    if "batch" in planned:
        assert planned["batch"] == len(seen.batches[0]) * 64
    if "tokens" in planned and trainings:
        assert planned["tokens"] / trainings == pytest.approx(seen.log[-1]["tokens"], rel=0.35)
    if "parameters" in planned:
        model = load_model(seen.place / "model") if (seen.place / "model").is_dir() else None
        if model is not None:
            assert planned["parameters"] == sum(one.numel() for one in model.parameters())
    if "vocabulary" in planned and (seen.place / "model").is_dir():
        assert planned["vocabulary"] == seen.config["vocab_size"]
