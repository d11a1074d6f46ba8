"""A seed gives the same text whatever else is in the batch, also where no plan covers the model."""

import random

import pytest
from generating import assert_as_promised, assert_close_enough, prompt, tiny_model, tokenizer

from trivium.generate import exactness, forward
from trivium.generate.engine import Engine
from trivium.generate.forward import ModuleForward
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model import quantize
from trivium.model.config import ExpertsConfig
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.quantize import quantise


def rounded():
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        # Right or wrong, they are the same for every row.
        patch.setattr(quantize, "multiplies_exactly", lambda: True)
        quantise(model, "int8-dynamic")
    return model, [None]


def experts():
    return tiny_model(experts=ExpertsConfig(count=4, per_token=2, inner_width=48)), [None]


def two_adapters():
    model = tiny_model()
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, AdapterSettings(rank=4), name=name, seed=seed)
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.data.add_(0.1)
    return model, [None, "one", "two"]


@pytest.mark.parametrize("made", [pytest.param(rounded, marks=pytest.mark.slow), experts, two_adapters])
def test_the_same_seed_gives_the_same_text_alone_and_among_others(made):
    model, adapters = made()
    engine = Engine(model, tokenizer(), max_rows=16)
    assert isinstance(engine._forward, ModuleForward)
    chance, requests = random.Random(0), []
    for seed in range(12):
        settings = Sampling(
            temperature=chance.choice([0.7, 1.0, 1.4, 0.0]),
            top_p=chance.choice([1.0, 0.9]),
            max_new_tokens=chance.randint(4, 12),
            seed=seed,
            logprobs=True,
        )
        words = prompt(chance.choice([1, 9, 16, 40, 90]), seed=seed)
        requests.append(Request(words, settings, adapter=adapters[seed % len(adapters)]))
    together = engine.generate(requests)
    for request, (expected,) in list(zip(requests, together, strict=True))[::2]:
        assert_as_promised(engine, engine.generate([request])[0], [expected])


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("changes", [{}, {"key_value_heads": 4}, {"attention_soft_cap": 3.0}])
@pytest.mark.parametrize("length", [250, 300, 588])
def test_long_texts_are_read_bit_for_bit_alike_alone_and_behind_others(length, changes):
    """Chunks end in other places behind others, and rows of other lengths are attended together."""
    model = tiny_model(context=1600, **changes)
    settings = Sampling(temperature=0, max_new_tokens=8, stop_ids=(), logprobs=True)
    text = prompt(length)
    (expected,) = Engine(model, tokenizer(), max_rows=8).generate([Request(text, settings)])
    state = Engine(model, tokenizer(), max_rows=8).embed([text])[0]
    scores = Engine(model, tokenizer(), max_rows=8).score([text[:20]], [text[20:]])[0].logprobs
    for other in (100, 200, 450):
        engine, beside = Engine(model, tokenizer(), max_rows=8), prompt(other, seed=1)
        asked = [Request(beside, settings), Request(text, settings)]
        assert_as_promised(engine, engine.generate(asked)[1], expected)
        assert_as_promised(engine, [engine.embed([beside, text])[1].tolist()], [state.tolist()])
        found = engine.score([beside[:20], text[:20]], [beside[20:], text[20:]])[1].logprobs
        assert_as_promised(engine, [found], [scores])


def test_kernels_that_keep_no_promise_still_give_the_same_tokens(monkeypatch):
    """What the weaker promise says, with no row padded and nothing attended to alone."""
    monkeypatch.setattr(forward, "of_model", lambda *asked: exactness.Exactness())
    engine = Engine(tiny_model(), tokenizer(), max_rows=16)
    requests = [
        Request(
            prompt(length, seed=length),
            Sampling(temperature=heat, seed=length, max_new_tokens=9, logprobs=True),
        )
        for length in (1, 9, 16, 40, 90, 17, 33)
        for heat in (0, 0.8)
    ]
    together = engine.generate(requests)
    for request, expected in zip(requests, together, strict=True):
        assert_close_enough(engine.generate([request])[0], expected)
