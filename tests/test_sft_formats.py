"""Data as people have it: every shape recognised, every bad row named, every token counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuning import CHAT, encoded, learned_text, one, tokenizer_of, write_rows

from trivium.data.conversations import Encoder
from trivium.data.encoding import Encoded, Refused
from trivium.data.packed import PackedRows
from trivium.data.shapes import example_of, recognised
from trivium.data.shards import Shards, write_encoded
from trivium.data.sources import Source, read_documents
from trivium.kit.errors import TriviumError

ASKED, SAID = {"role": "user", "content": "12?"}, {"role": "assistant", "content": "12 sacks"}
CALL = {"type": "function", "function": {"name": "count", "arguments": {"of": "sacks"}}}

SHAPES = {
    "messages": ({"messages": [ASKED, SAID]}, "conversations (messages)"),
    "messages as JSON text": ({"messages": json.dumps([ASKED, SAID])}, "conversations (messages)"),
    "conversational prompt-completion": ({"prompt": [ASKED], "completion": [SAID]}, "prompt-completion"),
    "messages answered by a text": (
        {"prompt": [ASKED], "answer": "12 sacks"},
        "prompt-completion, conversational (prompt and answer)",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "12?"}, {"from": "gpt", "value": "12 sacks"}]},
        "ShareGPT (conversations)",
    ),
    "Alpaca": (
        {"instruction": "12?", "input": "", "output": "12 sacks"},
        "Alpaca (instruction, input, output)",
    ),
    "question and answer": (
        {"question": "12?", "answer": "12 sacks"},
        "prompt-completion, conversational (question and answer)",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_of_every_shape_become_the_same_tokens(name):
    row, expected = SHAPES[name]
    tokenizer = tokenizer_of("own")
    assert recognised(row).name == expected
    reference = one({"messages": [ASKED, SAID]}, tokenizer)
    found = one(row, tokenizer)
    assert found.tokens.tolist() == reference.tokens.tolist()
    assert found.learned.tolist() == reference.learned.tolist()
    assert learned_text(found, tokenizer) == "12 sacks<|im_end|>"


def test_plain_text_is_learned_whole_and_ended():
    tokenizer = tokenizer_of("own")
    found = one({"text": "the river"}, tokenizer)
    assert found.learned is None
    assert learned_text(found, tokenizer) == "the river<|im_end|>"
    assert recognised({"text": "the river"}).name == "plain text"


def test_only_the_completion_is_learned():
    tokenizer = tokenizer_of("own")
    found = one({"prompt": "the river", "completion": " rises"}, tokenizer)
    assert learned_text(found, tokenizer) == " rises<|im_end|>"
    whole = one({"prompt": "the river", "completion": " rises"}, tokenizer, learned="all")
    assert learned_text(whole, tokenizer) == "the river rises<|im_end|>"


def test_alpaca_with_system_history_and_input():
    row = {
        "system": "You count.", "history": [["the river", "rises"]], "instruction": "count", "input": "12",
        "output": "12 sacks",
    }  # fmt: skip
    messages = example_of(recognised(row), row).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "count\n12"


def test_sharegpt_with_calls_of_functions_and_a_system_column():
    row = {
        "system": "You count.",
        "tools": json.dumps([{"type": "function", "function": {"name": "count"}}]),
        "conversations": [
            {"from": "human", "value": "12?"},
            {"from": "function_call", "value": json.dumps({"name": "count", "arguments": {"of": "sacks"}})},
            {"from": "observation", "value": "12"},
            {"from": "gpt", "value": "12 sacks"},
        ],
    }
    example = example_of(recognised(row), row)
    assert [message["role"] for message in example.messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert example.messages[2]["tool_calls"] == [CALL]
    assert example.tools[0]["function"]["name"] == "count"
    tokenizer = tokenizer_of("own")
    text = learned_text(one(row, tokenizer), tokenizer)
    called = '<tool_call>\n{"name": "count", "arguments": {"of": "sacks"}}\n</tool_call>'
    assert text == called + "<|im_end|>12 sacks<|im_end|>"


def test_tables_leave_unused_columns_empty():
    row = {
        "messages": [{**ASKED, "tool_calls": None, "name": None}, {**SAID, "tool_calls": None}],
        "tools": None,
    }
    tokenizer = tokenizer_of("own")
    reference = one({"messages": [ASKED, SAID]}, tokenizer)
    assert one(row, tokenizer).tokens.tolist() == reference.tokens.tolist()


def test_arguments_of_the_template_are_passed_on():
    tokenizer = tokenizer_of("qwen3")
    plain = one({"messages": [ASKED, SAID]}, tokenizer)
    row = {"messages": [ASKED, SAID], "chat_template_kwargs": json.dumps({"enable_thinking": False})}
    assert one(row, tokenizer).tokens.tolist() == plain.tokens.tolist()
    bad = one({**row, "chat_template_kwargs": "[1]"}, tokenizer)
    assert isinstance(bad, Refused)
    assert "chat_template_kwargs" in bad.why


BAD = {
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    "prompts alone": ({"prompt": "a"}, "completion"),
    "unknown": ({"sentence": "a"}, "columns"),
    "no message": ({"messages": []}, "no message"),
    "no role": ({"messages": [{"content": "a"}]}, "`role`"),
    "not an object": ({"messages": ["a"]}, "not an object"),
    "content is a number": ({"messages": [ASKED, {"role": "assistant", "content": 3}]}, "content is int"),
    "says nothing": ({"messages": [ASKED, {"role": "assistant"}]}, "says nothing"),
    "not JSON": ({"messages": "hello"}, "not JSON"),
    "completion is a number": ({"prompt": "a", "completion": 3}, "not text"),
    "unknown speaker": ({"conversations": [{"from": "ghost", "value": "boo"}]}, "'ghost'"),
    "negative weight": ({"text": "a", "weight": -1}, "`weight`"),
    "weight no number": ({"text": "a", "weight": "much"}, "`weight`"),
    "history": ({"instruction": "a", "output": "b", "history": [["a"]]}, "`history`"),
    "tools": ({"messages": [ASKED, SAID], "tools": "no JSON"}, "`tools`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_says_what_is_wrong(name):
    row, why = BAD[name]
    found = one(row, tokenizer_of("own"))
    assert isinstance(found, Refused)
    assert why in found.why


def test_a_bad_row_is_named_with_file_and_line(tmp_path):
    tokenizer = tokenizer_of("own")
    path = write_rows(
        tmp_path / "chats.jsonl", [{"question": "a", "answer": "b"}, {"question": "a"}, "{oops"]
    )
    encoder = Encoder(tokenizer, 64)
    with pytest.raises(TriviumError, match=r"chats.jsonl:2 has no 'answer'"):
        write_encoded(encoder.encode(read_documents(str(path))), tokenizer, tmp_path / "out")
    documents = read_documents(str(path))
    found = Encoder(tokenizer, 64).encode(documents)
    with pytest.raises(TriviumError, match=r"chats.jsonl:3: is not JSON"):
        write_encoded(found, tokenizer, tmp_path / "out", skip_refused=True)
    source = Source(path=str(path), on_bad="skip")
    encoder = Encoder(tokenizer, 64)
    manifest = write_encoded(
        encoder.encode(read_documents(source)), tokenizer, tmp_path / "out", skip_refused=True
    )
    assert manifest["read"]["refused"] == encoder.tally.unfit == 1
    assert encoder.tally.kept == 1
    assert "chats.jsonl:2" in manifest["read"]["named"][0]


def test_columns_are_mapped(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"frage": "12?", "antwort": "12 sacks"}])
    source = Source(path=str(path), columns={"question": "frage", "answer": "antwort"})
    tokenizer = tokenizer_of("own")
    (found,) = Encoder(tokenizer, 64).encode(read_documents(source))
    assert learned_text(found, tokenizer) == "12 sacks<|im_end|>"


def test_which_turns_are_learned():
    tokenizer = tokenizer_of("own")
    both = "in the hills<|im_end|>counts 12 sacks<|im_end|>"
    assert learned_text(one({"messages": CHAT}, tokenizer), tokenizer) == both
    assert learned_text(one({"messages": CHAT}, tokenizer, learned="last"), tokenizer) == both[22:]
    assert one({"messages": CHAT}, tokenizer, learned="all").learned is None
    quiet = [*CHAT[:2], {**CHAT[2], "train": False}, *CHAT[3:]]
    assert learned_text(one({"messages": quiet}, tokenizer), tokenizer) == both[22:]
    weighed = [*CHAT[:4], {**CHAT[4], "weight": 0}]
    assert learned_text(one({"messages": weighed}, tokenizer), tokenizer) == both[:22]
    given = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert learned_text(one(given, tokenizer), tokenizer) == both[22:]


LONG = [
    {"role": "system", "content": "You count."},
    *[
        message
        for turn in range(6)
        for message in (
            {"role": "user", "content": f"count {turn} sacks"},
            {"role": "assistant", "content": f"{turn} and {turn} and {turn}"},
        )
    ],
]


def test_a_conversation_too_long_is_cut_at_the_border_of_a_turn():
    tokenizer = tokenizer_of("own")
    whole = one({"messages": LONG}, tokenizer, context=1000)
    context = len(whole.tokens) - 5
    (cut,), encoder = encoded([{"messages": LONG}], tokenizer, context=context)
    assert cut.tokens.tolist() == one({"messages": LONG[:-2]}, tokenizer, context=1000).tokens.tolist()
    tally = encoder.tally
    assert (tally.kept, tally.cut, tally.dropped) == (1, 1, 0)
    assert tally.tokens_cut == len(whole.tokens) - len(cut.tokens) > 0
    assert "rows.jsonl:1 was cut" in tally.named[0]


@pytest.mark.parametrize(("row", "options"), [
    ({"messages": LONG}, {"learned": "last"}),
    ({"prompt": LONG[:-1], "completion": LONG[-1:]}, {}),
])  # fmt: skip
def test_where_only_the_end_is_learned_the_oldest_turns_go(row, options):
    tokenizer = tokenizer_of("own")
    whole = one(row, tokenizer, context=1000, **options)
    cut = one(row, tokenizer, context=len(whole.tokens) - 5, **options)
    text = tokenizer.decode(cut.tokens.tolist(), skip_control=False)
    assert "You count." in text
    assert "count 0 sacks" not in text
    assert "count 1 sacks" in text
    assert learned_text(cut, tokenizer) == learned_text(whole, tokenizer) == "5 and 5 and 5<|im_end|>"


@pytest.mark.parametrize(("row", "shorter", "options"), [
    ({"messages": LONG}, LONG[:-2], {}),
    ({"messages": LONG}, [LONG[0], *LONG[3:]], {"learned": "last"}),
])  # fmt: skip
def test_a_conversation_that_fits_exactly_is_not_cut_further(row, shorter, options):
    """At a context of as many tokens as the shorter conversation has, and not at one less."""
    tokenizer = tokenizer_of("own")
    expected = one({"messages": shorter}, tokenizer, context=1000, **options)
    assert len(expected.tokens) < len(one(row, tokenizer, context=1000, **options).tokens)
    exactly = one(row, tokenizer, context=len(expected.tokens), **options)
    assert exactly.tokens.tolist() == expected.tokens.tolist()
    assert exactly.learned.tolist() == expected.learned.tolist()
    less = one(row, tokenizer, context=len(expected.tokens) - 1, **options)
    assert len(less.tokens) < len(expected.tokens)
    whole = one({"messages": CHAT}, tokenizer)
    assert (
        one({"messages": CHAT}, tokenizer, context=len(whole.tokens)).tokens.tolist() == whole.tokens.tolist()
    )


@given(st.integers(8, 300), st.sampled_from(["assistant", "last"]))
@settings(max_examples=60, deadline=None)
def test_whatever_the_context_no_example_is_too_long_and_none_teaches_nothing(context, learned):
    tokenizer = tokenizer_of("own")
    rows = [{"messages": LONG}, {"messages": CHAT}, {"messages": LONG[1:5]}]
    found, encoder = encoded(rows, tokenizer, context=context, learned=learned)
    for example in found:
        assert isinstance(example, Encoded)
        assert len(example.tokens) <= context
        assert example.learned[1:].sum() > 0
        assert example.tokens[example.learned][-1] == tokenizer.end_of_turn_id
    tally = encoder.tally
    assert tally.kept + tally.dropped == tally.rows == 3
    assert tally.tokens_in == tally.tokens_kept + tally.tokens_cut + tally.tokens_dropped
    assert tally.tokens_kept == sum(len(example.tokens) for example in found)
    assert tally.tokens_learned == sum(int(example.learned[1:].sum()) for example in found)


def test_rows_that_teach_nothing_are_dropped_and_named():
    tokenizer = tokenizer_of("own")
    rows = [
        {"messages": [ASKED, SAID]},
        {"messages": [ASKED]},
        {"messages": [ASKED, {**SAID, "content": "the river " * 60}]},
        {"messages": [ASKED, SAID], "weight": 0},
    ]
    found, encoder = encoded(rows, tokenizer, context=64)
    assert len(found) == 1
    assert (encoder.tally.kept, encoder.tally.dropped) == (1, 3)
    assert [line.split(" ")[0] for line in encoder.tally.named] == [f"rows.jsonl:{n}" for n in (2, 3, 4)]
    assert "no whole answer fits" in encoder.tally.named[1]


def test_a_weight_per_sample_weighs_its_tokens(tmp_path):
    tokenizer = tokenizer_of("own")
    rows = [{"messages": [ASKED, SAID], "weight": 0.25}, {"messages": CHAT}]
    found, _ = encoded(rows, tokenizer)
    write_encoded(iter(found), tokenizer, tmp_path / "shards", columns=("weight",))
    packed = PackedRows(Shards(tmp_path / "shards"), 128)
    row = packed.row(0)
    place = row.ids.index("rows.jsonl:1")
    start = sum(row.lengths[:place])
    weights = row.weights[start : start + row.lengths[place]]
    assert set(weights.tolist()) == {0.0, 0.25}
    others = [*row.weights[:start], *row.weights[start + row.lengths[place] :]]
    assert set(others) == {0.0, 1.0}


def test_learned_tokens_of_shards_are_those_of_their_packed_rows(tmp_path):
    tokenizer = tokenizer_of("own")
    rows = [{"messages": CHAT}, {"messages": [ASKED, SAID]}, {"messages": LONG}] * 7
    found, encoder = encoded(rows, tokenizer, context=120)
    write_encoded(iter(found), tokenizer, tmp_path / "shards", columns=("weight",), tokens_per_shard=300)
    shards = Shards(tmp_path / "shards")
    packed = PackedRows(shards, 120)
    learned = [int((packed.row(index).weights > 0).sum()) for index in range(len(packed))]
    assert min(learned) > 0
    assert sum(learned) == shards.learned_tokens == encoder.tally.tokens_learned
    assert packed.packing.tokens == encoder.tally.tokens_kept
