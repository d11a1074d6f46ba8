"""Layers on several processes, one after the other: loss, gradient, updated weights are those of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Here, so that processes that are forked need not import them anew.
import torch.distributed.fsdp
import torch.distributed.pipelining
from objectives import CASES, OneBatch
from small import Scored, SmallBatches, assert_identical, small_model, small_trainer
from test_parallel import losses, meet, run_until, together
from test_tensor_parallel import RUNS, assert_the_same, filtered_policy, keep_end, laid_out, leg

from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.learn.settings import Parallel
from trivium.learn.trainer import Hooks
from trivium.model.config import ExpertsConfig

REFUSED = {
    "next-token-experts": "a mixture of experts",
    "near-predictions-adapter-off": "what asks the model twice",
    "preference-adapter-off": "what asks the model twice",
    "near-weights": "`near_parent.weights`",
}
"""Which objectives no pipeline can train, and what is said of them."""
OBJECTIVES = [
    "next-token-smoothed", "next-token-adapter", "near-predictions", "preference-sigmoid", "preference-kto",
    "preference-orpo", "distillation-forward_kl", "distillation-mse_hidden", "policy-grpo", "policy-kl",
    "policy-filtered", "ppo", "ppo-critic", "reward", "process-reward", "draft-heads", *REFUSED,
]  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: one for name, one in RUNS.items() if "experts" not in one[0]},
    # Passes of one row, of which a pipeline has more than stages, or fewer.
    "long": ({"layers": 5, "tied": True, "query_key_norm": "none", "family": "llama"}, {"micro_batch": 1}),
}


def run_one(folder: Path, name: str, parallel: dict[str, Any]) -> None:
    """Train one case, and leave its end and which weights this process held."""
    settings: dict[str, Any] = {"parallel": parallel}
    if name in SHAPES:
        shape, changes = SHAPES[name]
        model, batches, objective = small_model(**shape), SmallBatches(3, 5), None
        if "train_only" in changes:
            for part, parameter in model.named_parameters():
                parameter.requires_grad_(part.startswith("layers.1."))
        settings |= changes
    else:
        case = filtered_policy() if name == "policy-filtered" else CASES[name]("cpu")
        model, batches, objective = case.model, OneBatch(case.rows, 2), case.objective
    trainer = small_trainer(folder, model=model, batches=batches, objective=objective, **settings)
    trainer.run()
    held = {
        "names": [name for name, _ in trainer.layout.model.named_parameters()],
        "whole": [name for name, _ in trainer.model.named_parameters()],
        "flops": trainer.flops,
    }
    write_json(folder / f"held-{processes.world().rank}.json", held)
    keep_end(trainer, folder)


def run_all(rank: int, size: int, port: int, folder: str, names: list[str], parallel: dict[str, Any]) -> None:
    """What each process does."""
    meet(rank, size, port)
    for name in names:
        if name in REFUSED:
            with pytest.raises(TriviumError, match=REFUSED[name]):
                run_one(Path(folder) / name, name, parallel)
        else:
            run_one(Path(folder) / name, name, parallel)
    processes.stop()


def compare(folder: Path, names: list[str], size: int, parallel: dict[str, Any]) -> None:
    """Train each case in this process alone and on several, and compare."""
    together(run_all, size, str(folder / "many"), names, parallel)
    for name in names:
        if name in REFUSED:
            continue
        run_one(folder / "one" / name, name, {})
        assert_the_same(folder / "one" / name, folder / "many" / name)
        alone = read_json(folder / "one" / name / "held-0.json")
        held = [read_json(folder / "many" / name / f"held-{rank}.json") for rank in range(size)]
        stages = held[:: size // parallel["pipeline"]]
        layers = [
            {part.split(".")[1] for part in one["names"] if part.startswith("layers.")} for one in stages
        ]
        # Each layer lies on one stage, and all of them somewhere.
        assert sum(map(len, layers)) == len(set().union(*layers))
        assert set().union(*(one["names"] for one in stages)) == set(alone["whole"])
        for one in held:
            # Processes that share weights also repeat passes, where they have fewer rows than others.
            if parallel["shard"] == 1:
                assert one["flops"] == pytest.approx(alone["flops"], rel=0.05), name


@pytest.mark.slow
def test_it_learns_what_one_process_learns(tmp_path: Path) -> None:
    """Tied weights or not, shared key/value heads, biases, learned positions, soft caps, frozen parts."""
    compare(tmp_path, list(SHAPES), 2, {"pipeline": 2, "shard": 1})


@pytest.mark.slow
def test_every_objective_learns_the_same_or_is_refused(tmp_path: Path) -> None:
    compare(tmp_path, OBJECTIVES, 2, {"pipeline": 2, "shard": 1})


@pytest.mark.slow
def test_four_processes_are_a_long_pipeline_or_two(tmp_path: Path) -> None:
    """Four stages; two pipelines whose gradients are summed; two that divide their stages' weights."""
    compare(tmp_path / "long", ["long"], 4, {"pipeline": 4, "shard": 1})
    compare(tmp_path / "replicas", ["qwen3", "qwen2", "policy-grpo"], 4, {"pipeline": 2, "shard": 1})
    compare(
        tmp_path / "shard",
        ["qwen3", "qwen2", "preference-sigmoid", "ppo-critic"],
        4,
        {"pipeline": 2, "shard": 2},
    )


