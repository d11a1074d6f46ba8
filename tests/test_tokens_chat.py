"""Conversations: rendered as in transformers, learned where the assistant speaks (L6), never typed (L5)."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import byte_fallback, own, sample_texts, special
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from trivium.kit.errors import TriviumError
from trivium.tokens import control
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

# Shapes of well-known templates, written down anew for these tests: what matters is how they treat a turn.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + text + '\n</tool_response>' }}"
    "{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant here') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOL = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "smol": SMOL,
    "zephyr": ZEPHYR,
}
STOPS = {
    "own": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "smol": "<|im_end|>",
    "zephyr": "</s>",
}
CONTROL = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
CONTROL += ["<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@cache
def with_template(name: str) -> Tokenizer:
    if name == "own":
        return own()
    content = json.loads(train_tokenizer(sample_texts(), 400).backend.to_str())
    backend = Backend.from_str(json.dumps(content))
    backend.add_special_tokens([special(token) for token in CONTROL])
    return Tokenizer(json.loads(backend.to_str()), NAMED, {"default": TEMPLATES[name]})


def learned_turns(tokenizer: Tokenizer, messages: list[dict], **options) -> list[str]:
    chat = tokenizer.encode_chat(messages, **options)
    assert len(chat.ids) == len(chat.learned) == len(chat.turns)
    assert [turn >= 0 for turn in chat.turns] == chat.learned
    return [
        tokenizer.decode([i for i, t in zip(chat.ids, chat.turns, strict=True) if t == turn], False)
        for turn in range(max(chat.turns, default=-1) + 1)
    ]


def said(name: str, text: str, last: bool) -> str:
    """What the assistant's turn must be, given what the template makes of the text."""
    if name in ("llama3", "gemma"):
        text = text.strip()
    if name == "qwen3" and "</think>" in text:
        text = text.split("</think>")[-1].lstrip("\n")
    if name == "qwen3" and last:
        text = "<think>\n\n</think>\n\n" + text
    return (" " if name == "mistral" else "") + text + STOPS[name]


letters = st.text(st.characters(exclude_categories=("Cs",)), max_size=25)
contents = st.one_of(
    letters,
    st.sampled_from(
        ["", " ", "\n\nindented", "<|im_end|>", "</s>x", "<|im_", "<", "a [/INST] b", "<|eot_id|>\n"]
    ),
    letters.map(lambda text: f"{text}<|im_start|>assistant\n{text}"),
)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("name", STOPS)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_exactly_the_assistants_text_and_its_stop_are_learned(name: str, turns: list) -> None:
    tokenizer = with_template(name)
    messages = []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    expected = [said(name, answer, index == len(turns) - 1) for index, (_, answer) in enumerate(turns)]
    assert learned_turns(tokenizer, messages) == expected


@pytest.mark.parametrize("name", STOPS)
@settings(max_examples=40, deadline=None)
@given(user=contents, assistant=contents)
def test_what_is_typed_stays_letters(name: str, user: str, assistant: str) -> None:
    tokenizer = with_template(name)

    def controls(first: str, second: str) -> list[int]:
        chat = tokenizer.encode_chat(
            [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        )
        return [identity for identity in chat.ids if identity in tokenizer.control_ids]

    assert controls(user, assistant) == controls("plain", "words")


@pytest.mark.parametrize("name", STOPS)
@settings(max_examples=40, deadline=None)
@given(user=letters, assistant=st.text("abc xyz", min_size=1, max_size=20).filter(lambda s: s == s.strip()))
def test_rendering_and_ids_are_those_of_transformers(name: str, user: str, assistant: str) -> None:
    tokenizer = with_template(name)
    referee = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokenizer.settings)
    referee.chat_template = tokenizer.templates["default"]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    assert tokenizer.render_chat(messages) == referee.apply_chat_template(messages, tokenize=False)
    if any(tokenizer.token(control) in user for control in tokenizer.control_ids):
        return
    expected = referee.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenizer.encode_chat(messages).ids == expected
    prompt = referee.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)
    got = tokenizer.encode_chat(messages[:1], add_generation_prompt=True)
    assert got.ids == prompt["input_ids"]
    assert not any(got.learned)


@pytest.mark.parametrize("name", STOPS)
def test_training_begins_where_generation_will(name: str) -> None:
    tokenizer = with_template(name)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n  spaced out"}]
    prompt = tokenizer.encode_chat(messages[:1], add_generation_prompt=True).ids
    chat = tokenizer.encode_chat(messages)
    assert chat.ids[: len(prompt)] == prompt
    assert chat.learned[: len(prompt) + 1] == [False] * len(prompt) + [True]


@pytest.mark.parametrize("name", [*STOPS])
def test_the_end_of_a_turn_is_known(name: str) -> None:
    tokenizer = with_template(name)
    assert tokenizer.end_of_turn_id is not None
    assert tokenizer.token(tokenizer.end_of_turn_id) == STOPS[name]
    assert tokenizer.end_of_turn_id in tokenizer.stop_ids


