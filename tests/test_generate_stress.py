"""An engine under many requests that come, go, begin alike and are kept says what an idle one would."""

import random

import pytest
from generating import assert_as_promised, prompt, tiny_model, tokenizer

from trivium.generate.engine import Engine
from trivium.generate.requests import Request, Slide
from trivium.generate.sampling import Sampling

PER_TOKEN = 3 * 2 * 2 * 16 * 4
STRETCHED = {"context": 64, "rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}


def check_places(engine):
    """Every place belongs to one row: that reads, that writes, or whose prompt is kept."""
    kept, reading = engine.scheduler.prefixes.sequences, engine.scheduler.prefill.sequences
    for pool in engine.cache.pools.values():
        assert len(pool.slots) <= pool.rows
        for slot, row in enumerate(pool.slots):
            assert (row.pool, row.slot) == (pool, slot)
            assert [row in kept, row in reading, slot < pool.decoding].count(True) == 1
    assert all(row.length == row.prefill_length for row in kept)
    assert engine.cache.reserved <= engine.cache.places


@pytest.mark.parametrize("changes", [{"context": 1600}, STRETCHED])
@pytest.mark.parametrize("seed", range(4))
def test_whoever_comes_and_goes_an_answer_is_that_of_an_idle_engine(seed, changes):
    chance, model = random.Random(seed), tiny_model(**changes)
    rows, budget = chance.choice([1, 3, 5]), chance.choice([None, 2048 * PER_TOKEN, 4096 * PER_TOKEN])
    engine = Engine(
        model, tokenizer(), max_rows=rows, memory_budget=budget, prefix_cache_size=chance.choice([1, 2, 8])
    )
    idle = lambda: Engine(model, tokenizer(), max_rows=rows)
    texts = [prompt(length, seed=length) for length in (1, 16, 40, 130, 600)]
    found, asked = [], []

    def words():
        text = chance.choice(texts)
        texts.append([*text[: chance.randint(1, 500)], *prompt(chance.randint(1, 60), seed=len(texts))])
        return texts[-1]

    for number in range(40):
        turn = chance.random()
        if turn < 0.5:
            settings = Sampling(
                temperature=chance.choice([0, 0.8]), seed=number, max_new_tokens=chance.choice([1, 12, 80]),
                logprobs=True, stop_ids=chance.choice([(), tuple(range(100))]),
            )  # fmt: skip
            slides = changes is not STRETCHED and chance.random() < 0.2
            slide = Slide(window=64) if slides else None
            asked.append(Request(words(), settings, n=chance.choice([1, 1, 3]), slide=slide))
            found.append(engine.submit(asked[-1]))
        elif turn < 0.6 and found:
            engine.cancel(chance.choice(found))
        elif turn < 0.7:
            text, rest = words(), prompt(9, seed=number)
            (scores,), (expected,) = engine.score([text], [rest]), idle().score([text], [rest])
            assert_as_promised(engine, [scores.logprobs], [expected.logprobs])
            assert_as_promised(engine, engine.embed([text]).tolist(), idle().embed([text]).tolist())
        for _ in range(chance.randint(0, 6)):
            engine.step()
            check_places(engine)
    while engine.busy:
        engine.step()
        check_places(engine)
    assert engine.rows_in_use == 0
    for request, generation in zip(asked, found, strict=True):
        for said, expected in zip(generation.completions, idle().generate([request])[0], strict=True):
            drawn = len(said.tokens)
            assert said.tokens == expected.tokens[:drawn]
            assert_as_promised(engine, [said.logprobs], [expected.logprobs[:drawn]])
            assert said.finish_reason in ("cancelled", expected.finish_reason)
    engine.refresh()
    assert not any(pool.slots for pool in engine.cache.pools.values())
