"""The engine's own weights: rounded where that is faster, in step with the model that is trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from generating import prompt, tiny_model, tokenizer

from trivium.data.rows import collate, row_of_documents
from trivium.generate import matrices
from trivium.generate.engine import Engine
from trivium.generate.matrices import covers, engine_dtype
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.learn.objectives.policy import token_outputs
from trivium.learn.precision import one_pass
from trivium.model.config import ExpertsConfig
from trivium.model.lora import AdapterSettings, add_adapter, bake
from trivium.model.quantize import prepare_for, quantise

HALF = torch.bfloat16
SAMPLING = Sampling(max_new_tokens=12, logprobs=True, seed=7)


@pytest.fixture(autouse=True, params=[True, False], ids=["packed", "through its modules"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in 16 bits as this processor decodes it, and as GPUs and processors without kernels do."""
    if not request.param:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


def answers(engine: Engine, sampling: Sampling = SAMPLING) -> list[tuple[list[int], list[float]]]:
    requests = [Request(prompt(length, seed=length), sampling) for length in (5, 40, 17)]
    return [(one.tokens, one.logprobs) for (one,) in engine.generate(requests)]


def moved(model: torch.nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


DESIGNS = {
    "plain": {},
    "window": {"windows": (20, None, 20)},
    "soft-cap": {"attention_soft_cap": 5.0, "final_soft_cap": 10.0},
    "tied": {"tied": True},
    "experts": {"experts": ExpertsConfig(4, 2, 32)},
}


@pytest.mark.parametrize("design", DESIGNS)
def test_the_copy_is_the_model_in_the_other_type(design: str) -> None:
    model = tiny_model(**DESIGNS[design])
    engine = Engine(model, tokenizer(), dtype=HALF)
    assert engine.cache.shape.dtype == (torch.float32 if covers(engine.model) else HALF)
    assert {one.dtype for one in engine.model.parameters()} == {HALF}
    rounded = Engine(copy.deepcopy(model).to(HALF), tokenizer())
    assert rounded.model is rounded.source, "what is in the type already is not copied"
    assert answers(engine) == answers(rounded)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_an_adapter_becomes_part_of_the_copy(kind: str) -> None:
    model = tiny_model()
    add_adapter(model, AdapterSettings(kind=kind, rank=4), seed=1)
    engine = Engine(model, tokenizer(), dtype=HALF)
    for seed in (3, 4):
        moved(model, seed)
        baked = copy.deepcopy(model)
        bake(baked)
        assert answers(engine) == answers(Engine(baked.to(HALF), tokenizer())), "it follows every step"


def test_whole_numbers_are_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    model = tiny_model()
    quantise(model, "int8")
    engine = Engine(model, tokenizer(), dtype=HALF)
    assert {one.dtype for one in engine.model.parameters()} == {HALF}
    exact = dict(zip("tl", zip(*answers(Engine(model, tokenizer())), strict=True), strict=True))
    for rounded, whole in zip(answers(engine), exact["l"], strict=True):
        assert rounded[1][0] == pytest.approx(whole[0], abs=0.2)


def test_the_copy_follows_the_optimiser() -> None:
    model = tiny_model()
    engine = Engine(model, tokenizer(), dtype=HALF)
    storage = [one.data_ptr() for one in engine.model.parameters()]
    first = answers(engine)
    moved(model)
    after = answers(engine)
    assert after != first
    assert after == answers(Engine(model, tokenizer(), dtype=HALF))
    # A write that leaves no trace needs a word.
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    assert answers(engine) == after
    engine.refresh()
    assert answers(engine) == answers(Engine(model, tokenizer(), dtype=HALF)) != after
    assert storage == [one.data_ptr() for one in engine.model.parameters()], "written in place"


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_nothing_is_inherited_from_whoever_trains(dtype: torch.dtype) -> None:
    engine = Engine(tiny_model(), tokenizer(), dtype=dtype)
    alone = answers(engine)
    with torch.autocast("cpu", HALF):
        assert answers(engine) == alone
        assert torch.is_autocast_enabled("cpu")


def test_what_the_engine_computes_in_is_decided_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert engine_dtype(model) == torch.float32
    monkeypatch.setattr(matrices, "compute_dtype", lambda device: HALF)
    assert engine_dtype(model) == HALF
    assert Engine(model, tokenizer()).model.dtype == HALF
    assert Engine(model, tokenizer(), dtype=torch.float32).model is model, "unless it is told"
    assert engine_dtype(tiny_model().to(torch.float16)) == torch.float16, "only float32 is rounded"
    several, prepared = tiny_model(), tiny_model()
    for name in ("one", "other"):
        add_adapter(several, AdapterSettings(rank=2), name=name)
    prepare_for(prepared, "int8")
    for unlike in (several, prepared):
        assert engine_dtype(unlike) == torch.float32
        with pytest.raises(TriviumError, match="cannot compute in bfloat16 with this model"):
            Engine(unlike, tokenizer(), dtype=HALF)


MEAN, LARGEST = 0.01, {"experts": 0.5}
"""L7 in bfloat16: nats by which a sampled token's log-probability may differ, on average and at most.

Elsewhere at most 0.1; a router that rounding sends to another expert makes a jump."""


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("design", DESIGNS)
def test_what_was_sampled_is_as_likely_to_the_trainer(design: str) -> None:
    """L7 where the engine's stream is bfloat16 and the trainer's is float32 with rounded products."""
    model = tiny_model(scale=0.05, **DESIGNS[design])
    engine = Engine(model, tokenizer(), dtype=HALF)
    sampling = Sampling(max_new_tokens=60, logprobs=True, seed=7)
    apart = []
    for length in (5, 40, 17, 80):
        ids = prompt(length, seed=length)
        [[one]] = engine.generate([Request(ids, sampling)])
        learned = np.arange(length + len(one.tokens)) >= length
        row = row_of_documents([np.array(ids + one.tokens)], learned=[learned], facts={"back": [0]})
        with torch.no_grad(), one_pass("bfloat16", model.device):
            logprobs = token_outputs(model, collate([row])).logprobs
        apart.append((logprobs - torch.tensor(one.logprobs)).abs())
    found = torch.cat(apart)
    assert found.mean() < MEAN
    assert found.max() < LARGEST.get(design, 0.1)
