"""Other engines behind the engine's interface, each judged by ours on the same model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_vllm
import pytest
from fake_endpoint import FakeEndpoint
from fake_endpoint import serving as faking
from generating import prompt, tiny_engine, tiny_model, tokenizer
from serving import running
from tuning import own, save, small_model

import trivium
from trivium.evals.evaluate import evaluate
from trivium.evals.settings import Settings
from trivium.generate.endpoint import EndpointSettings
from trivium.generate.endpoint_engine import EndpointEngine
from trivium.generate.engine import Engine
from trivium.generate.engines import EngineSettings
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.generate.vllm_engine import VllmEngine
from trivium.kit.errors import TriviumError
from trivium.model.folder import load_model, save_model
from trivium.stages.rlvr import Rlvr


def test_an_endpoint_answers_and_scores_as_the_engine_behind_it():
    asked = [prompt(length, seed=length) for length in (3, 9, 20)]
    drawn = Sampling(temperature=0.9, top_p=0.9, seed=5, max_new_tokens=12)
    ours = tiny_engine()
    with running({"tiny": tiny_engine()}) as address:
        there = EndpointEngine(
            EndpointSettings(url=f"{address}/v1", model="tiny", retries=0), tokenizer(), 512
        )
        for sampling in (Sampling(temperature=0, max_new_tokens=10), drawn):
            requests = [Request(ids, sampling) for ids in asked]
            expected, found = ours.generate(requests), there.generate(requests)
            assert [[one.text for one in some] for some in found] == [
                [one.text for one in some] for some in expected
            ]
            assert [some[0].finish_reason for some in found] == [some[0].finish_reason for some in expected]
        # Samples of one request differ, and are the same again.
        several = [there.generate([Request(asked[0], drawn, n=3)]) for _ in range(2)]
        assert len({one.text for one in several[0][0]}) > 1
        assert [one.text for one in several[0][0]] == [one.text for one in several[1][0]]
        continuations = [prompt(5, seed=50 + n) for n in range(3)]
        for one, other in zip(
            there.score(asked, continuations), ours.score(asked, continuations), strict=True
        ):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        results = [
            evaluate(ours.source, tokenizer(), ["sums?steps_low=1&steps_high=1"],
                     Settings(limit=4, max_new_tokens=8, style="continue"), engine=engine)
            for engine in (None, there)
        ]  # fmt: skip
        answers = [
            [[one["text"] for one in record.answers] for record in one.tasks.popitem()[1].records]
            for one in results
        ]
        assert answers[0] == answers[1]
        with pytest.raises(TriviumError, match="no log-probabilities of the tokens drawn"):
            there.generate([Request(asked[0], Sampling(logprobs=True))])
        wrong = EndpointEngine(
            EndpointSettings(url=f"{address}/v1", model="none", retries=0), tokenizer(), 512
        )
        with pytest.raises(TriviumError, match="check `url`, `model` and `key_env`"):
            wrong.generate([Request(asked[0])])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path)
    tokenizer().save(tmp_path)
    return tmp_path


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM needs a machine of its own: here its entrance is played by our engine, with its signatures."""
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())


