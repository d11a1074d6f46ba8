"""The small pieces of serving: parts of a text, names of models, the terminal chat, the process itself."""

import io
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace

import httpx
import pytest
from forked import copied
from generating import tiny_engine, tiny_model, tokenizer
from hypothesis import given
from hypothesis import strategies as some
from serving import CHAT, GOOD, ScriptedEngine, conversation, raw, running

from trivium.generate.sequence import Sequence
from trivium.kit.errors import TriviumError
from trivium.model.folder import save_model
from trivium.serve import server
from trivium.serve.answers import joined
from trivium.serve.chat import chat
from trivium.serve.engine_thread import EngineThread
from trivium.serve.measures import Measures
from trivium.serve.models import open_engine, short_names
from trivium.serve.parts import Called, PartStream, Said, Thoughts
from trivium.serve.pieces import Piece
from trivium.serve.server import bound, is_loopback, serve
from trivium.serve.voice import DIM, PLAIN, Voice, printable
from trivium.tokens.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "</b>"]}}\n</tool_call>'


def parts_of(pieces, **settings):
    stream = PartStream(**{"reasoning": True, "opened": False, "calls": "tags", **settings})
    parts = [part for piece in pieces for part in stream.feed(piece)]
    parts += stream.feed("", last=True)
    said = "".join(part.text for part in parts if isinstance(part, Said))
    thoughts = "".join(part.text for part in parts if isinstance(part, Thoughts))
    return said, thoughts, [(part.name, part.arguments) for part in parts if isinstance(part, Called)]


@given(some.lists(some.integers(1, 9), min_size=1), some.booleans())
def test_parts_do_not_depend_on_how_the_text_arrives(sizes, opened):
    text = f"why\n</think>\n\nSo {CALL}\n{CALL} and <tool_cal"
    text = text if opened else f"<think>\n{text}"
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    said, thoughts, calls = parts_of(pieces, opened=opened)
    assert calls == [("f", '{"a": [1, "</b>"]}')] * 2
    assert thoughts == "why\n"
    assert said == "So and <tool_cal"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>"),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>"),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>'),
        ("<tool_call>never closed", "<tool_call>never closed"),
        ("a < b <t", "a < b <t"),
        ("  two spaces ", "  two spaces "),
        ("", ""),
    ],
)
def test_what_is_no_call_stays_text(text, said):
    assert parts_of([text], reasoning=False) == (said, "", [])
    assert parts_of(list(text), reasoning=False) == (said, "", [])


def test_a_call_cut_off_after_its_json_still_counts():
    said, _, calls = parts_of(['<tool_call>{"name": "f", "arguments": {}}'])
    assert (said, calls) == ("", [("f", "{}")])


def test_pieces_that_arrive_together_travel_together():
    batch = [Piece(0, "a", 1), Piece(1, "x", 1), Piece(0, "b", 1), Piece(0, "", 0, (), "stop")]
    assert joined(batch) == [Piece(0, "ab", 2, (), "stop"), Piece(1, "x", 1)]


def test_measures_in_prometheus_form():
    measures = Measures()
    measures.count("trivium_requests_total", route='a"b\\c\n', status="200")
    measures.observe("trivium_first_token_seconds", 0.02, model="m")
    measures.observe("trivium_first_token_seconds", 1000, model="m")
    text = measures.text()
    assert 'trivium_requests_total{route="a\\"b\\\\c\\n",status="200"} 1\n' in text
    assert 'trivium_first_token_seconds_bucket{model="m",le="0.01"} 0\n' in text
    assert 'trivium_first_token_seconds_bucket{model="m",le="0.025"} 1\n' in text
    assert 'trivium_first_token_seconds_bucket{model="m",le="300.0"} 1\n' in text
    assert 'trivium_first_token_seconds_bucket{model="m",le="+Inf"} 2\n' in text
    assert 'trivium_first_token_seconds_sum{model="m"} 1000.02\n' in text


def test_models_get_the_shortest_names_that_tell_them_apart(tmp_path):
    assert short_names(["/"]) == {"/": "/"}
    for name in ("laptop/sft", "laptop/rl", "other/sft/model"):
        (tmp_path / name).mkdir(parents=True)
    laptop, reinforced, other = (
        str(tmp_path / name) for name in ("laptop/sft", "laptop/rl", "other/sft/model")
    )
    assert short_names([laptop, reinforced]) == {"sft": laptop, "rl": reinforced}
    assert set(short_names([laptop, other, reinforced])) == {"laptop/sft", "other/sft", "rl"}
    assert short_names([f"mine={laptop}", "owner/name"]) == {"mine": laptop, "owner/name": "owner/name"}
    with pytest.raises(TriviumError, match="two models"):
        short_names([f"a={laptop}", f"a={reinforced}"])
    with pytest.raises(TriviumError, match="no model"):
        short_names([])


