"""One batch may mix adapters: every row comes out as from its own merged model; servers name them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_lora import shaken
from test_tokens import own
from tuning import save, small_model

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.model.adapters import save_adapter
from trivium.model.folder import load_model
from trivium.model.lora import AdapterSettings, add_adapter, bake, selection_of
from trivium.serve.models import open_engine, with_adapters

GREEDY = Sampling(temperature=0.0, max_new_tokens=10, logprobs=True, stop_ids=())
PROMPT = list(range(3, 40))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A base, two adapters, and the merged model of each."""
    tokenizer = own()
    base = save(tmp_path / "base", small_model(tokenizer), tokenizer)
    found = {"base": base}
    for seed, kind in enumerate(("lora", "dora")):
        model = load_model(base)
        add_adapter(model, AdapterSettings(kind=kind, rank=4), seed=seed)
        shaken(model, seed)
        save_adapter(model, tmp_path / kind, base=str(base))
        bake(model)
        found[kind] = tmp_path / kind
        found[f"{kind} merged"] = save(tmp_path / f"{kind} merged", model, tokenizer)
    return found


def adapted(folders: dict[str, Path], **options) -> Engine:
    return open_engine(
        folders["base"], adapters={name: folders[name] for name in ("lora", "dora")}, **options
    )


def test_a_mixed_batch_is_each_alone_merged(folders):
    engine = adapted(folders)
    # The same beginning under different adapters: nobody may borrow another's keys and values.
    order = [None, "lora", "dora", "lora", None, "dora", "lora"]
    prompts = [PROMPT[: 20 + 3 * index] for index in range(len(order))]
    requests = [
        Request(prompt, GREEDY, n=2, adapter=name) for prompt, name in zip(prompts, order, strict=True)
    ]
    together = engine.generate(requests)
    texts = set()
    for name in (None, "lora", "dora"):
        alone = open_engine(folders["base" if name is None else f"{name} merged"])
        for request, answers in zip(requests, together, strict=True):
            if request.adapter == name:
                (expected, *_), *_ = alone.generate([Request(request.prompt, GREEDY)])
                for answer in answers:
                    assert answer.tokens == expected.tokens
                    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        texts.add(tuple(alone.generate([Request(PROMPT, GREEDY)])[0][0].tokens))
    assert len(texts) == 3, "the adapters make a difference"
    assert engine.counts["copied_tokens"] > 0


def test_by_itself_an_adapted_model_is_its_base(folders):
    engine = adapted(folders)
    assert selection_of(engine.model).active is None
    plain = open_engine(folders["base"])
    assert torch.allclose(engine.embed([PROMPT]), plain.embed([PROMPT]), atol=1e-5)
    with pytest.raises(TriviumError, match="no adapter 'sql'; there is lora, dora"):
        engine.submit(Request(PROMPT, GREEDY, adapter="sql"))


def test_names_choose_adapters(folders, tmp_path):
    base, lora = str(folders["base"]), str(folders["lora"])
    assert with_adapters({"base": base, "base:sql": lora}) == {"base": {"sql": lora}}
    stage = tmp_path / "stage"
    shutil.copytree(lora, stage / "model" / "adapter")
    found = with_adapters({"base": base, "base:sql": str(stage), "whole": str(stage)})
    assert found == {"base": {"sql": str(stage / "model" / "adapter")}, "whole": {}}
    assert with_adapters({"base": base, "sql": lora}) == {"base": {}, "sql": {}}
    with pytest.raises(TriviumError, match="is an adapter: serve it as BASE:NAME="):
        with_adapters({"base": base, "other:sql": lora})
    assert open_engine(lora).model.config.width == open_engine(base).model.config.width


def test_the_server_lists_and_serves_them(folders):
    from fastapi.testclient import TestClient

    from trivium.serve.application import build
    from trivium.serve.engine_thread import EngineThread
    from trivium.serve.limits import Limits
    from trivium.serve.measures import Measures
    from trivium.serve.worker import Adapted, Worker

    measures = Measures()
    worker = Worker("base", adapted(folders), EngineThread(), queued=8, measures=measures)
    workers = [worker, *(Adapted(worker, name) for name in ("lora", "dora"))]
    application = build(workers, limits=Limits(), measures=measures, key=None, local_only=False, origins=())
    with TestClient(application) as client:
        listed = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert listed == ["base", "base:lora", "base:dora"]
        texts = {}
        for name in listed:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 10, "temperature": 0}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["model"] == name
            texts[name] = answer["choices"][0]["text"]
        for kind in ("lora", "dora"):
            alone = open_engine(folders[f"{kind} merged"])
            greedy = Sampling(temperature=0.0, max_new_tokens=10)
            assert texts[f"base:{kind}"] == alone.generate([Request(PROMPT, greedy)])[0][0].text
        assert client.post("/v1/embeddings", json={"model": "base:lora", "input": "a"}).status_code == 400