def test_control_strings_do_not_form_across_joined_parts() -> None:
    parts = [{"type": "text", "text": "<|im_ "}, {"type": "text", "text": " end|>"}]
    joining = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text | trim }}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
    )
    tokenizer = Tokenizer(json.loads(own().backend.to_str()), own().settings, {"default": joining})
    chat = tokenizer.encode_chat([{"role": "user", "content": parts}])
    assert chat.ids.count(tokenizer.token_id("<|im_end|>")) == 1
    assert "<|im_end|><|im_end|>" in tokenizer.decode(chat.ids, skip_control=False)


def test_a_thinking_template_that_forgets_old_thoughts() -> None:
    tokenizer = with_template("qwen3")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>\nlong\n</think>\n\none."},
        {"role": "user", "content": "two?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2 <|im_end|>"},
        {"role": "assistant", "content": "two.", "reasoning_content": "hm"},
    ]
    assert learned_turns(tokenizer, messages) == [
        "one.<|im_end|>",
        '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\nhm\n</think>\n\ntwo.<|im_end|>",
    ]


def test_a_template_of_which_no_prompt_is_a_beginning() -> None:
    counting = {"default": "{{ messages | length }}" + QWEN3}
    tokenizer = Tokenizer(json.loads(with_template("qwen3").backend.to_str()), NAMED, counting)
    messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "<think>\na\n</think>\n\none."},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "two.", "reasoning_content": "b"},
    ]
    assert learned_turns(tokenizer, messages) == [
        "one.<|im_end|>",
        "<think>\nb\n</think>\n\ntwo.<|im_end|>",
    ]


def test_tools_calls_and_thoughts_in_our_own_template() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "</tool_call><|im_end|>"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three", "reasoning_content": "why"},
    ]
    text = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call><|im_end|>"}}\n</tool_call>'
    assert learned_turns(own(), messages, tools=tools) == [
        f"{text}\n{text}<|im_end|>",
        "<think>\nwhy\n</think>\nthree<|im_end|>",
    ]
    referee = PreTrainedTokenizerFast(tokenizer_object=own().backend, **own().settings)
    referee.chat_template = own().templates["default"]
    rendered = own().render_chat(messages, tools=tools)
    assert rendered == referee.apply_chat_template(messages, tools=tools, tokenize=False)
    assert '"name": "f"' in rendered.split("<|im_end|>")[0]


def test_markers_that_enclose_too_much_or_too_little_are_set_right() -> None:
    wide = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
        "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    narrow = wide.replace(
        "{% generation %}<|im_start|>assistant\n", "<|im_start|>assistant\n{% generation %}"
    )
    narrow = narrow.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    for template in (wide, narrow):
        tokenizer = Tokenizer(json.loads(own().backend.to_str()), own().settings, {"default": template})
        assert learned_turns(tokenizer, messages) == ["b<|im_end|>"] * 2


@pytest.mark.parametrize("prefix", ["always", "first", "never"])
def test_sentencepiece_families_learn_the_turn_too(prefix: str) -> None:
    backend = byte_fallback(prefix)
    backend.add_special_tokens([special("<|end|>")])
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer = Tokenizer(json.loads(backend.to_str()), NAMED, {"default": template})
    messages = [
        {"role": "user", "content": "the <s> river"},
        {"role": "assistant", "content": "the hills"},
    ] * 2
    assert [turn.strip() for turn in learned_turns(tokenizer, messages)] == ["the hills</s>"] * 2
    referee = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
    referee.chat_template = template
    plain = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "the hills"}] * 2
    expected = referee.apply_chat_template(plain, return_dict=True)["input_ids"]
    assert tokenizer.encode_chat(plain).ids == expected


def test_a_stop_that_swallows_space_keeps_transformers_ids() -> None:
    content = json.loads(train_tokenizer(sample_texts(), 400).backend.to_str())
    backend = Backend.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)])
    turn = "{{ '<|im_start|>' + m.role + '<|end|>\n' + m.content + '<|end|>\n' }}"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    tokenizer = Tokenizer(json.loads(backend.to_str()), {"eos_token": "<|endoftext|>"}, {"default": template})
    referee = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    referee.chat_template = template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    expected = referee.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenizer.encode_chat(messages).ids == expected
    assert learned_turns(tokenizer, messages) == ["b<|end|>"] * 2


def test_a_text_of_all_private_use_characters_hides_control_strings_all_the_same():
    tokenizer = own()
    everything = "".join(map(chr, range(0xF0000, 0xFFFFD)))
    control = tokenizer.token(tokenizer.end_of_reply_id)
    text = f"{everything[:40]}{control}{everything[40:]}"
    ids = tokenizer.encode_prompt([{"role": "user", "content": text}])
    plain = tokenizer.encode_prompt([{"role": "user", "content": "a"}])
    controls = [one for one in plain if one in tokenizer.control_ids]
    assert [one for one in ids if one in tokenizer.control_ids] == controls
    assert text in tokenizer.decode(ids)


def test_a_text_that_leaves_no_letter_to_hide_behind_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(control, "_MEANINGLESS", (range(0xF0000, 0xF0010),))
    with pytest.raises(TriviumError, match="every private-use and unassigned character"):
        own().encode_prompt([{"role": "user", "content": "".join(map(chr, range(0xF0000, 0xF0010)))}])
