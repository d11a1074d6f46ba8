"""Log-probabilities under stop texts and stop tokens: the tokens told cover the text told, and no more."""

import pytest
from generating import tiny_engine, tokenizer
from serving import client, running

LETTERS = {"regex": "[a-m ]{40}"}
STOP_AT = [(0, 1), (7, 10), (11, 12), (20, 26)]


@pytest.fixture(scope="module")
def server():
    with running({"one": tiny_engine(rows=8)}) as address:
        yield client(address)


def told(server, route, stream, **settings):
    """The text, the tokens that come with log-probabilities, and why it ended."""
    asked = {"model": "one", "max_tokens": 60, "temperature": 1.2, "seed": 4, "stream": stream, **settings}
    if route == "chat":
        asked |= {"messages": [{"role": "user", "content": "the town"}], "logprobs": True, "top_logprobs": 1}
        answer = server.chat.completions.create(**asked)
    else:
        asked |= {"prompt": "the town", "logprobs": 1}
        answer = server.completions.create(**asked)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    text, tokens = "", []
    for choice in choices:
        if route == "chat":
            text += (choice.delta if stream else choice.message).content or ""
            tokens += [one.token for one in choice.logprobs.content] if choice.logprobs else []
        else:
            text += choice.text
            tokens += choice.logprobs.tokens if choice.logprobs else []
        # what is streamed is never taken back
        assert len("".join(tokens[:-1])) <= len(text)
    return text, tokens, choices[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["chat", "completion"])
def test_tokens_of_a_stop_text_are_not_told(server, route, stream):
    free, tokens, _ = told(server, route, stream, extra_body=LETTERS)
    assert "".join(tokens) == free
    for start, end in STOP_AT:
        stop = free[start:end]
        text, tokens, reason = told(server, route, stream, stop=[stop, "zzz"], extra_body=LETTERS)
        assert (text, reason) == (free[: free.index(stop)], "stop")
        assert "".join(tokens).startswith(text)
        assert len("".join(tokens[:-1])) < len(text) or not tokens
        assert bool(tokens) == bool(text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_ends_the_text_is_not_told(server, stream):
    free, tokens, _ = told(server, "chat", stream, extra_body=LETTERS)
    ids = [identity for token in tokens for identity in tokenizer().encode(token)]
    assert tokenizer().decode(ids) == free
    stop = ids[5]
    body = {**LETTERS, "stop_token_ids": [stop]}
    text, kept, _ = told(server, "chat", stream, extra_body=body)
    assert text == tokenizer().decode(ids[: ids.index(stop)])
    assert "".join(kept) == text
