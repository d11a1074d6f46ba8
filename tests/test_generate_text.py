"""Text out of the engine: streaming, stop texts, grammars, alternatives."""

import json
import re

import pytest
import tokenizers
from generating import prompt, tiny_engine, tokenizer
from hypothesis import given
from hypothesis import strategies as some

from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.generate.streaming import TextStream, token_texts
from trivium.kit.errors import TriviumError

SAMPLE = "Zoë saw 3 doves 🕊️ over the town; its bell rings — “twelve” — ünder 東京."


def stream_of(text, stops=()):
    stream = TextStream(tokenizer(), stops)
    pieces = []
    for token in tokenizer().encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


def test_streamed_pieces_are_whole_letters_and_add_up():
    pieces, stream = stream_of(SAMPLE)
    assert "".join(pieces) == stream.text == SAMPLE
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 10


def test_bytes_that_are_no_letter_come_out_in_the_end():
    stream = TextStream(tokenizer(), ())
    first = tokenizer().encode("é")[0]
    assert len(tokenizer().encode("é")) == 2
    assert [stream.push(first), stream.finish()] == ["", "\ufffd"]


@given(some.lists(some.one_of(some.text(max_size=12), some.integers(0, 255)), max_size=9), some.booleans())
def test_a_stream_is_its_tokens_decoded_at_once(parts, watching):
    ids, halves = [], 0
    for part in parts:
        if isinstance(part, str):
            ids, halves = ids + tokenizer().encode(part), 0 if part else halves
        elif halves < 3:  # pieces of letters, fewer than a letter may have
            ids, halves = [*ids, part], halves + 1
    stream = TextStream(tokenizer(), ("never said there",) if watching else ())
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer().decode(ids)


def test_a_token_is_decoded_once_for_all_texts(monkeypatch):
    token_texts.cache_clear()
    ids = tokenizer().encode("the town of number 3 has a baker and 3 doves. " * 20)
    decoded, decode = [], type(tokenizer()).decode
    monkeypatch.setattr(
        type(tokenizer()), "decode", lambda self, ids, *rest: decoded.append(ids) or decode(self, ids, *rest)
    )
    for _ in range(3):
        stream = TextStream(tokenizer(), ())
        for token in ids:
            stream.push(token)
    assert len(decoded) == len(set(ids))


def test_where_the_first_token_is_spelt_otherwise_each_is_decoded_behind_another():
    words = tokenizers.models.WordLevel({"▁the": 0, "▁town": 1, "s": 2}, unk_token="s")
    backend = tokenizers.Tokenizer(words)
    backend.decoder = tokenizers.decoders.Metaspace()
    assert backend.decode([1]) == "town"
    strange = type("Strange", (), {"backend": backend, "decode": lambda self, ids: backend.decode(ids)})()
    stream = TextStream(strange, ())
    assert [stream.push(token) for token in (0, 1, 2, 1)] == ["the", " town", "s", " town"]


@pytest.mark.parametrize("stop", ["doves", "ves 🕊️ ov", "; its bell", "3 d", "東"])
def test_a_stop_text_across_token_borders_ends_the_text_before_it(stop):
    pieces, stream = stream_of(SAMPLE, ("never there", stop))
    assert stream.stopped
    assert "".join(pieces) == stream.text == SAMPLE[: SAMPLE.index(stop)]


def test_what_only_looked_like_a_stop_text_is_given_back():
    pieces, stream = stream_of(SAMPLE, ("rings — “thirteen”", "doves!", "東京都"))
    assert not stream.stopped
    assert "".join(pieces) == SAMPLE


@pytest.mark.parametrize("stop", ["doves", "ves 🕊️ ov", "; its bell", "3 d", "東", "never there"])
def test_tokens_are_unsettled_from_where_a_stop_text_may_have_begun(stop):
    stream, begun = TextStream(tokenizer(), (stop,)), []
    ids = tokenizer().encode(SAMPLE)
    for count, token in enumerate(ids, start=1):
        begun.append(len(tokenizer().decode(ids[: count - 1]).rstrip("\ufffd")))
        stream.push(token)
        assert stream.unsettled == sum(place >= len(stream.text) for place in begun)
        if stream.stopped:
            break
    stream.finish()
    assert stream.stopped == (stop in SAMPLE)
    if stream.stopped:
        kept = tokenizer().decode(ids[: count - stream.unsettled])
        assert kept.rstrip("\ufffd")[: len(stream.text)] == stream.text
        # one token fewer would be too few
        assert len(tokenizer().decode(ids[: count - stream.unsettled - 1])) < len(stream.text)
    else:
        assert stream.unsettled == 0


