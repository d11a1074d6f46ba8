"""Prompts that stay cached: who asks on reads only what is new, and gets what a fresh engine would say."""

import httpx
import pytest
import torch
from generating import prompt, tiny_engine, tiny_model, tokenizer
from serving import client, running

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling

DRAWN = Sampling(seed=5, max_new_tokens=12, logprobs=True, stop_ids=())


def keeping(most, *, rows=4, budget=None, **changes):
    return Engine(
        tiny_model(**changes), tokenizer(), max_rows=rows, memory_budget=budget, prefix_cache_size=most
    )


def read_by(engine, request):
    """What a request is answered, and how many tokens of its prompt were read for it."""
    before = engine.counts["prompt_tokens"]
    (completions,) = engine.generate([request])
    return completions, engine.counts["prompt_tokens"] - before


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("further", [30, 200])
def test_a_conversation_goes_on_where_it_stopped_reading(rows, further):
    first, second = prompt(70), prompt(further, seed=1)
    engine, fresh = keeping(2, rows=rows), tiny_engine(rows=rows)
    (begun,), read = read_by(engine, Request(first, DRAWN))
    assert read == 69
    asked = Request([*first, *begun.tokens, *second], DRAWN)
    found, read = read_by(engine, asked)
    # the answer and what follows are read, and what is left of the last whole block before
    assert read == len(asked.prompt) - 1 - 64
    assert found == fresh.generate([asked])[0]
    assert fresh.counts["prompt_tokens"] == len(asked.prompt) - 1
    again, read = read_by(engine, asked)
    assert (again, read) == (found, 0)
    assert engine.rows_in_use == 0


def test_conversations_that_begin_alike_do_not_take_each_others_places():
    system, engine = prompt(32), keeping(2)
    spoken = [[*system, *prompt(100, seed=seed)] for seed in (1, 2)]
    assert [read_by(engine, Request(words, DRAWN))[1] for words in spoken] == [131, 99]
    for _ in range(2):
        for words in spoken:
            before = (len(words) - 1) // 16 * 16
            words += prompt(20, seed=len(words))
            assert read_by(engine, Request(words, DRAWN))[1] == len(words) - 1 - before


def test_only_so_many_are_kept_and_none_twice():
    engine = keeping(2)
    one, other, third = prompt(40), prompt(40, seed=1), prompt(40, seed=2)
    assert read_by(engine, Request(other, DRAWN))[1] == 39
    engine.generate([Request(one, DRAWN, n=3)])
    assert read_by(engine, Request(other, DRAWN))[1] == 0
    assert read_by(engine, Request(third, DRAWN))[1] == 39
    assert read_by(engine, Request(one, DRAWN))[1] == 39
    slots = [len(pool.slots) for pool in engine.cache.pools.values()]
    assert sum(slots) == 2


def test_a_conversation_that_goes_on_takes_one_place():
    engine, other, words = keeping(3), prompt(40, seed=1), prompt(40)
    engine.generate([Request(other, DRAWN)])
    for seed in (2, 3, 4):
        engine.generate([Request(list(words), DRAWN)])
        words += prompt(40, seed=seed)
    assert read_by(engine, Request(other, DRAWN))[1] == 0


def test_what_is_asked_again_stays_longest():
    engine = keeping(2, rows=8)
    for seed in (0, 1, 0, 2):
        engine.generate([Request(prompt(40, seed=seed), DRAWN)])
    assert read_by(engine, Request(prompt(40), DRAWN))[1] == 0
    assert read_by(engine, Request(prompt(40, seed=1), DRAWN))[1] == 39


def test_what_is_kept_makes_room():
    per_token = 3 * 2 * 2 * 16 * 4
    engine = keeping(8, budget=2 * 128 * per_token)
    asked = [Request(prompt(100, seed=seed), DRAWN) for seed in range(5)]
    alone = [tiny_engine().generate([one])[0][0].tokens for one in asked]
    assert [engine.generate([one])[0][0].tokens for one in asked] == alone
    assert [one[0].tokens for one in engine.generate(asked)] == alone
    assert engine.cache.reserved <= 256


def test_nothing_is_kept_unless_asked_for_nor_over_new_weights():
    engine = tiny_engine()
    engine.generate([Request(prompt(40), DRAWN)])
    assert read_by(engine, Request(prompt(40), DRAWN))[1] == 39
    engine = keeping(4)
    for seed in range(3):
        engine.generate([Request(prompt(40, seed=seed), DRAWN)])
    with torch.no_grad():
        engine.model.embedding.weight.data.mul_(1.5)
    engine.refresh()
    found, read = read_by(engine, Request(prompt(40), DRAWN))
    assert read == 39
    fresh = Engine(engine.model, tokenizer(), max_rows=4)
    assert found == fresh.generate([Request(prompt(40), DRAWN)])[0]


@pytest.mark.parametrize("most", [0, 2])
def test_keys_that_turn_with_the_reserved_length_are_not_shared_beyond_it(most):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    engine = keeping(most, context=64, rope=rope)
    short, long = (Request(prompt(90), Sampling(temperature=0, max_new_tokens=n)) for n in (4, 60))
    alone = [keeping(0, context=64, rope=rope).generate([one])[0][0].tokens for one in (short, long)]
    assert [one[0].tokens for one in engine.generate([short, long])] == alone
    assert [engine.generate([one])[0][0].tokens for one in (short, long)] == alone


def test_a_client_that_asks_on_is_answered_from_the_cache():
    texts = {}
    opening = "the town of number 7 has a baker, a smith and 7 doves; its bell rings at 7. " * 3
    for most in (0, 2):
        with running({"one": keeping(most)}) as address:
            asking = client(address)
            said = asking.completions.create(model="one", prompt=opening, max_tokens=8, temperature=0)
            further = f"{opening}{said.choices[0].text} And then?"
            asked = asking.completions.create(model="one", prompt=further, max_tokens=8, temperature=0)
            texts[most] = (said.choices[0].text, asked.choices[0].text, asked.usage.prompt_tokens)
            measures = httpx.get(f"{address}/metrics", trust_env=False).text
        told = 'trivium_reused_prompt_tokens_total{model="one"} '
        reused = int(measures.partition(told)[2].partition("\n")[0])
        assert reused == (len(tokenizer().encode(opening)) - 1) // 16 * 16 * (most > 0)
    assert texts[0] == texts[2]