@pytest.mark.slow
def test_a_stage_goes_on_under_any_layout(tmp_path: Path) -> None:
    """One process, a pipeline, divided weights, a pipeline of these, divided matrices, and one again."""
    together(leg, 1, str(tmp_path / "one"), {}, None)
    line, both = {"pipeline": 2, "shard": 1}, {"pipeline": 2, "shard": 2}
    legs = [
        (1, {}, 2), (2, line, 4), (2, {"shard": 2}, 5), (4, both, 6), (2, {"tensor": 2, "shard": 1}, 7),
        (2, line, 8), (1, {}, None),
    ]  # fmt: skip
    for size, parallel, cut in legs:
        together(leg, size, str(tmp_path / "many"), parallel, cut)
        assert len(losses(tmp_path / "many")) == (cut or 9)
    assert_the_same(tmp_path / "one", tmp_path / "many")


def saved(rank: int, size: int, port: int, folder: str, parallel: dict[str, Any], step: int) -> None:
    """Train to a step, or read the state after it, save it anew and write its numbers."""
    meet(rank, size, port)
    model, batches = small_model(layers=4, tied=True), SmallBatches(5, 3)
    trainer = small_trainer(Path(folder), model=model, batches=batches, parallel=parallel, ema=0.5)
    if trainer.checkpoints.steps():
        trainer._resume()
        processes.barrier()
        trainer.checkpoints.clear() if rank == 0 else None
        processes.barrier()
        trainer._save(wait=True)
    else:
        run_until(trainer, step)
    state = trainer.checkpoints.latest()
    assert state is not None
    assert state.facts["step"] == step
    if rank == 0:
        save_tensors(
            Path(folder) / f"{trainer.settings.parallel.described()}.safetensors", dict(state.tensors)
        )
    processes.stop()


@pytest.mark.slow
def test_a_saved_state_has_the_same_bits_under_every_layout(tmp_path: Path) -> None:
    layouts: list[tuple[int, dict[str, Any]]] = [
        (2, {"pipeline": 2, "shard": 1}), (1, {"shard": 1}), (4, {"pipeline": 2, "shard": 2}),
        (2, {"shard": 2}), (4, {"pipeline": 4, "shard": 1}), (2, {"tensor": 2, "shard": 1}),
    ]  # fmt: skip
    for size, parallel in layouts:
        together(saved, size, str(tmp_path), parallel, 2)
    first, *others = (
        load_tensors(tmp_path / f"{Parallel(**parallel).described()}.safetensors") for _, parallel in layouts
    )
    assert len(others) == len(layouts) - 1
    for theirs in others:
        assert_identical(first, theirs)


