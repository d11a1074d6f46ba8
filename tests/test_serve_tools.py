"""Calls of tools in the forms of several families, through the official client and a real server."""

import json
from functools import cache

import openai
import pytest
import torch
from generating import tiny_engine, tiny_model
from serving import ScriptedEngine, client, running
from test_tokens import own, sample_texts, special
from tokenizers import Tokenizer as Backend

from trivium.generate.engine import Engine
from trivium.serve.calls import call_form
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

HELLO = [{"role": "user", "content": "the river"}]
TOWNS = {
    "type": "object",
    "properties": {"town": {"enum": ["Ald", "Moor"]}},
    "required": ["town"],
    "additionalProperties": False,
}
# Shapes of well-known templates, written down anew: where they show tools, and how they write calls.
WRITTEN = "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{{ 'You may answer with a call.\n' }}"
    "{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls[1:] %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "WRITTEN{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}"
    "{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PYTHON = LLAMA.replace("WRITTEN", "{{ '[' + call.name + '(place=\"' + call.arguments.place + '\")]' }}")
DEAF = (
    "{# tools are not for this model #}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = LLAMA.replace("WRITTEN", WRITTEN)
MARKS = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
MARKS += ["<|end_header_id|>", "<|eot_id|>"]
TEMPLATES = {
    "llama": (LLAMA, MARKS),
    "mistral": (MISTRAL, [*MARKS, "[TOOL_CALLS]"]),
    "mistral, letters": (MISTRAL, MARKS),
    "python": (PYTHON, MARKS),
    "deaf": (DEAF, MARKS),
}


@cache
def speaking(name):
    template, marks = TEMPLATES[name]
    backend = Backend.from_str(train_tokenizer(sample_texts(), 400).backend.to_str())
    backend.add_special_tokens([special(mark) for mark in marks])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(json.loads(backend.to_str()), named, {"default": template})


def scripted(name, text, marked=()):
    engine = ScriptedEngine("")
    engine.tokenizer = speaking(name)
    engine.script = [*(engine.tokenizer.token_id(mark) for mark in marked), *engine.tokenizer.encode(text)]
    return engine


LLAMA_CALL = '{"name": "bells", "parameters": {"town": "Ald"}}'
MISTRAL_CALLS = (
    ' [{"name": "bells", "arguments": {"town": "Ald"}, "id": "a00000000"},'
    ' {"name": "doves", "arguments": {"town": "Moor"}, "id": "a00000001"}]'
)
TAGGED = "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"town": "{town}"}}}}\n</tool_call>'
    for name, town in (("bells", "Ald"), ("doves", "Moor"))
)
SCRIPTS = {
    "llama": ("llama", LLAMA_CALL, ()),
    "twice": ("llama", f"{LLAMA_CALL}; {LLAMA_CALL}", ()),
    "json": ("llama", '{"name": "six", "parameters": {}}', ()),
    "words": ("llama", "the {river} rises", ()),
    "cut": ("llama", LLAMA_CALL[:-2], ()),
    "mistral": ("mistral", MISTRAL_CALLS, ("[TOOL_CALLS]",)),
    "letters": ("mistral, letters", f"[TOOL_CALLS]{MISTRAL_CALLS}", ()),
    "python": ("python", '[bells(town="Ald")]', ()),
    "deaf": ("deaf", "the hills", ()),
}


def random_engine(name):
    torch.manual_seed(0)
    tokenizer = speaking(name)
    return Engine(tiny_model(vocabulary=tokenizer.vocabulary_size, context=1024), tokenizer, max_rows=4)


@pytest.fixture(scope="module")
def engines():
    random = {f"random {name}": random_engine(name) for name in ("llama", "mistral", "mistral, letters")}
    written = {name: scripted(*script) for name, script in SCRIPTS.items()}
    return {**written, **random, "own": tiny_engine(), "tags": ScriptedEngine(TAGGED)}


@pytest.fixture(scope="module")
def server(engines):
    with running(engines) as address:
        yield client(address)


def tool(name, **further):
    return {"type": "function", "function": {"name": name, "parameters": TOWNS, **further}}


BOTH = [tool("bells"), tool("doves")]


def asked(server, model, **settings):
    given = {"messages": HELLO, "tools": BOTH, "max_tokens": 200, **settings}
    return server.chat.completions.create(model=model, **given)


def calls_of(choice):
    calls = choice.message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_the_form_of_calls_is_found_in_the_template():
    forms = {name: call_form(speaking(name)) for name in TEMPLATES}
    assert [form and (form.kind, form.key) for form in forms.values()] == [
        ("object", "parameters"), ("list", "arguments"), ("list", "arguments"), None, None,
    ]  # fmt: skip
    assert forms["mistral"].opening == (speaking("mistral").token_id("[TOOL_CALLS]"),)
    assert call_form(own()).kind == "tags"


