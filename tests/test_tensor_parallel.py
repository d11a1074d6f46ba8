"""Every matrix divided among processes: loss, gradient, updated weights and tokens are those of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Here, so that processes that are forked need not import them anew.
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from objectives import CASES, Case, OneBatch, answers
from small import SmallBatches, small_model, small_trainer, weights_of
from test_parallel import losses, meet, run_until, together

from trivium.generate.sampling import Sampling
from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.learn.settings import Parallel
from trivium.learn.sharding import layout_of
from trivium.learn.trainer import Trainer
from trivium.model.config import ExpertsConfig
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.stages.parts.rollout_worker import under_filters

GPT2 = {
    "family": "gpt2", "norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh",
    "query_key_value_bias": True, "attention_output_bias": True, "inner_bias": True, "tied": True,
    "query_key_norm": "none",
}  # fmt: skip
QWEN2 = {
    "family": "qwen2", "heads": 4, "key_value_heads": 2, "query_key_value_bias": True, "tied": True,
    "query_key_norm": "none",
}  # fmt: skip
GEMMA = {
    "family": "gemma3_text", "norm_plus_one": True, "norm_after": True, "windows": (8, None), "tied": True,
    "activation": "gelu_tanh", "embedding_scale": 32**0.5, "final_soft_cap": 5.0, "attention_soft_cap": 5.0,
}  # fmt: skip
# Three layers, of which one is no mixture; not every row reaches every expert.
MIXTURE = {"layers": 3, "experts": ExpertsConfig(8, 2, 24, balance=0.01, layers=(True, False, True))}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # One row a pass: groups have more or fewer of them.
    "qwen3": ({}, {"micro_batch": 1}),
    "qwen3-shared-heads": (
        {"heads": 4, "key_value_heads": 2, "layers": 3},
        {"ema": 0.5, "recompute": "full"},
    ),
    "qwen2": (QWEN2, {"weight_decay": 0.1}),
    "gpt2": (GPT2, {"recompute": "selective"}),
    "gemma": (GEMMA, {}),
    "frozen": ({}, {"train_only": ["layers.1"]}),
    "experts": (MIXTURE, {"micro_batch": 1, "recompute": "selective"}),
    "bfloat16": ({}, {"precision": "bfloat16"}),
}
"""The shape of a model, and settings of its training."""
REFUSED = {
    "near-weights": "`near_parent.weights`",
}
"""Which objectives cannot be divided, and what is said of them."""


ALIKE = (("gpt2", "end"), ("qwen2", "end"))
"""Whose biases of keys AdamW moves by rounding alone: without rotation all of them, with it some."""


def filtered_policy() -> Case:
    """A policy whose completions were drawn from the likeliest tokens alone."""
    model, algorithm = small_model(), ALGORITHMS["grpo"]
    filtered = under_filters(Sampling(temperature=0.9, top_p=0.9))
    objective = PolicyGradient(algorithm, algorithm.numbers, filtered=filtered)
    return Case(model, objective, answers(model.config.vocabulary, aggregation=algorithm.aggregation))


def keep_end(trainer: Trainer, folder: Path) -> None:
    """Write the weights and moments that a training ends with; all processes call it together."""
    moments = trainer.moments()
    if processes.world().leads:
        save_tensors(folder / "end.safetensors", weights_of(trainer.model))
        save_tensors(folder / "moments.safetensors", moments)


def run_and_keep(trainer: Trainer, folder: Path) -> None:
    """Train; write the end, and what of a matrix and of the tokens this process had."""
    normed: list[int] = []
    norm = trainer.layout.model.layers[0].mlp_norm
    norm.register_forward_hook(lambda module, inputs, output: normed.append(len(output)))
    trainer.run()
    up = trainer.layout.model.get_parameter("layers.1.mlp.up.weight")
    held = {
        "rows": getattr(up, "to_local", lambda: up)().shape[0],
        "flops": trainer.flops,
        "normed": sum(normed),
    }
    write_json(folder / f"held-{processes.world().rank}.json", held)
    keep_end(trainer, folder)


def run_one(folder: Path, name: str, parallel: dict[str, Any]) -> None:
    """Train one case, and leave its end and what of a matrix this process held."""
    settings: dict[str, Any] = {"parallel": parallel}
    if name in RUNS:
        shape, changes = RUNS[name]
        model, batches, objective = small_model(**shape), SmallBatches(3, 3), None
        if "train_only" in changes:
            for part, parameter in model.named_parameters():
                parameter.requires_grad_(part.startswith("layers.1."))
        settings |= changes
    else:
        case = filtered_policy() if name == "policy-filtered" else CASES[name]("cpu")
        model, batches, objective = case.model, OneBatch(case.rows, 2), case.objective
    trainer = small_trainer(folder, model=model, batches=batches, objective=objective, **settings)
    run_and_keep(trainer, folder)


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


def assert_the_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Loss, gradient norm, tokens, updated weights and moments, within rounding."""
    assert len(losses(one)) == len(losses(other)) > 0
    if one.name == "bfloat16":
        # Products of other sizes round in other places.
        for (mine, _, tokens), (theirs, _, others) in zip(losses(one), losses(other), strict=True):
            assert (theirs, others) == (pytest.approx(mine, rel=0.01), tokens)
        return
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        assert theirs == pytest.approx(mine, rel=tolerance, abs=tolerance), one.name
    for file in ("end.safetensors", "moments.safetensors"):
        expected, found = load_tensors(one / file), load_tensors(other / file)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            if name.endswith("key.bias") and (one.name, file[:3]) in (*ALIKE, ("gpt2", "mom")):
                # It moves all scores of a query alike, or nearly: its gradient is 0, or nearly, and rounding.
                continue
            torch.testing.assert_close(
                found[name], tensor, atol=tolerance, rtol=tolerance,
                msg=lambda text, name=name, file=file: f"{one.name} {file} {name}: {text}",
            )  # fmt: skip