def test_stop_texts_end_a_completion_wherever_they_fall():
    engine = tiny_engine()
    settings = Sampling(seed=3, max_new_tokens=60, stop_ids=())
    (free,) = engine.generate([Request(prompt(8), settings)])[0]
    assert free.finish_reason == "length"
    decoded = tokenizer().decode(free.tokens)
    assert free.text == decoded
    for start in (5, 17, 30):
        stop = decoded[start : start + 3]
        if "\ufffd" in stop:
            continue
        settings = Sampling(seed=3, max_new_tokens=60, stop_ids=(), stop=(stop, "zzzzzz"))
        (stopped,) = engine.generate([Request(prompt(8), settings)])[0]
        assert stopped.finish_reason == "stop"
        assert stopped.text == decoded[: decoded.index(stop)]
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]


def test_a_stop_token_ends_the_completion_and_is_not_in_its_text():
    engine = tiny_engine()
    (free,) = engine.generate([Request(prompt(8), Sampling(seed=3, max_new_tokens=40, stop_ids=()))])[0]
    stop = free.tokens[15]
    first = free.tokens.index(stop)
    settings = Sampling(seed=3, max_new_tokens=40, stop_ids=(stop,))
    (stopped,) = engine.generate([Request(prompt(8), settings)])[0]
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == tokenizer().decode(free.tokens[:first])
    later = Sampling(seed=3, max_new_tokens=40, min_new_tokens=first + 5, stop_ids=(stop,))
    (held,) = engine.generate([Request(prompt(8), later)])[0]
    assert len(held.tokens) >= first + 5
    assert stop not in held.tokens[: first + 4]


def test_listeners_hear_every_token_and_the_end():
    engine = tiny_engine()
    events = []
    settings = Sampling(seed=3, max_new_tokens=20, logprobs=True, top_logprobs=3, stop_ids=())
    running = engine.submit(Request(prompt(8), settings, n=2), events.append)
    while engine.step():
        pass
    for sample, completion in enumerate(running.completions):
        mine = [event for event in events if event.sample == sample]
        assert [event.token for event in mine[:-1]] == completion.tokens
        assert "".join(event.text for event in mine) == completion.text
        assert [event.logprob for event in mine[:-1]] == pytest.approx(completion.logprobs)
        assert mine[-1].completion == completion
        for event, favourites in zip(mine[:-1], completion.top_logprobs, strict=True):
            assert event.alternatives == favourites
            assert event.token in favourites
            assert len(favourites) in (3, 4)
            assert max(favourites.values()) == next(iter(favourites.values()))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_random_model_obeys_a_schema_and_a_regular_expression():
    pytest.importorskip("llguidance")
    engine = tiny_engine(scale=0.05)
    requests = [Request(prompt(5, seed=i), Sampling(seed=i, json_schema=SCHEMA)) for i in range(3)]
    pattern = r"[a-c]{3}-[0-9]{2}"
    requests += [Request(prompt(5, seed=i), Sampling(seed=i, regex=pattern), n=2) for i in range(2)]
    requests.append(Request(prompt(5), Sampling(seed=1, max_new_tokens=30)))
    answers = engine.generate(requests)
    for (one,) in answers[:3]:
        value = json.loads(one.text)
        assert set(value) == {"name", "age"}
        assert 0 <= value["age"] <= 99
        assert one.finish_reason == "stop"
    for one in [*answers[3], *answers[4]]:
        assert re.fullmatch(pattern, one.text)
        assert one.finish_reason == "stop"
    assert answers[5] == tiny_engine(scale=0.05).generate(requests[5:])[0]


def test_a_grammar_that_breaks_on_the_way_is_no_end_of_the_text():
    # the outer object is small enough to follow, the inner one is not
    inner = {"type": "object", "properties": {f"a{number}": {} for number in range(2000)}}
    parts = {"k": {"enum": ["x", "y"]}, "a": inner}
    outer = {"type": "object", "properties": parts, "required": ["k", "a"], "additionalProperties": False}
    [[cut]] = tiny_engine().generate([Request(prompt(5), Sampling(seed=1, json_schema=outer))])
    assert cut.text.startswith('{"k":"')
    assert cut.finish_reason == "length"


@pytest.mark.parametrize("wrong", [{"regex": "(["}, {"json_schema": {"type": "no such type"}}])
def test_a_grammar_that_cannot_be_is_refused_in_a_sentence(wrong):
    pytest.importorskip("llguidance")
    engine = tiny_engine()
    with pytest.raises(TriviumError, match=next(iter(wrong))):
        engine.submit(Request([1], Sampling(**wrong)))
    assert not engine.busy