def test_vllm_answers_and_scores_as_our_engine(checkpoint, vllm):
    settings = EngineSettings(kind="vllm", settings={"gpu_memory_utilization": 0.5})
    there = settings.open(checkpoint, tokenizer(), 512)
    assert isinstance(there, VllmEngine)
    ours = Engine(load_model(checkpoint), tokenizer(), seed=0)
    asked = [prompt(length, seed=length) for length in (4, 11)]
    drawn = Sampling(temperature=0.8, top_k=20, seed=9, max_new_tokens=8, logprobs=True, stop=("a", "e"))
    requests = [Request(ids, drawn, n=2) for ids in asked]
    for found, expected in zip(there.generate(requests), ours.generate(requests), strict=True):
        assert len(found) == 2
        assert (found[0].tokens, found[0].text) == (expected[0].tokens, expected[0].text)
        assert found[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-5)
    continuations = [prompt(4, seed=70 + n) for n in range(2)]
    for one, other in zip(there.score(asked, continuations), ours.score(asked, continuations), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    for wrong, said in (
        (Sampling(typical_p=0.5), "takes no `typical_p`"),
        (Sampling(temperature=0.5, top_logprobs=2), "under temperature and filters only"),
    ):
        with pytest.raises(TriviumError, match=said):
            there.generate([Request(asked[0], wrong)])


def test_vllm_takes_new_weights_and_sleeps_between_rollouts(checkpoint, vllm, tmp_path):
    settings = EngineSettings(kind="vllm", settings={"enable_sleep_mode": True})
    there = settings.open(checkpoint, tokenizer(), 512)
    assert isinstance(there, VllmEngine)
    ids, wish = prompt(6), Sampling(temperature=0, max_new_tokens=12)
    moved = tiny_model(seed=5)
    save_model(moved, checkpoint)
    there.sleep()
    there.load_weights(checkpoint)
    [[found]] = there.generate([Request(ids, wish)])
    [[expected]] = Engine(moved, tokenizer(), seed=0).generate([Request(ids, wish)])
    assert found.tokens == expected.tokens
    # Weights first, so that the old cache and the new weights need not fit at once.
    assert there._model.calls == [
        "sleep", "wake_up weights", "reload_weights", "wake_up kv_cache", "reset_prefix_cache", "generate",
    ]  # fmt: skip


RECIPE = """
name: rl
stages:
  rl:
    kind: {kind}
    from: ./base
    data: {{'world:sums?form=prompt': {{limit: 9}}}}
    reward: ['mine.py:lengths']
    steps: 3
    prompts_per_step: 3
    num_generations: 4
    epochs_per_rollout: 1
    max_new_tokens: 8
    learning_rate: 0.01
    engine: {{kind: vllm, settings: {{dtype: {dtype}}}}}
    {more}
"""
REWARD = """
def lengths(prompts, completions, **columns):
    return [len(completion[-1]["content"]) % 3 / 2 for completion in completions]
"""
GAP, RATIO = "sampling/sampling_logp_difference/mean", "sampling/importance_sampling_ratio/max"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("kind", "dtype", "more"),
    [
        ("rlvr", "float32", "adapter: {rank: 4}"),
        ("rlvr", "bfloat16", "top_p: 0.9"),
        ("ppo", "bfloat16", "sycophancy: 0"),
    ],
)
def test_rollouts_in_vllm_follow_the_trainer_and_are_corrected(tmp_path, vllm, kind, dtype, more):
    save(tmp_path / "base", small_model(own()), own())
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "rl.yaml").write_text(RECIPE.format(kind=kind, dtype=dtype, more=more))
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    rows = [row for row in run["rl"].metrics if "step" in row]
    assert len(rows) == 3
    # With its weights of an earlier step, it would be off by more at the last step.
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(row[GAP] < (1e-4 if dtype == "float32" else 0.03) for row in rows)
    assert all((row[GAP] > 1e-5) == (dtype == "bfloat16") for row in rows)
    # What the engine's rounding changed is weighed out; nothing is where both compute alike.
    assert all((abs(row[RATIO] - 1) > 1e-4) == (dtype == "bfloat16") for row in rows)
    # The copy for vLLM goes with the checkpoints.
    assert not list(run["rl"].folder.glob("checkpoints/vllm"))


def test_the_engine_of_rollouts_is_checked_when_the_recipe_is_read():
    said = {"kind": "rlvr", "from": "x", "data": "y", "reward": ["math"]}
    with pytest.raises(ValueError, match="takes no new weights and gives no log-probabilities"):
        Rlvr.model_validate({**said, "engine": {"kind": "endpoint", "url": "http://x/v1", "model": "m"}})
    with pytest.raises(ValueError, match="leave `engine` out"):
        Rlvr.model_validate({**said, "engine": "vllm", "forks": {}})
    assert Rlvr.model_validate({**said, "engine": "vllm"}).correction == "token"
    assert Rlvr.model_validate({**said, "engine": "vllm", "correction": "none"}).correction == "none"
    # Stages of our own engine are what they were before there was a choice.
    assert "engine" not in Rlvr.model_validate(said).counted()
    with pytest.raises(TriviumError, match="needs vLLM and a GPU"):
        Rlvr.model_validate({**said, "engine": "vllm"}).check_machine()


def test_an_engine_that_is_not_there_says_what_it_needs(checkpoint):
    with pytest.raises(TriviumError, match="needs vLLM and a GPU: pip install vllm"):
        VllmEngine(checkpoint, tokenizer(), 512)
    for wrong, said in (
        ({"kind": "endpoint"}, "needs a `url` and a `model`"),
        ({"kind": "vllm", "url": "http://x/v1"}, "`url` belongs to"),
        ({"kind": "endpoint", "url": "x", "model": "m"}, "is an address such as"),
    ):
        with pytest.raises(ValueError, match=said):
            EngineSettings(**wrong)


def test_an_endpoint_that_fails_is_asked_again_and_named(monkeypatch):
    monkeypatch.setattr("trivium.generate.endpoint.FIRST_WAIT", 0.001)
    with faking(FakeEndpoint()) as fake:
        engine = EndpointEngine(EndpointSettings(url=fake.url, model="m", retries=1), tokenizer(), 512)
        # It knows no plain completions: their body has no messages.
        with pytest.raises(TriviumError, match=f"{fake.url}: no answer after 2 attempts"):
            engine.generate([Request([5, 6])])
    assert json.dumps(engine.endpoint.settings.model_dump())