def test_addresses():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.0.2", "example.org")] == [False] * 3
    taken = bound("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(TriviumError, match="choose another address or port"):
        bound("127.0.0.1", taken.getsockname()[1])
    taken.close()
    with pytest.raises(TriviumError):
        bound("127.0.0.1", 99999)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage") / "model"
    save_model(tiny_model(), folder)
    tokenizer().save(folder)
    return folder


def test_a_stages_folder_opens_like_its_model(folder):
    engine = open_engine(folder.parent, max_rows=2)
    assert engine.model.config == tiny_model().config
    assert engine.tokenizer.fingerprint == tokenizer().fingerprint


def test_terminal_chat_streams_and_remembers(tmp_path):
    one = ScriptedEngine("a baker")
    talk, out = conversation(("one", one), system="be brief")
    assert talk.hear("who?")
    assert out.getvalue() == "a baker\n"
    talk.hear("and then?")
    seen = one.tokenizer.decode(one.prompts[-1])
    assert [seen.index(word) for word in ("be brief", "who?", "a baker", "and then?")] == sorted(
        seen.index(word) for word in ("be brief", "who?", "a baker", "and then?")
    )
    path = tmp_path / "saved.json"
    talk.hear(f"/save {path}")
    [saved] = json.loads(path.read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 2]
    talk.hear("/reset")
    talk.hear("again")
    assert "who?" not in one.tokenizer.decode(one.prompts[-1])


def test_terminal_chat_commands():
    one, two = ScriptedEngine("first"), ScriptedEngine("second")
    talk, out = conversation(("one", one), opener={"two": two}.__getitem__)
    talk.hear("/temp 0.25")
    assert talk.sampling.temperature == 0.25
    for wrong in ("/temp hot", "/temp -1", "/temp nan", "/save", "/nonsense"):
        assert talk.hear(wrong)
    assert talk.sampling.temperature == 0.25
    talk.hear("/system speak plainly")
    assert talk.system == "speak plainly"
    talk.hear("/system -")
    assert talk.system is None
    talk.hear("/save no-folder-of-this-name/it.json")
    assert "there is no folder no-folder-of-this-name to save in" in out.getvalue()
    talk.hear("/compare two")
    talk.hear("/compare two")
    assert "two answers already" in out.getvalue()
    talk.hear("hello")
    assert out.getvalue().endswith("[one]\nfirst\n[two]\nsecond\n")
    talk.hear("/compare -")
    talk.hear("hello")
    assert out.getvalue().endswith("\nfirst\n")
    talk.hear("/help")
    assert all(word in out.getvalue() for word in ("/system", "/temp", "/reset", "/save", "/compare"))
    assert not talk.hear("/quit")


def test_terminal_chat_keeps_what_was_said_before_an_interruption():
    engine = tiny_engine(rows=1)
    talk, out = conversation(("one", engine))
    step, calls = engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step()

    engine.step = interrupted
    talk.hear("hello")
    assert out.getvalue().endswith(" (stopped)\n")
    assert printable(talk.speakers[0].messages[-1]["content"]) + " (stopped)\n" == out.getvalue()
    assert engine.rows_in_use == 0


@pytest.mark.parametrize("part", ["deliver", "observe"])
def test_ctrl_c_inside_the_last_step_ends_the_answer(monkeypatch, part):
    """The row had left the engine by then, so that what waited for its end waited for ever."""
    talk, out = conversation(("one", tiny_engine(rows=1)))
    real, calls = getattr(Sequence, part), []

    def interrupted(self, *what):
        calls.append(1)
        if len(calls) == (1 if part == "deliver" else 40):
            raise KeyboardInterrupt
        return real(self, *what)

    monkeypatch.setattr(Sequence, part, interrupted)
    talk.hear("hello")
    assert out.getvalue().endswith(" (stopped)\n")
    monkeypatch.undo()
    talk.hear("hello")
    assert len(talk.speakers[0].messages) == 4
    assert not out.getvalue().endswith(" (stopped)\n")


def test_an_answer_that_fails_is_told_in_a_sentence(monkeypatch):
    engine = tiny_engine(rows=1)
    talk, out = conversation(("one", engine))

    def broken(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.scheduler.sampler, "choose", broken)
    talk.hear("hello")
    assert out.getvalue().endswith("The answer failed: RuntimeError: out of luck\n")


def test_terminal_chat_leaves_out_old_turns_when_the_context_is_full():
    engine = ScriptedEngine("a smith", context=120)
    talk, out = conversation(("one", engine))
    for turn in range(12):
        talk.hear(f"turn {turn}")
    assert "earlier messages are left out" in out.getvalue()
    assert max(len(prompt) for prompt in engine.prompts) <= 80
    assert "turn 11" in engine.tokenizer.decode(engine.prompts[-1])


def test_a_model_with_a_smaller_context_is_asked_for_shorter_answers():
    one, two = ScriptedEngine("first"), ScriptedEngine("second", context=100)
    talk, out = conversation(("one", one), opener={"two": two}.__getitem__)
    talk.sampling = replace(talk.sampling, max_new_tokens=512)
    talk.hear("/compare two")
    assert "(two answers in at most 75 tokens, for its context holds 100)" in out.getvalue()
    talk.hear("hello")
    assert out.getvalue().endswith("[one]\nfirst\n[two]\nsecond\n")
    assert [engine.samplings[-1].max_new_tokens for engine in (one, two)] == [512, 75]


def test_a_model_cannot_steer_the_terminal():
    # clear the screen, a new title, a colour, eight-bit ESC, back to the line's start, a bell
    attack = "one\x1b[2J\x1b]0;title\x07 two\x9b31m\rthree\b\x7f\tfour\nfive é 🙂"
    engine = ScriptedEngine(attack)
    talk, out = conversation(("one", engine))
    talk.sampling = replace(talk.sampling, max_new_tokens=400)
    talk.hear("hello")
    shown = "one[2J]0;title two31mthree\tfour\nfive é 🙂\n"
    assert out.getvalue() == shown
    # the history is what the model said
    assert talk.speakers[0].messages[-1]["content"] == attack
    assert not [letter for letter in printable("".join(map(chr, range(0x300)))) if not is_shown(letter)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_no_part_of_a_stream_steers_the_terminal(step):
    hostile = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x90q\x9c"
    out, text = Terminal(), f"<think>{hostile}</think>{hostile}<think>{hostile}"
    voice = Voice(out, opened=False)
    for start in range(0, len(text), step):
        voice.hear(text[start : start + step])
    voice.hear("", last=True)
    shown = out.getvalue().replace(DIM, "").replace(PLAIN, "")
    assert shown.count("[2J]0;title31mq") == 3
    assert all(is_shown(letter) for letter in shown)


def test_nothing_that_is_said_of_a_model_steers_the_terminal():
    hostile = Tokenizer(
        json.loads(tokenizer().backend.to_str()), {}, {"default": "{{ raise_exception('\x1b[2Jno') }}"}
    )
    one, two = ScriptedEngine("first"), ScriptedEngine("\x1b[2Jsecond")
    one.tokenizer = hostile
    talk, out = conversation(("one", one), opener=lambda _: two)
    talk.hear("/compare t\x1bwo")
    talk.hear("hello")
    assert "refuses the conversation: [2Jno" in out.getvalue()
    assert out.getvalue().endswith("\n[two]\n[2Jsecond\n")
    assert all(is_shown(letter) for letter in out.getvalue())


def is_shown(letter):
    return letter in "\n\t" or 0x20 <= ord(letter) < 0x7F or ord(letter) >= 0xA0


def test_no_new_tokens_is_a_mistake_and_not_the_default(folder):
    with pytest.raises(TriviumError, match="max_new_tokens must be at least 1"):
        chat(str(folder), max_new_tokens=0)


@pytest.mark.slow
def test_the_process_serves_and_drains_on_sigterm(folder):
    process = copied(
        lambda: serve([f"tiny={folder}"], port=0),
        env={**os.environ, "TRIVIUM_API_KEY": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Opening tiny")
        line = process.stdout.readline()
        address = line.partition(" at ")[2].partition(" ")[0]
        with raw(address) as http:
            deadline = time.monotonic() + 30
            while True:
                try:
                    assert http.get("/health").json()["models"] == ["tiny"]
                    break
                except OSError:
                    assert time.monotonic() < deadline
            body = {
                "model": "tiny",
                "prompt": "the town",
                "max_tokens": 400,
                "stream": True,
                "temperature": 0,
            }
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert rest[-2] == "data: [DONE]"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_terminal_chat_as_a_process(folder):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = copied(lambda: chat(str(folder), seed=1, max_new_tokens=5), **pipes)
    out, complaints = process.communicate("hello\n/temp 0\n", timeout=120)
    assert process.returncode == 0, complaints
    assert out.endswith("Temperature: 0\n")
    assert len(out.splitlines()) >= 2


def test_every_model_is_computed_by_one_thread():
    """Two that compute outnumber the cores in OpenMP's count: 2,450 instead of 4,400 tokens/s on two."""
    found, thread = set(), EngineThread()

    class Noting(ScriptedEngine):
        def step(self):
            found.add(threading.get_ident())
            return super().step()

    thread.do(lambda: found.add(threading.get_ident()))
    with running({"one": Noting("a b c"), "two": Noting("d e f")}, thread=thread) as address:
        for name in ("one", "two"):
            answer = httpx.post(f"{address}{CHAT}", json={**GOOD, "model": name}, trust_env=False)
            assert answer.status_code == 200
    assert len(found) == 1
    assert threading.get_ident() not in found
    assert not thread.alive


def test_models_are_opened_on_that_thread(monkeypatch, folder):
    where = []

    def refuse(*_, **__):
        where.append(threading.current_thread().name)
        raise TriviumError("no.")

    monkeypatch.setattr(server, "open_engine", refuse)
    with pytest.raises(TriviumError, match=r"^no\.$"):
        server.serve([str(folder)], port=0)
    assert where == ["engines"]


def test_a_picture_is_refused_by_name():
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": "http://x"}},
    ]
    with running({"one": ScriptedEngine("a b")}) as address:
        body = {**GOOD, "messages": [{"role": "user", "content": parts}]}
        answer = httpx.post(f"{address}{CHAT}", json=body, trust_env=False)
    assert answer.status_code == 400
    assert "the model takes only text" in answer.json()["error"]["message"]
