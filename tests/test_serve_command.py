"""The words of `trivium serve` and `trivium chat`: every setting of Python can be said, and arrives."""

import inspect
import io
import os
import sys
from dataclasses import asdict

import click
import fake_vllm
import pytest
from click.testing import CliRunner
from generating import tiny_model, tokenizer

import trivium
from trivium.cli import main
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.model.folder import save_model
from trivium.serve import chat, command, server
from trivium.serve.limits import Limits
from trivium.serve.models import open_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage") / "model"
    save_model(tiny_model(), folder)
    tokenizer().save(folder)
    return str(folder)


def other(option):
    """A value an option does not have unless it is said."""
    default = option.default if isinstance(option.default, int | float) else 2
    if isinstance(option.type, click.Choice):
        return next(choice for choice in option.type.choices if choice != option.default)
    if "integer" in option.type.name:
        return default + 1
    return default / 2 + 0.125 if option.type.name == "float" else f"some {option.name}"


def said(verb):
    """Every option of a verb with a value that is not its default, as words, and those values by name."""
    words, values = [], {}
    for option in verb.params:
        # `engine` says which server the others go to.
        if isinstance(option, click.Option) and option.name != "engine":
            value = True if option.is_flag else other(option)
            words += [option.opts[0]] if option.is_flag else [option.opts[0], str(value)]
            values[option.name] = (value,) if option.multiple else value
    return words, values


def hearing(monkeypatch, verb, module, words):
    """What the verb's call is given when these words are said, and what it takes by name."""
    taken, heard = inspect.signature(getattr(module, verb.name)).parameters.values(), {}
    monkeypatch.setattr(module, verb.name, lambda *given, **settings: heard.update(settings))
    result = CliRunner().invoke(verb, ["some model", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return heard, {one.name: one.default for one in taken if one.kind == one.KEYWORD_ONLY}


VERBS = [(command.serve, server), (command.chat, chat)]


@pytest.mark.parametrize(("verb", "module"), VERBS)
def test_every_setting_can_be_said_and_arrives(verb, module, monkeypatch):
    words, values = said(verb)
    heard, taken = hearing(monkeypatch, verb, module, words)
    assert set(heard) == set(taken)
    if verb is command.serve:
        heard |= asdict(heard.pop("limits"))
        heard["cache_mib"] = heard.pop("memory_budget") // 2**20
    assert heard == values


@pytest.mark.parametrize(("verb", "module"), VERBS)
def test_what_is_not_said_is_what_python_takes(verb, module, monkeypatch):
    heard, taken = hearing(monkeypatch, verb, module, [])
    assert heard == taken | ({"limits": Limits()} if verb is command.serve else {})


def test_help_has_headings():
    told = CliRunner().invoke(command.serve, ["--help"]).output
    places = [told.index(words) for words in ("Options:", command.MACHINE, command.BOUNDS)]
    assert places == sorted(places)
    assert told.index("--device") < told.index(command.BOUNDS) < told.index("--queued")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["serve", "{folder}", "--samples", "0"], "the limit samples is 0; give a number that is at least 1"),
        (["serve", "{folder}", "--queued", "-1"], "at least 0"),
        (["serve", "{folder}", "--request-seconds", "nan"], "the limit request_seconds is nan"),
        (["serve", "{folder}", "--port", "0", "--device", "moon"], "the device 'moon' cannot be used here"),
        (["serve", "{folder}", "--port", "0", "--cache-mib", "0"], "0 is not in the range"),
        (["serve", "{folder}", "--port", "0", "--max-rows", "0"], "0 is not in the range"),
        (["chat", "{folder}", "--min-p", "2"], "min_p must be between 0 and 1"),
        (["chat", "{folder}", "--device", "cuda:77"], "the device 'cuda:77' cannot be used here"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(folder, capsys, words, problem):
    with pytest.raises(SystemExit) as stopped:
        main([word.format(folder=folder) for word in words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "Traceback" not in error


@pytest.mark.parametrize("device", ["moon", "cuda:77", "meta"])
def test_a_device_that_cannot_be_is_one_sentence_in_python(folder, device):
    with pytest.raises(TriviumError, match=rf"^the device '{device}' cannot be used here: .*; try cpu\.$"):
        trivium.load(folder, device=device)


def test_a_wrong_dtype_is_one_sentence_in_python(folder):
    with pytest.raises(TriviumError, match=r"^dtype 'bf16' is none of torch's"):
        trivium.load(folder, dtype="bf16")


def test_a_stage_without_a_model_is_named_as_one(tmp_path):
    (tmp_path / "stage.yaml").write_text("kind: tokenizer")
    with pytest.raises(TriviumError, match="is a tokenizer stage, which makes no model"):
        open_engine(tmp_path)


def test_steps_are_compiled_on_a_gpu_only(folder):
    with pytest.raises(TriviumError, match="this model is on cpu: leave `--compile` out"):
        open_engine(folder, device="cpu", compiled=True)


def test_a_model_is_opened_within_its_budget(folder):
    engine = open_engine(folder, memory_budget=100_000)
    with pytest.raises(TriviumError, match="the memory budget of 0 MiB holds"):
        engine.submit(Request([1], Sampling(max_new_tokens=500)))
    engine.submit(Request([1], Sampling(max_new_tokens=50)))


def test_the_terminal_chat_draws_as_it_was_told(folder, capsys, monkeypatch):
    def answers(*words):
        monkeypatch.setattr("sys.stdin", io.StringIO("the town of\n"))
        main(["chat", folder, "--seed", "3", "--max-new-tokens", "12", "--device", "cpu", *words])
        return capsys.readouterr().out

    greedy, free = answers("--temperature", "0"), answers("--temperature", "2")
    assert free != greedy
    assert answers("--temperature", "2", "--top-k", "1") == greedy
    assert answers("--temperature", "2", "--min-p", "1") == greedy
    assert answers("--temperature", "0", "--repetition-penalty", "9") != greedy
    assert answers("--temperature", "0", "--frequency-penalty", "9") != greedy
    assert answers("--temperature", "0", "--presence-penalty", "9") != greedy
    assert answers("--temperature", "2", "--typical-p", "0.01") != free


def test_a_model_is_handed_to_the_server_of_vllm(folder, monkeypatch):
    """Its words are what the parser of vLLM 0.32.0 took; the key is not among them."""
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    became = []
    monkeypatch.setattr(os, "execve", lambda *words: became.append(words))
    words = [
        f"mine={folder}",
        "--engine",
        "vllm",
        "--port",
        "9",
        "--api-key",
        "k",
        "--allow-origin",
        "http://a",
    ]
    assert CliRunner().invoke(command.serve, words, catch_exceptions=False).exit_code == 0
    [(program, command_line, environment)] = became
    assert program == sys.executable
    assert command_line[1:] == [
        "-m", "vllm.entrypoints.cli.main", "serve", folder, "--served-model-name", "mine",
        "--host", "127.0.0.1", "--port", "9", "--allowed-origins", '["http://a"]',
    ]  # fmt: skip
    assert environment["VLLM_API_KEY"] == "k"
    for more, refused in (
        (["--max-rows", "4"], "--max-rows is an option of our engine"),
        (["--keep-prompts", "4"], "--keep-prompts is an option of our engine"),
        (["--compile"], "--compile is an option of our engine"),
        ([f"other={folder}"], "serves one model a process"),
    ):
        with pytest.raises(TriviumError, match=refused):
            CliRunner().invoke(command.serve, [*words, *more], catch_exceptions=False)
    assert len(became) == 1