def compare(folder: Path, names: list[str], size: int, parallel: dict[str, Any]) -> None:
    """Train each case in this process alone and on several, and compare."""
    together(run_all, size, str(folder / "many"), names, parallel)
    for name in names:
        if name in REFUSED:
            continue
        run_one(folder / "one" / name, name, {})
        assert_the_same(folder / "one" / name, folder / "many" / name)
        alone = read_json(folder / "one" / name / "held-0.json")
        everyone = [read_json(folder / "many" / name / f"held-{rank}.json") for rank in range(size)]
        for held in everyone:
            assert held["rows"] == alone["rows"] // (parallel["tensor"] * parallel["shard"])
            if parallel["tensor"] == size:
                # What a group computes together counts once; of an odd matrix one of them makes more of Muon.
                assert held["flops"] == pytest.approx(alone["flops"], rel=0.1), name
        if parallel["tensor"] == size:
            # No token is normed twice between the layers.
            assert sum(held["normed"] for held in everyone) == alone["normed"]


@pytest.mark.slow
def test_it_learns_what_one_process_learns(tmp_path: Path) -> None:
    """Tied weights or not, shared key/value heads, biases, norms of heads, soft caps, frozen parts."""
    compare(tmp_path, list(RUNS), 2, {"tensor": 2, "shard": 1})


OBJECTIVES = [
    "next-token-smoothed", "near-predictions", "preference-sigmoid", "preference-kto", "preference-orpo",
    "distillation-forward_kl", "distillation-mse_hidden", "policy-grpo", "policy-kl", "policy-filtered",
    "ppo", "ppo-critic", "reward", "process-reward", "draft-heads", "next-token-adapter",
    "near-predictions-adapter-off", "preference-adapter-off", *REFUSED,
]  # fmt: skip


