"""Law L16 in the engine: what fails in one row ends that row's request and no other."""

from dataclasses import replace

import pytest
import torch
from generating import prompt, tiny_engine, tiny_model, tokenizer

from trivium.generate.engine import Engine
from trivium.generate.requests import Request, Slide
from trivium.generate.sampling import Sampler, Sampling
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0, max_new_tokens=20, stop_ids=(), logprobs=True)
DRAWN = Sampling(seed=7, temperature=0.9, top_p=0.9, max_new_tokens=30, stop_ids=(), logprobs=True)
PENALISED = Sampling(seed=3, repetition_penalty=1.3, logit_bias={5: 2.0}, max_new_tokens=25, logprobs=True)
HONEST = [
    Request(prompt(12, seed=1), GREEDY),
    Request(prompt(200, seed=2), DRAWN, n=2),
    Request(prompt(40, seed=3), PENALISED),
    Request(prompt(60, seed=5), replace(DRAWN, max_new_tokens=150), slide=Slide(window=128)),
]
GUILTY = Request(prompt(30, seed=4), Sampling(seed=13, max_new_tokens=40))


def expected():
    return [tiny_engine().generate([request])[0] for request in HONEST]


def finish(engine, generations):
    for _ in range(2000):
        if all(one.done for one in generations):
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def beside(engine, guilty=GUILTY, listener=None, wait=0):
    """Honest requests before and after a guilty one; how each of them ended."""
    honest = [engine.submit(request) for request in HONEST[:2]]
    for _ in range(wait):
        engine.step()
    bad = engine.submit(guilty, listener)
    honest += [engine.submit(request) for request in HONEST[2:]]
    finish(engine, [*honest, bad])
    assert engine.rows_in_use == 0
    assert not engine.busy
    assert all(not pool.decoding for pool in engine.cache.pools.values())
    return [one.completions for one in honest], bad


def choose_fails(engine, after=3):
    """The sampler fails for all rows as soon as the guilty one has drawn so many tokens."""

    class Failing(Sampler):
        def choose(self, logits):
            for settings, drawn in zip(self.settings, self.count[:, 0].tolist(), strict=True):
                if settings.seed == 13 and drawn >= after:
                    raise RuntimeError("an index out of range")
            return super().choose(logits)

    engine.scheduler.sampler = Failing(engine.vocabulary, engine.model.device)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("wait", [0, 5])
def test_a_row_whose_token_cannot_be_drawn_fails_alone(after, wait):
    engine = tiny_engine()
    choose_fails(engine, after)
    events = []
    honest, bad = beside(engine, listener=events.append, wait=wait)
    assert honest == expected()
    assert "out of range" in str(bad.failure)
    assert bad.completions == []
    assert events[-1].failure is bad.failure
    assert len(events) == after + 1


def test_a_row_that_breaks_the_models_pass_fails_alone(monkeypatch):
    engine = tiny_engine()
    step = engine._forward.decode

    def failing(tokens, context):
        rows = [row for one in context._slices for row in one.pool.slots[: one.pool.decoding]]
        if any(row.sampling.seed == 13 for row in rows):
            raise RuntimeError("no memory for this row")
        return step(tokens, context)

    monkeypatch.setattr(engine._forward, "decode", failing)
    honest, bad = beside(engine)
    assert "no memory" in str(bad.failure)
    assert honest == expected()


def test_all_samples_of_a_failing_request_end_and_their_places_are_free():
    engine = tiny_engine(rows=8)
    choose_fails(engine)
    honest, bad = beside(engine, replace(GUILTY, n=5))
    assert bad.failure is not None
    assert honest == expected()


def test_what_fails_once_is_tried_again_and_nobody_notices(monkeypatch):
    engine = tiny_engine()
    step, calls = engine._forward.decode, []

    def failing(tokens, context):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("a hiccup")
        return step(tokens, context)

    monkeypatch.setattr(engine._forward, "decode", failing)
    honest, other = beside(engine)
    assert honest == expected()
    assert other.failure is None
    assert other.completions == tiny_engine().generate([GUILTY])[0]


