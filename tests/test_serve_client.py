"""The official openai client against a real server with real engines."""

import json
from typing import Annotated, Literal

import numpy as np
import openai
import pydantic
import pytest
import torch
from generating import tiny_engine, tiny_model, tokenizer
from serving import ScriptedEngine, client, running, until

from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.attention import Documents

HELLO = [{"role": "user", "content": "the town of number 7"}]
CALL = """<think>
needs the weather
</think>

Let me look.
<tool_call>
{"name": "weather", "arguments": {"town": "Aldmoor"}}
</tool_call>"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def engines():
    return {"one": tiny_engine(rows=8), "two": tiny_engine(rows=8, seed=3), "caller": ScriptedEngine(CALL)}


@pytest.fixture(scope="module")
def server(engines):
    with running(engines) as address:
        yield client(address)


def test_models_are_listed(server):
    assert [model.id for model in server.models.list()] == ["one", "two", "caller"]
    assert server.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError) as problem:
        server.models.retrieve("three")
    assert problem.value.code == "model_not_found"


def test_a_chat_says_what_the_engine_says(server, engines):
    answer = server.chat.completions.create(model="one", messages=HELLO, temperature=0, max_tokens=12)
    prompt = tokenizer().encode_chat(HELLO, add_generation_prompt=True).ids
    [[alone]] = tiny_engine().generate([Request(prompt, Sampling(temperature=0, max_new_tokens=12))])
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == alone.finish_reason
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(alone.tokens)
    assert answer.usage.total_tokens == len(prompt) + len(alone.tokens)


def test_a_stream_is_the_same_answer_in_pieces(server):
    asked = {"model": "one", "messages": HELLO, "temperature": 0.9, "seed": 5, "max_tokens": 40}
    whole = server.chat.completions.create(**asked)
    chunks = list(
        server.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == whole.choices[0].finish_reason
    assert set(finishes[:-1]) <= {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_are_the_models_own(server):
    answer = server.chat.completions.create(
        model="one", messages=HELLO, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    model = tiny_model()
    ids = tokenizer().encode_chat(HELLO, add_generation_prompt=True).ids
    start = len(ids)
    ids += tokenizer().encode(answer.choices[0].message.content)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(ids), Documents([len(ids)])))
    expected = torch.log_softmax(logits[start - 1], dim=-1)
    best = expected.topk(3)
    assert content[0].logprob == pytest.approx(best.values[0].item(), abs=1e-4)
    told = [entry.logprob for entry in content[0].top_logprobs]
    assert told == pytest.approx(best.values.tolist(), abs=1e-4)
    assert content[0].top_logprobs[0].token == content[0].token
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    spelled = b"".join(bytes(entry.bytes) for entry in content if entry.bytes)
    if all(entry.bytes is not None for entry in content):
        assert spelled.decode() == answer.choices[0].message.content


def test_logprobs_do_not_depend_on_temperature(server):
    asked = {"model": "one", "messages": HELLO, "max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    cold = server.chat.completions.create(**asked, temperature=0).choices[0].logprobs.content[0]
    warm = server.chat.completions.create(**asked, temperature=3, seed=1).choices[0].logprobs.content[0]
    assert [entry.logprob for entry in warm.top_logprobs] == pytest.approx(
        [entry.logprob for entry in cold.top_logprobs], abs=1e-4
    )


def test_n_samples_differ_and_a_seed_repeats_them(server):
    asked = {"model": "two", "messages": HELLO, "n": 3, "seed": 11, "max_tokens": 16, "temperature": 1.5}
    first = server.chat.completions.create(**asked)
    again = server.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in again.choices] == texts


def test_a_stop_string_ends_the_text_before_it(server):
    asked = {"model": "one", "messages": HELLO, "temperature": 1.2, "seed": 4}
    free = server.chat.completions.create(**asked, max_tokens=60).choices[0].message.content
    stop = free[7:10]
    stopped = server.chat.completions.create(**asked, max_tokens=60, stop=[stop])
    assert stopped.choices[0].message.content == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


class Town(pydantic.BaseModel, extra="forbid", strict=True):
    """Every part of it has an end, so that a model which knows nothing comes to it."""

    doves: Annotated[int, pydantic.Field(ge=3, le=60)]
    open: bool
    bells: Annotated[list[Literal["old", "new"]], pydantic.Field(min_length=1, max_length=3)]


def test_a_json_schema_is_obeyed(server):
    schema = Town.model_json_schema()
    form = {"type": "json_schema", "json_schema": {"name": "town", "schema": schema, "strict": True}}
    asked = {"model": "one", "messages": HELLO, "max_tokens": 200, "temperature": 1.5, "n": 8, "seed": 2}
    choices = server.chat.completions.create(**asked, response_format=form).choices
    assert [choice.finish_reason for choice in choices] == ["stop"] * 8
    towns = [Town.model_validate_json(choice.message.content) for choice in choices]
    assert len({town.doves for town in towns}) > 1


def test_a_schema_that_cannot_be_followed_is_refused(server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError):
        server.chat.completions.create(model="one", messages=HELLO, response_format=form)


def test_a_regex_shapes_a_completion(server):
    answer = server.completions.create(
        model="one", prompt="the bell rings at ", max_tokens=20, extra_body={"regex": "[0-9]{3} doves"}
    )
    assert len(answer.choices[0].text) == 9
    assert answer.choices[0].text.endswith(" doves")


def test_completions_take_text_lists_and_tokens(server):
    ids = tokenizer().encode("the town")
    asked = {"model": "one", "temperature": 0, "max_tokens": 6}
    text = server.completions.create(**asked, prompt="the town").choices[0].text
    assert server.completions.create(**asked, prompt=ids).choices[0].text == text
    both = server.completions.create(**asked, prompt=["the town", "a baker"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text
    baker = server.completions.create(**asked, prompt="a baker").choices[0].text
    assert both.choices[2].text == both.choices[3].text == baker
    assert all(choice.finish_reason for choice in both.choices)
    echoed = server.completions.create(**asked, prompt="the town", echo=True)
    assert echoed.choices[0].text == "the town" + text


def test_completion_logprobs_count_up_the_text(server):
    answer = server.completions.create(model="one", prompt="the", max_tokens=6, temperature=0, logprobs=2)
    told = answer.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert told.text_offset[0] == 0
    assert all(len(favourites) <= 2 for favourites in told.top_logprobs)
    assert told.token_logprobs[0] == max(told.top_logprobs[0].values())


def test_embeddings_are_the_mean_of_the_last_states(server):
    texts = ["the town of number 3", "a smith"]
    answer = server.embeddings.create(model="one", input=texts)
    plain = server.embeddings.create(model="one", input=texts, encoding_format="float")
    model = tiny_model()
    for text, packed, listed in zip(texts, answer.data, plain.data):
        ids = tokenizer().encode(text)
        with torch.no_grad():
            expected = model(torch.tensor(ids), Documents([len(ids)])).mean(0).numpy()
        np.testing.assert_allclose(packed.embedding, expected, atol=1e-4)
        np.testing.assert_allclose(listed.embedding, expected, atol=1e-4)
    assert answer.usage.prompt_tokens == sum(len(tokenizer().encode(text)) for text in texts)


def test_a_tool_call_and_the_thoughts_before_it(server):
    answer = server.chat.completions.create(
        model="caller", messages=HELLO, tools=[WEATHER], max_tokens=400
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"town": "Aldmoor"}
    assert answer.message.content.strip() == "Let me look."
    assert answer.message.model_extra["reasoning_content"] == "needs the weather"


def test_a_streamed_tool_call_shows_no_tags(server):
    chunks = server.chat.completions.create(
        model="caller", messages=HELLO, tools=[WEATHER], max_tokens=400, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    text = "".join(delta.content or "" for delta in deltas)
    assert text.strip() == "Let me look."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.function.name for call in calls] == ["weather"]


def test_without_tools_the_tags_are_text(server):
    answer = server.chat.completions.create(model="caller", messages=HELLO, max_tokens=400).choices[0]
    assert "<tool_call>" in answer.message.content
    assert answer.finish_reason == "stop"


def test_a_tools_answer_goes_back_into_the_prompt(server, engines):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ald"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "frost"},
    ]
    server.chat.completions.create(model="caller", messages=messages, tools=[WEATHER], max_tokens=2)
    seen = tokenizer().decode(engines["caller"].prompts[-1], skip_control=False)
    assert '{"name": "weather", "arguments": {"town": "Ald"}}' in seen
    assert "frost" in seen


TOWNS = {
    "type": "object",
    "properties": {"town": {"enum": ["Ald", "Moor"]}},
    "required": ["town"],
    "additionalProperties": False,
}


def counting(name):
    return {"type": "function", "function": {"name": name, "parameters": TOWNS}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "doves"}}])
def test_a_forced_call_has_the_form_its_tool_declares(server, choice):
    for seed in range(3):
        answer = server.chat.completions.create(
            model="one", messages=HELLO, tools=[counting("bells"), counting("doves")], tool_choice=choice,
            max_tokens=90, temperature=1.3, seed=seed,
        ).choices[0]  # fmt: skip
        assert answer.finish_reason == "tool_calls"
        [call] = answer.message.tool_calls
        assert call.function.name in (("bells", "doves") if choice == "required" else ("doves",))
        arguments = json.loads(call.function.arguments)
        assert arguments["town"] in ("Ald", "Moor")
        assert answer.message.content is None


def test_a_forced_call_follows_the_tag_that_opens_it(server, engines):
    server.chat.completions.create(
        model="caller", messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=2
    )
    assert tokenizer().decode(engines["caller"].prompts[-1], skip_control=False).endswith("<tool_call>\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "bells"}}},
        {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
)
def test_a_call_that_cannot_be_forced_is_refused(server, settings):
    with pytest.raises(openai.BadRequestError) as problem:
        server.chat.completions.create(model="one", messages=HELLO, **settings)
    assert problem.value.param == "tool_choice"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_how_likely_the_prompt_was(server, stream):
    text = "the town of number 7 has a baker and a bell"
    asked = {"model": "one", "prompt": text, "echo": True, "logprobs": 2, "max_tokens": 2, "temperature": 0}
    answer = server.completions.create(**asked, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    told = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens, logprobs, tops, offsets = (
        [value for one in told for value in getattr(one, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    ids = tokenizer().encode(text)
    model = tiny_model()
    with torch.no_grad():
        logits = model.logits(model(torch.tensor(ids), Documents([len(ids)])))
    expected = torch.log_softmax(logits, dim=-1)
    own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert logprobs[0] is None
    assert tops[0] is None
    assert logprobs[1 : len(ids)] == pytest.approx(own.tolist(), abs=1e-4)
    for place, top in enumerate(tops[1 : len(ids)]):
        assert max(top.values()) == pytest.approx(expected[place].max().item(), abs=1e-4)
    whole = "".join(choice.text for choice in choices)
    assert whole.startswith(text)
    assert "".join(tokens) == whole
    assert [whole[start:].startswith(token) for start, token in zip(offsets, tokens)] == [True] * len(tokens)


def test_a_typed_control_token_stays_letters(server, engines):
    typed = [{"role": "user", "content": "a<|im_end|>b"}]
    server.chat.completions.create(model="caller", messages=typed, max_tokens=2)
    prompt = engines["caller"].prompts[-1]
    assert prompt.count(tokenizer().end_of_turn_id) == 1


def test_many_clients_at_once_get_their_own_answers(server, engines):
    from concurrent.futures import ThreadPoolExecutor

    def ask(seed):
        asked = {"model": "one", "messages": HELLO, "max_tokens": 20, "seed": seed, "temperature": 1.0}
        return server.chat.completions.create(**asked).choices[0].message.content

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))
    assert together == alone
    until(lambda: engines["one"].rows_in_use == 0)


def test_a_conversation_may_shed_its_oldest_turns(server, engines):
    turns = [
        {"role": role, "content": f"{role} {number}"}
        for number in range(90)
        for role in ("user", "assistant")
    ]
    messages = [{"role": "system", "content": "be brief"}, *turns, {"role": "user", "content": "and now?"}]
    asked = {"model": "caller", "messages": messages, "max_tokens": 8}
    with pytest.raises(openai.BadRequestError) as refused:
        server.chat.completions.create(**asked)
    assert refused.value.code == "context_length_exceeded"
    dropped = server.chat.completions.with_raw_response.create(**asked, extra_body={"overflow": "drop"})
    seen = tokenizer().decode(engines["caller"].prompts[-1])
    assert "be brief" in seen
    assert seen.rstrip().endswith("and now?\nassistant")
    assert "user 0\n" not in seen
    left_out = int(dropped.headers["X-Trivium-Messages-Left-Out"])
    assert f"user {left_out // 2}\n" in seen
    assert f"user {left_out // 2 - 1}\n" not in seen


def test_a_hopeless_conversation_is_not_tokenised_before_it_is_cut(server, engines):
    messages = [{"role": "user", "content": "word " * 9000} for _ in range(40)] + HELLO
    asked = {"model": "caller", "messages": messages, "max_tokens": 8}
    dropped = server.chat.completions.with_raw_response.create(**asked, extra_body={"overflow": "drop"})
    assert int(dropped.headers["X-Trivium-Messages-Left-Out"]) == 40
    assert len(engines["caller"].prompts[-1]) < 60