@pytest.mark.slow
def test_every_objective_learns_the_same_or_is_refused(tmp_path: Path) -> None:
    compare(tmp_path, OBJECTIVES, 2, {"tensor": 2, "shard": 1})


@pytest.mark.slow
def test_its_parts_are_divided_once_more(tmp_path: Path) -> None:
    """Two groups of two: with weights divided between them, and with gradients summed over both."""
    adapter = "next-token-adapter"
    names = ["qwen3", "qwen2", "experts", "preference-sigmoid", adapter]
    compare(tmp_path / "shard", names, 4, {"tensor": 2, "shard": 2})
    compare(tmp_path / "replicas", ["qwen3", "experts", "policy-grpo", adapter], 4, {"tensor": 2, "shard": 1})


def leg(rank: int, size: int, port: int, folder: str, parallel: dict[str, Any], cut: int | None) -> None:
    """Train on, to the end or until so many steps are done."""
    meet(rank, size, port)
    trainer = small_trainer(
        Path(folder), model=small_model(), batches=SmallBatches(9, 3), parallel=parallel, ema=0.5,
        checkpoint={"every_steps": 100},
    )  # fmt: skip
    if run_until(trainer, cut):
        keep_end(trainer, Path(folder))
    processes.stop()


@pytest.mark.slow
def test_a_stage_goes_on_under_any_layout(tmp_path: Path) -> None:
    """One process, two that divide matrices, or weights, four that do both, two that divide tokens."""
    together(leg, 1, str(tmp_path / "one"), {}, None)
    tensor, shard, both = {"tensor": 2, "shard": 1}, {"shard": 2}, {"tensor": 2, "shard": 2}
    context = {"context": 2, "shard": 1}
    legs = [(1, {}, 2), (2, tensor, 4), (2, shard, 5), (4, both, 6), (2, context, 8), (1, {}, None)]
    for size, parallel, cut in legs:
        together(leg, size, str(tmp_path / "many"), parallel, cut)
        assert len(losses(tmp_path / "many")) == (cut or 9)
    assert_the_same(tmp_path / "one", tmp_path / "many")


def laid_out(wish: Parallel, **shape: Any) -> Any:
    """The layout of a small model."""
    return layout_of(small_model(**shape), wish, has_extra=False, reshapes=False, say=print)


@pytest.mark.parametrize(
    ("wish", "shape", "said"),
    [
        ({"tensor": 3}, {}, "groups of 3 processes, which do not divide the 4 that"),
        ({"tensor": 2, "shard": 4}, {}, "does not divide the 2 groups of 2 processes"),
        ({"tensor": 4}, {}, "does not divide the model's 2 heads"),
        ({"tensor": 2}, {"heads": 4, "key_value_heads": 1}, "does not divide the model's 1 key/value heads"),
        ({"tensor": 2}, {"inner_width": 47}, "does not divide the model's 47 columns of the inner network"),
        ({"tensor": 2}, {"family": "olmo2", "query_key_norm": "full"}, "models of the family olmo2"),
        (
            {"tensor": 2},
            {"experts": ExpertsConfig(4, 2, 47)},
            "does not divide the model's 47 columns of an expert",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_said(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], shape: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    with pytest.raises(TriviumError, match=said):
        laid_out(Parallel(**{"shard": 1, **wish}), **shape)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_adapters_that_are_more_than_a_sum_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    model = small_model()
    add_adapter(model, AdapterSettings(rank=8, kind=kind))
    with pytest.raises(TriviumError, match="adapters of the kinds dora and pissa"):
        layout_of(model, Parallel(tensor=2, shard=1), has_extra=False, reshapes=False, say=print)


def test_in_one_process_nothing_is_divided() -> None:
    assert not laid_out(Parallel(tensor=2)).divided
    assert Parallel(tensor=2).described() == "tensor 2"
    assert Parallel(tensor=2, shard=4).described() == "shard 4 x tensor 2"
