"""How the terminal chat asks: thoughts, worked examples, and conversations that are too long."""

import io
import json
from types import SimpleNamespace
from typing import get_args

import pytest
from serving import ScriptedEngine, conversation

from trivium.generate.chat_fit import Overflow, Reasoning, read_examples
from trivium.generate.requests import Completion
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.serve.chat import Conversation, Speaker
from trivium.serve.command import OVERFLOWS, REASONINGS


def test_terminal_chat_keeps_thoughts_apart_and_out_of_the_history(tmp_path):
    one = ScriptedEngine("<think>\nhm\n</think>\n\na baker")
    talk, out = conversation(("one", one), reasoning="ask")
    talk.hear("who?")
    assert out.getvalue() == "[thoughts] hm\n\n[answer] a baker\n"
    assert "between <think> and </think>" in one.tokenizer.decode(one.prompts[-1])
    talk.hear("and then?")
    assert "hm" not in one.tokenizer.decode(one.prompts[-1])
    talk.hear(f"/save {tmp_path / 'saved.json'}")
    [saved] = json.loads((tmp_path / "saved.json").read_text())
    assert [message["content"] for message in saved["messages"]] == [
        "who?",
        "a baker",
        "and then?",
        "a baker",
    ]


def test_terminal_chat_shows_thoughts_dim():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    one = ScriptedEngine("hm\n</think>\n\na baker")
    talk = Conversation([Speaker("one", one)], Sampling(max_new_tokens=40), reasoning="open", out=out)
    talk.hear("who?")
    assert one.tokenizer.decode(one.prompts[-1]).endswith("<think>\n")
    assert out.getvalue() == "\x1b[2mhm\n\x1b[22m\na baker\n"
    one.script = one.tokenizer.encode("never ends")
    talk.hear("and?")
    assert out.getvalue().endswith("\x1b[2mnever ends\x1b[22m (it ended within its thoughts)\n")
    one.script = one.tokenizer.encode("on and on " * 40)
    talk.hear("and?")
    assert out.getvalue().endswith("\x1b[22m (the thoughts took all of the answer's tokens)\n")
    assert talk.speakers[0].messages[-1]["content"] == ""


@pytest.mark.parametrize("overflow", ["refuse", "slide", "summarise"])
def test_terminal_chat_does_as_told_when_the_context_is_full(overflow):
    engine = ScriptedEngine("a smith", context=220)
    talk, out = conversation(("one", engine), overflow=overflow, system="be brief")
    for turn in range(12):
        talk.hear(f"turn {turn}")
    decoded = [engine.tokenizer.decode(prompt) for prompt in engine.prompts]
    first, last = engine.tokenizer.decode(engine.prompts[0]), decoded[-1]
    assert first.startswith("system\nbe brief\n")
    if overflow == "refuse":
        assert "choose overflow drop" in out.getvalue()
        assert "turn 11" not in last
    elif overflow == "slide":
        assert "tokens are forgotten" in out.getvalue()
        assert "turn 0" in last
        assert len(engine.prompts[-1]) > 180
    else:
        assert "earlier messages are summarised: a smith)" in out.getvalue()
        assert last.startswith("system\nbe brief\n")
        assert "Summary of the earlier conversation: a smith" in last
        assert "turn 0\n" not in last
        assert max(len(prompt) for prompt in engine.prompts) <= 180
        # what was summarised once is not read again, but its summary is
        asked = [one for one in decoded if "Summarise the conversation" in one]
        assert len(asked) > 1
        assert "turn 0\n" not in asked[-1]
        assert "Summary of the earlier conversation: a smith" in asked[-1]
        assert not any(one["content"].endswith("turn 0") for one in talk.speakers[0].told)
        # what was said is kept for /save
        assert len(talk.speakers[0].messages) == 24


def test_a_summary_that_is_interrupted_leaves_the_conversation_as_it_was():
    engine = ScriptedEngine("a smith", context=220)
    talk, out = conversation(("one", engine), overflow="summarise")
    while "summarised" not in out.getvalue():
        before = list(talk.speakers[0].messages)
        talk.hear("the bell rings at nine")
    talk.speakers[0].messages, talk.speakers[0].told = before, list(before)
    step, calls = engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step()

    def cancel(generation):
        generation.results[0] = Completion("", [], [], "cancelled", 0)

    engine.step, engine.cancel = interrupted, cancel
    talk.hear("the bell rings at nine")
    assert out.getvalue().endswith("The summary was stopped; nothing was asked.\n")
    assert talk.speakers[0].messages == before


def test_worked_examples_come_from_a_file_and_stay(tmp_path):
    path = tmp_path / "examples.jsonl"
    rows = [
        {"prompt": "1+1", "completion": "two"},
        {"question": "2+2", "answer": "four"},
        {"messages": [{"role": "user", "content": "3+3"}, {"role": "assistant", "content": "six"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine("seven", context=240)
    talk, _ = conversation(("one", engine), system="add", examples=read_examples(path))
    for turn in range(8):
        talk.hear(f"turn {turn}")
    for prompt in engine.prompts:
        seen = engine.tokenizer.decode(prompt)
        order = [seen.index(word) for word in ("add", "1+1", "two", "2+2", "four", "3+3", "six")]
        assert order == sorted(order)
    assert "turn 1" not in seen
    assert [one["role"] for one in talk.speakers[0].messages] == ["user", "assistant"] * 8


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, "without a question"),
        ({"prompt": "a"}, "without anything to answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "end with an assistant's"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
            "system message",
        ),
    ],
)
def test_what_is_no_worked_example_is_refused(tmp_path, row, problem):
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(TriviumError, match=problem):
        read_examples(path)


def test_a_model_without_a_template_refuses_ways_of_asking():
    one = ScriptedEngine("a baker")
    one.tokenizer = SimpleNamespace(templates={}, beginning_id=None)
    for settings in ({"overflow": "slide"}, {"reasoning": "ask"}, {"examples": [{}]}, {"system": "be brief"}):
        with pytest.raises(TriviumError, match="no chat template"):
            conversation(("one", one), **settings)
    talk, out = conversation(("one", one))
    talk.hear("/system be brief")
    assert out.getvalue() == "one has no chat template, so it cannot take a system message.\n"
    assert talk.system is None
    talk, out = conversation(("two", ScriptedEngine("a smith")), system="be brief", opener=lambda _: one)
    talk.hear("/compare one")
    assert "one has no chat template, so it only continues the last line" in out.getvalue()
    assert len(talk.speakers) == 1


def test_the_words_of_the_command_line_are_those_of_the_code():
    assert get_args(Overflow) == OVERFLOWS
    assert get_args(Reasoning) == REASONINGS