def test_rows_that_fail_only_together_lose_the_last_that_came(monkeypatch):
    engine = tiny_engine()
    step = engine._forward.decode

    def failing(tokens, context):
        if len(tokens) > 3:
            raise MemoryError
        return step(tokens, context)

    monkeypatch.setattr(engine._forward, "decode", failing)
    generations = [engine.submit(Request(prompt(12, seed=seed), GREEDY)) for seed in range(5)]
    finish(engine, generations)
    assert [type(one.failure) for one in generations] == [type(None)] * 3 + [MemoryError] * 2
    for seed, one in enumerate(generations[:3]):
        assert one.completions == tiny_engine().generate([Request(prompt(12, seed=seed), GREEDY)])[0]


def test_a_prompt_that_cannot_be_read_fails_alone(monkeypatch):
    engine, bad = tiny_engine(), prompt(30, seed=4)
    prefill, forward = engine._forward.prefill, engine._forward.forward

    def failing(real):
        def wrapped(tokens, context):
            if bad[3] in tokens.tolist() and bad[7] in tokens.tolist() and bad == found(tokens.tolist(), bad):
                raise RuntimeError("this prompt cannot be read")
            return real(tokens, context)

        return wrapped

    monkeypatch.setattr(engine._forward, "prefill", failing(prefill))
    monkeypatch.setattr(engine._forward, "forward", failing(forward))
    request = Request([*bad, 11], GUILTY.sampling)
    honest, failed = beside(engine, request)
    assert "cannot be read" in str(failed.failure)
    assert honest == expected()
    texts = [prompt(100, seed=8), [*bad, 12], prompt(50, seed=9)]
    under_way = engine.submit(HONEST[0])
    with pytest.raises(RuntimeError, match="cannot be read"):
        engine.embed(texts)
    with pytest.raises(RuntimeError, match="cannot be read"):
        engine.score([[1]] * 3, texts)
    finish(engine, [under_way])
    assert under_way.completions == expected()[0]
    assert not engine.busy, "texts that were given up must not wait in line"
    assert engine.score([[1]], [texts[0]]) == tiny_engine().score([[1]], [texts[0]])


def test_long_texts_that_are_given_up_leave_no_slots(monkeypatch):
    """What remains in prefill is removed outside a step, and the others then move in the cache."""
    engine, bad = tiny_engine(context=1024), prompt(480, seed=4)
    forward = engine._forward.forward

    def failing(tokens, context):
        if found(tokens.tolist(), bad[:8]):
            raise RuntimeError("this prompt cannot be read")
        return forward(tokens, context)

    monkeypatch.setattr(engine._forward, "forward", failing)
    texts = [prompt(700, seed=1), bad, prompt(700, seed=2), prompt(700, seed=3), prompt(700, seed=5)]
    with pytest.raises(RuntimeError, match="cannot be read"):
        engine.score([[1]] * 5, texts)
    assert not engine.busy
    assert not any(pool.slots for pool in engine.cache.pools.values())


def found(tokens, wanted):
    starts = range(len(tokens) - len(wanted) + 1)
    return next(
        (wanted for start in starts if tokens[start : start + len(wanted)] == wanted),
        None,
    )


@pytest.mark.parametrize("work", ["score", "embed", "top"])
def test_texts_that_are_read_are_not_harmed_by_a_row_that_fails(work):
    engine, alone = tiny_engine(), tiny_engine()
    choose_fails(engine)
    bad = engine.submit(GUILTY)
    texts = [prompt(length, seed=length) for length in (20, 300, 7)]
    read = {
        "score": lambda one: one.score([text[:3] for text in texts], [text[3:] for text in texts]),
        "embed": lambda one: one.embed(texts).tolist(),
        "top": lambda one: one.score([()] * 3, texts, top=3),
    }[work]
    assert read(engine) == read(alone)
    finish(engine, [bad])
    assert bad.failure is not None


