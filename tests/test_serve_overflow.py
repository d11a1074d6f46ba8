"""Conversations that are too long, and thinking, through the official openai client."""

import asyncio
import json

import httpx
import openai
import pytest
from generating import tiny_engine, tokenizer
from serving import ScriptedEngine, client, raw, running, until

from trivium.generate.requests import Request, Slide
from trivium.generate.sampling import Sampling
from trivium.serve.limits import Limits
from trivium.serve.prompts import within_reach

TURNS = [
    {"role": role, "content": f"{role} {number}: the bell rings"}
    for number in range(60)
    for role in ("user", "assistant")
]
SYSTEM = {"role": "system", "content": "be brief"}
LONG = [SYSTEM, *TURNS, {"role": "user", "content": "and now?"}]


class Summing(ScriptedEngine):
    """Says one thing when it is asked for a summary and another to everyone else."""

    def __init__(self, **settings):
        super().__init__("<think>\nhm\n</think>\n\nsixty bells", **settings)
        self.asked = []

    def submit(self, request, on_token=None):
        words = tokenizer().decode(request.prompt)
        self.asked.append(words)
        said = (
            "bells rang" if "Summarise the conversation" in words else "<think>\nhm\n</think>\n\nsixty bells"
        )
        self.script = tokenizer().encode(said)
        return super().submit(request, on_token)


@pytest.fixture(scope="module")
def engines():
    return {
        "real": tiny_engine(rows=8),
        "summing": Summing(context=600),
        "learned": tiny_engine(rows=2, positions="learned"),
    }


@pytest.fixture(scope="module")
def address(engines):
    with running(engines) as address:
        yield address


@pytest.fixture(scope="module")
def server(address):
    return client(address)


def test_without_a_word_a_long_conversation_is_refused(server):
    for overflow in (None, "refuse"):
        with pytest.raises(openai.BadRequestError) as refused:
            server.chat.completions.create(
                model="real", messages=LONG, max_tokens=8, extra_body={"overflow": overflow}
            )
        assert refused.value.code == "context_length_exceeded"


def test_what_slides_is_written_like_the_engine_writes_it(server):
    ids = tokenizer().encode_prompt(LONG)
    assert len(ids) > 512
    request = Request(ids, Sampling(temperature=0, max_new_tokens=40), slide=Slide())
    [[alone]] = tiny_engine().generate([request])
    answer = server.chat.completions.with_raw_response.create(
        model="real", messages=LONG, max_tokens=40, temperature=0, extra_body={"overflow": "slide"}
    )
    said = answer.parse()
    assert said.choices[0].message.content == alone.text
    assert said.usage.prompt_tokens == len(ids)
    forgotten = Slide().forgotten(len(ids), 512)
    assert 0 < forgotten < len(ids)
    assert int(answer.headers["X-Trivium-Tokens-Forgotten"]) == forgotten
    assert said.model_extra["trivium"] == {"overflow": "slide", "prompt_tokens_forgotten": forgotten}


def test_what_slides_may_write_past_its_window(server):
    short = [{"role": "user", "content": "the town of number 7"}]
    asked = {"model": "real", "messages": short, "max_tokens": 600, "temperature": 1.0, "seed": 3}
    kept_on = {"logit_bias": {str(token): -100 for token in tokenizer().stop_ids}}
    with pytest.raises(openai.BadRequestError):
        server.chat.completions.create(**asked, **kept_on)
    answer = server.chat.completions.create(**asked, **kept_on, extra_body={"overflow": "slide"})
    assert answer.usage.completion_tokens == 600


def test_a_model_that_cannot_slide_says_so(server):
    with pytest.raises(openai.BadRequestError, match="cannot slide"):
        server.chat.completions.create(
            model="learned", messages=LONG, max_tokens=8, extra_body={"overflow": "slide"}
        )


