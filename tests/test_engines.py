"""Other engines behind the engine's interface, each judged by ours on the same model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint
from fake_endpoint import serving as faking
from generating import prompt, tiny_engine, tiny_model, tokenizer
from serving import running

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
from trivium.tokens.tokenizer import Tokenizer


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


class SamplingParams:
    """vLLM's, as far as its documented arguments go; an argument that it has not is an error."""

    def __init__(self, *, n: int = 1, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
                 repetition_penalty: float = 1.0, temperature: float = 1.0, top_p: float = 1.0,
                 top_k: int = 0, min_p: float = 0.0, seed: int | None = None, stop: list[str] | None = None,
                 stop_token_ids: list[int] | None = None, max_tokens: int | None = 16, min_tokens: int = 0,
                 logprobs: int | None = None, prompt_logprobs: int | None = None,
                 logit_bias: dict[int, float] | None = None) -> None:  # fmt: skip
        vars(self).update({name: value for name, value in locals().items() if name != "self"})


class LLM:
    """vLLM's entrance over our engine."""

    def __init__(self, model: str, *, skip_tokenizer_init: bool = False, logprobs_mode: str = "raw_logprobs",
                 gpu_memory_utilization: float = 0.9) -> None:  # fmt: skip
        assert logprobs_mode == "processed_logprobs"
        self.engine = Engine(load_model(Path(model)), Tokenizer.load(model), seed=0)

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: Any, *, use_tqdm: bool = True
    ) -> list[Any]:
        asked = [one["prompt_token_ids"] for one in prompts]
        if not isinstance(sampling_params, list):
            sampling_params = [sampling_params] * len(asked)
        return [self._one(ids, wanted) for ids, wanted in zip(asked, sampling_params, strict=True)]

    def _one(self, ids: list[int], wanted: SamplingParams) -> Any:
        sampling = Sampling(
            temperature=wanted.temperature, top_p=wanted.top_p, top_k=max(wanted.top_k, 0), seed=wanted.seed,
            max_new_tokens=wanted.max_tokens, stop_ids=tuple(wanted.stop_token_ids or ()),
            stop=tuple(wanted.stop or ()), logprobs=wanted.logprobs is not None,
        )  # fmt: skip
        [[found]] = self.engine.generate([Request(ids, sampling)])
        rows = [{token: SimpleNamespace(logprob=value)} for token, value in zip(found.tokens, found.logprobs)]
        scored = None
        if wanted.prompt_logprobs is not None:
            [scores] = self.engine.score([[]], [ids], top=wanted.prompt_logprobs)
            given = [
                {token: SimpleNamespace(logprob=one) for token, one in row.items()}
                for row in scores.top_logprobs
            ]
            scored = [None, *given]
        one = SimpleNamespace(
            text=found.text, token_ids=found.tokens, logprobs=rows or None, finish_reason=found.finish_reason
        )
        return SimpleNamespace(outputs=[one], prompt_logprobs=scored)


def test_vllm_is_asked_in_its_own_words(checkpoint, monkeypatch):
    """vLLM needs a GPU: here its entrance is played by our engine, so that answers have to be the same."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    sys.modules["vllm"].LLM, sys.modules["vllm"].SamplingParams = LLM, SamplingParams
    settings = EngineSettings(kind="vllm", settings={"gpu_memory_utilization": 0.5})
    there = settings.open(checkpoint, tokenizer(), 512)
    assert isinstance(there, VllmEngine)
    ours = Engine(load_model(checkpoint), tokenizer(), seed=0)
    asked = [prompt(length, seed=length) for length in (4, 11)]
    drawn = Sampling(temperature=0.8, top_k=20, seed=9, max_new_tokens=8, logprobs=True)
    requests = [Request(ids, drawn, n=2) for ids in asked]
    for found, expected in zip(there.generate(requests), ours.generate(requests), strict=True):
        assert len(found) == 2
        assert (found[0].tokens, found[0].text) == (expected[0].tokens, expected[0].text)
        assert found[0].logprobs == pytest.approx(expected[0].logprobs, abs=1e-5)
    continuations = [prompt(4, seed=70 + n) for n in range(2)]
    for one, other in zip(there.score(asked, continuations), ours.score(asked, continuations), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    with pytest.raises(TriviumError, match="takes no `typical_p`"):
        there.generate([Request(asked[0], Sampling(typical_p=0.5))])


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