def test_a_listener_that_fails_ends_its_own_request():
    engine, heard = tiny_engine(), []

    def hear(event):
        heard.append(event)
        if len(heard) == 4:
            raise ValueError("the listener's own fault")

    honest, bad = beside(engine, listener=hear)
    assert honest == expected()
    assert "own fault" in str(bad.failure)


def test_one_failing_request_among_many_raises_in_generate():
    engine = tiny_engine()
    choose_fails(engine)
    with pytest.raises(RuntimeError, match="out of range"):
        engine.generate([HONEST[0], GUILTY])
    assert engine.generate(HONEST[:1]) == expected()[:1]


@pytest.mark.parametrize("where", ["take", "deliver", "decode"])
def test_an_interruption_inside_a_step_leaves_an_engine_that_can_be_asked(monkeypatch, where):
    """As by Ctrl-C in the last decoding: what then waits for the request must not wait for ever."""
    engine = tiny_engine(rows=2)
    listener = None
    if where == "decode":
        real, calls = Tokenizer.decode, []

        def decode(self, ids, skip_control=True):
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return real(self, ids, skip_control)

        monkeypatch.setattr(Tokenizer, "decode", decode)
    else:

        def listener(event):
            if (event.completion is not None) == (where == "deliver"):
                raise KeyboardInterrupt

    generation = engine.submit(HONEST[0], listener)
    other = engine.submit(HONEST[2])
    with pytest.raises(KeyboardInterrupt):
        finish(engine, [generation, other])
    engine.cancel(generation)
    finish(engine, [generation, other])
    assert engine.rows_in_use == 0
    assert engine.generate([HONEST[1]]) == expected()[1:2]


@pytest.mark.parametrize("ids", [(2**31 - 1,), (-1,), (5, 10**30)])
def test_stop_ids_outside_the_vocabulary_are_refused(ids):
    engine = tiny_engine()
    with pytest.raises(TriviumError, match=r"stop_ids names token .* ids go from 0 to"):
        engine.generate([Request(prompt(5), Sampling(stop_ids=ids, min_new_tokens=2))])
    assert not engine.busy


def test_a_token_of_the_tokenizer_that_the_model_lacks_ends_nothing():
    """Some models have fewer rows than their tokenizer has tokens."""
    model = tiny_model(vocabulary=tokenizer().vocabulary_size - 8)
    extra = Tokenizer(tokenizer()._json, tokenizer().settings, stop_ids=[tokenizer().vocabulary_size - 1])
    engine = Engine(model, extra, seed=0)
    wanted = Sampling(min_new_tokens=3, max_new_tokens=9, seed=1)
    text = [token for token in prompt(9) if token < model.config.vocabulary]
    [[completion]] = engine.generate([Request(text, wanted)])
    assert 3 <= len(completion.tokens) <= 9


def test_rows_that_move_and_tables_that_grow_survive_a_failure_beside_them():
    requests = [Request(prompt(20 + seed, seed=seed), replace(PENALISED, seed=seed)) for seed in range(6)]
    alone = [tiny_engine().generate([request])[0] for request in requests]
    engine = tiny_engine()
    choose_fails(engine, after=6)
    generations, bad = [], []
    for number, request in enumerate(requests):
        generations.append(engine.submit(request))
        if number % 2:
            bad.append(engine.submit(replace(GUILTY, sampling=replace(PENALISED, seed=13))))
        for _ in range(4):
            engine.step()
    finish(engine, [*generations, *bad])
    assert [one.completions for one in generations] == alone
    assert all(one.failure is not None for one in bad)
    assert torch.equal(engine.scheduler.sampler.count, engine.scheduler.sampler.count[:0])