@pytest.mark.parametrize("stream", [False, True])
def test_old_turns_are_summarised_by_the_model_itself(server, engines, stream):
    engines["summing"].asked.clear()
    answer = server.chat.completions.with_raw_response.create(
        model="summing", messages=LONG, max_tokens=60, stream=stream, extra_body={"overflow": "summarise"}
    )
    told = answer.parse()
    chunks = list(told) if stream else [told]
    notes = [chunk.model_extra["trivium"] for chunk in chunks if "trivium" in chunk.model_extra]
    [note] = notes
    summarised = note["messages_summarised"]
    assert int(answer.headers["X-Trivium-Messages-Summarised"]) == summarised > 0
    assert note["overflow"] == "summarise"
    assert note["summary"] == "bells rang"
    *asked, final = engines["summing"].asked
    assert asked
    assert all("Summarise the conversation" in one for one in asked)
    assert note["summary_usage"]["completion_tokens"] == len(asked) * len(tokenizer().encode("bells rang"))
    assert note["summary_usage"]["prompt_tokens"] > 100
    # the system message is what it was, and what the summary stands for is gone
    assert final.startswith("system\nbe brief\n")
    assert "Summary of the earlier conversation: bells rang" in final
    assert TURNS[summarised]["content"] in final
    assert TURNS[summarised - 2]["content"] not in final
    # every summarised turn was read
    assert all(any(turn["content"] in one for one in asked) for turn in TURNS[:summarised:2])


@pytest.mark.parametrize("overflow", ["drop", "summarise"])
def test_a_quarter_of_the_context_is_left_to_an_answer_of_no_given_length(server, engines, overflow):
    answer = server.chat.completions.create(model="summing", messages=LONG, extra_body={"overflow": overflow})
    assert answer.model_extra["trivium"]["overflow"] == overflow
    assert 300 < len(engines["summing"].prompts[-1]) <= 450
    assert engines["summing"].samplings[-1].max_new_tokens == 600 - len(engines["summing"].prompts[-1])


@pytest.mark.parametrize("overflow", ["drop", "slide"])
def test_the_opening_of_a_forced_call_is_fitted_too(overflow):
    bells = [{"type": "function", "function": {"name": "bells", "parameters": {"type": "object"}}}]
    messages = [SYSTEM, *TURNS[:11]]
    full = len(tokenizer().encode_prompt(messages, tools=bells)) + 8
    engine = ScriptedEngine("a", context=full)
    with running({"full": engine}) as address:
        client(address).chat.completions.create(
            model="full", messages=messages, tools=bells, tool_choice="required", max_tokens=8,
            extra_body={"overflow": overflow},
        )  # fmt: skip
    [prompt] = engine.prompts
    assert tokenizer().decode(prompt, skip_control=False).endswith("<tool_call>\n")
    assert overflow == "slide" or len(prompt) + 8 <= full


def test_a_real_model_summarises_and_answers(server):
    answer = server.chat.completions.create(
        model="real", messages=[SYSTEM, *LONG[-41:]], max_tokens=40, extra_body={"overflow": "summarise"}
    )
    assert answer.usage.prompt_tokens + 40 <= 512
    assert answer.model_extra["trivium"]["summary"]


def test_what_fits_says_nothing_of_overflow(server):
    answer = server.chat.completions.with_raw_response.create(
        model="summing", messages=[SYSTEM, TURNS[0]], max_tokens=40, extra_body={"overflow": "summarise"}
    )
    assert "trivium" not in answer.parse().model_extra
    assert not [name for name in answer.headers if name.startswith("x-trivium")]


def test_a_conversation_beyond_any_summary_is_refused_before_the_model_is_asked(server, engines):
    engines["summing"].asked.clear()
    endless = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"}] * 40
    with pytest.raises(openai.BadRequestError, match="16 parts"):
        server.chat.completions.create(
            model="summing", messages=[*endless, TURNS[0]], max_tokens=8, extra_body={"overflow": "summarise"}
        )
    assert engines["summing"].asked == []