BELLS, DOVES = ("bells", {"town": "Ald"}), ("doves", {"town": "Moor"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "calls"),
    [("llama", [BELLS]), ("twice", [BELLS] * 2), ("mistral", [BELLS, DOVES]), ("letters", [BELLS, DOVES])],
)
def test_calls_are_read_in_the_models_own_form(server, model, calls, stream):
    if stream:
        chunks = [chunk.choices[0] for chunk in asked(server, model, stream=True)]
        deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert [(one.function.name, json.loads(one.function.arguments)) for one in deltas] == calls
        assert [one.index for one in deltas] == list(range(len(calls)))
        assert not any(chunk.delta.content for chunk in chunks)
        assert chunks[-1].finish_reason == "tool_calls"
        return
    choice = asked(server, model).choices[0]
    assert calls_of(choice) == calls
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "less"), [("twice", 0), ("mistral", 0), ("tags", 0), ("tags", 12)])
def test_an_answer_cut_by_length_says_so_whatever_calls_it_holds(server, engines, model, less, stream):
    """A client must not take the calls it got for all there are: more may have been cut off."""
    most = len(engines[model].script) - less
    whole = {"twice": [BELLS] * 2, "mistral": [BELLS, DOVES], "tags": [BELLS, DOVES]}[model]
    expected = whole[:1] if less else whole
    if stream:
        chunks = [chunk.choices[0] for chunk in asked(server, model, max_tokens=most, stream=True)]
        calls = [call.function for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == expected
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
        return
    choice = asked(server, model, max_tokens=most).choices[0]
    assert calls_of(choice) == expected
    assert choice.finish_reason == "length"
    assert asked(server, model, max_tokens=most + less + 1).choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("model", ["json", "words", "cut"])
def test_what_is_no_call_of_an_offered_tool_stays_text(server, model):
    choice = asked(server, model).choices[0]
    assert choice.message.content == SCRIPTS[model][1]
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("model", ["python", "deaf"])
def test_tools_are_refused_where_their_calls_could_not_be_read(server, model):
    with pytest.raises(openai.BadRequestError, match="leave tools out") as problem:
        asked(server, model)
    assert (problem.value.param, problem.value.code) == ("tools", "no_tools")
    assert server.models.retrieve(model).model_extra["trivium"]["tools"] is False
    assert server.models.retrieve("mistral").model_extra["trivium"]["tools"] is True
    assert asked(server, model, tools=openai.NOT_GIVEN).choices[0].message.content == SCRIPTS[model][1]


@pytest.mark.parametrize("model", ["random llama", "random mistral", "random mistral, letters"])
def test_a_random_model_can_be_forced_to_call(server, model):
    choice = {"type": "function", "function": {"name": "doves"}}
    for seed in range(2):
        forced = asked(server, model, tool_choice=choice, seed=seed, temperature=1.3, max_tokens=120)
        [(name, arguments)] = calls_of(forced.choices[0])
        assert name == "doves"
        assert arguments["town"] in ("Ald", "Moor")


def test_a_call_and_its_answer_go_back_into_the_template(server, engines):
    calls = asked(server, "mistral").choices[0].message.tool_calls
    told = [*HELLO, {"role": "assistant", "tool_calls": calls}]
    told += [{"role": "tool", "tool_call_id": call.id, "content": "frost"} for call in calls]
    asked(server, "mistral", messages=told, max_tokens=2)
    seen = engines["mistral"].tokenizer.decode(engines["mistral"].prompts[-1], skip_control=False)
    for call in calls:
        assert f'"id": "{call.id}"' in seen


@pytest.mark.parametrize("model", ["twice", "mistral"])
def test_no_parallel_calls_means_one(server, model):
    choice = asked(server, model, parallel_tool_calls=False).choices[0]
    assert calls_of(choice) == [BELLS]
    assert len(calls_of(asked(server, model, parallel_tool_calls=True).choices[0])) == 2


def test_strict_is_kept_or_refused(server):
    strict = [tool("bells", strict=True)]
    with pytest.raises(openai.BadRequestError, match="strict is kept only"):
        asked(server, "llama", tools=strict)
    for choice in ("required", {"type": "function", "function": {"name": "bells"}}):
        forced = asked(server, "own", tools=strict, tool_choice=choice, max_tokens=90).choices[0]
        [(_, arguments)] = calls_of(forced)
        assert arguments["town"] in ("Ald", "Moor")
    assert asked(server, "llama", tools=strict, tool_choice="none").choices[0].message.content