def look(rank: int, size: int, port: int, folder: str, parallel: dict[str, Any]) -> None:
    """Train a model that nothing but the hooks looks at; each process writes what it sees and holds."""
    meet(rank, size, port)
    place = Path(folder)

    def see(*words: object) -> dict[str, Any]:
        whole = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
        save_tensors(place / f"{trainer.step}-{len(words)}-{rank}.safetensors", whole)
        return {}

    trainer = small_trainer(
        place, model=small_model(layers=4), batches=SmallBatches(4, 3), parallel=parallel, watched=False,
        hooks=Hooks(validate=see, keep=see, sample=see), validation={"times": 2}, samples={"times": 4},
        checkpoint={"at": ["step=3"]}, ema=0.5,
    )  # fmt: skip
    trainer.run()
    held = trainer.layout.model.embedding.weight.untyped_storage().nbytes()
    write_json(place / f"held-{rank}.json", {"table": held})
    processes.stop()


@pytest.mark.slow
def test_a_model_is_whole_where_it_is_measured_sampled_and_kept(tmp_path: Path) -> None:
    """Between these a process holds its own layers, and none but the first the table of tokens."""
    together(look, 1, str(tmp_path / "one"), {})
    together(look, 2, str(tmp_path / "many"), {"pipeline": 2, "shard": 1})
    seen = sorted((tmp_path / "one").glob("*.safetensors"))
    # Validated twice, sampled four times, kept once.
    assert len(seen) == 7
    for path in seen:
        expected = load_tensors(path)
        for rank in range(2):
            found = load_tensors(tmp_path / "many" / f"{path.stem[:-2]}-{rank}.safetensors")
            assert found.keys() == expected.keys()
            for name, one in expected.items():
                torch.testing.assert_close(found[name], one, atol=1e-5, rtol=1e-5)
    assert read_json(tmp_path / "many/held-0.json")["table"] > 0
    assert read_json(tmp_path / "many/held-1.json")["table"] == 0


def fail(rank: int, size: int, port: int, folder: str, how: str, said: str) -> None:
    """The last stage says what went wrong, the others that one of them is gone."""
    meet(rank, size, port)
    trainer = small_trainer(
        Path(folder), objective=Scored() if how == "twice" else None, batches=SmallBatches(2, 3),
        parallel={"pipeline": 2, "shard": 1},
    )  # fmt: skip
    if how == "memory" and rank == 1:

        def full(*words: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        trainer.layout.model.norm.register_forward_pre_hook(full)
    with pytest.raises(TriviumError, match=said if rank == 1 else "lost another process"):
        trainer.run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [("twice", "asks the model twice"), ("memory", "a pass does not fit into memory; lower `micro_batch`")],
)
def test_what_goes_wrong_in_a_stage_is_one_sentence(tmp_path: Path, how: str, said: str) -> None:
    together(fail, 2, str(tmp_path), how, said)


@pytest.mark.parametrize(
    ("wish", "shape", "said"),
    [
        ({"pipeline": 3}, {}, "groups of 3 processes, which do not divide the 4 that"),
        ({"pipeline": 2, "shard": 4}, {}, "does not divide the 2 groups of 2 processes"),
        ({"pipeline": 4}, {"layers": 3}, "and the model has 3 layers; choose no more"),
        ({"pipeline": 2}, {"experts": ExpertsConfig(4, 2, 48)}, "whose balance all layers make"),
    ],
    ids=str,
)
def test_what_no_pipeline_can_train_is_said(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], shape: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    with pytest.raises(TriviumError, match=said):
        laid_out(Parallel(**{"shard": 1, **wish}), **shape)


def test_degrees_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="`tensor` and `pipeline` exclude each other"):
        Parallel(tensor=2, pipeline=2)
    assert Parallel(pipeline=2, shard=4).described() == "shard 4 x pipeline 2"