def test_a_busy_server_summarises_nothing():
    engine = Summing(context=600, rows=1)
    with running({"busy": engine}, limits=Limits(queued=0, drain_seconds=2)) as address:
        engine.delay = 0.3
        asked = {"model": "busy", "max_tokens": 30}
        stream = client(address).chat.completions.create(**asked, messages=TURNS[:1], stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            client(address).chat.completions.create(
                **asked, messages=LONG, extra_body={"overflow": "summarise"}
            )
        engine.delay = 0.0
        stream.close()


def test_a_client_that_leaves_during_the_summary_frees_its_row():
    engine = Summing(context=600)
    with running({"slow": engine}) as address:
        engine.delay = 0.5
        body = {"model": "slow", "messages": LONG, "max_tokens": 30, "overflow": "summarise"}

        async def leave():
            async with httpx.AsyncClient(base_url=address, trust_env=False) as http:
                asking = asyncio.ensure_future(http.post("/v1/chat/completions", json=body))
                while not engine.rows_in_use:
                    await asyncio.sleep(0.01)
                asking.cancel()

        asyncio.run(leave())
        until(lambda: engine.rows_in_use == 0)
        with raw(address) as http:
            until(lambda: 'trivium_samples_inside{model="slow"} 0' in http.get("/metrics").text)
        assert len(engine.asked) == 1


def test_thinking_is_asked_for(server, engines):
    answer = server.chat.completions.create(
        model="summing", messages=[SYSTEM, TURNS[0]], max_tokens=60, extra_body={"reasoning": "ask"}
    )
    assert "between <think> and </think>" in engines["summing"].asked[-1]
    assert engines["summing"].asked[-1].startswith("system\nbe brief\n")
    assert answer.choices[0].message.content == "sixty bells"
    assert answer.choices[0].message.model_extra["reasoning_content"] == "hm"
    server.chat.completions.create(
        model="summing", messages=[SYSTEM, TURNS[0]], max_tokens=60, extra_body={"reasoning": "off"}
    )
    assert "<think>" not in engines["summing"].asked[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_that_is_opened_for_the_model_is_no_answer(server, stream):
    asked = {"model": "real", "messages": [TURNS[0]], "max_tokens": 30, "temperature": 0}
    answer = server.chat.completions.create(**asked, stream=stream, extra_body={"reasoning": "open"})
    said = [chunk.choices[0].delta for chunk in answer] if stream else [answer.choices[0].message]
    assert "".join(one.content or "" for one in said) == ""
    assert any(one.model_extra.get("reasoning_content") for one in said)


def test_an_opened_thought_is_the_end_of_the_prompt(server, engines):
    server.chat.completions.create(
        model="summing", messages=[TURNS[0]], max_tokens=2, extra_body={"reasoning": "open"}
    )
    assert engines["summing"].asked[-1].endswith("assistant\n<think>\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"regex": "[0-9]"}},
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "ring"}}],
        },
    ],
)
def test_a_form_leaves_no_room_for_thoughts(server, settings):
    extra = {**settings.pop("extra_body", {}), "reasoning": "ask"}
    with pytest.raises(openai.BadRequestError, match="reasoning: ask leaves thoughts"):
        server.chat.completions.create(model="real", messages=[TURNS[0]], **settings, extra_body=extra)


def test_wrong_words_are_refused(address):
    with raw(address) as http:
        for field, value in (("overflow", "forget"), ("reasoning", True), ("reasoning", "loud")):
            body = {"model": "real", "messages": [TURNS[0]], field: value}
            answer = http.post("/v1/chat/completions", content=json.dumps(body))
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == field


def test_turns_far_beyond_the_context_are_left_out_whole():
    user, said = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    pasted, brief = {"role": "user", "content": "b" * 50}, {"role": "system", "content": "c" * 50}
    assert within_reach([brief, pasted, said, user, said, user], 10) == [brief, user, said, user]
    assert within_reach([user, said, brief, pasted, said], 10) == [user, said, brief, pasted, said]
