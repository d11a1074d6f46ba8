"""What the documentation says of commands and of the server is what there is."""

import re
import shlex
import typing
from pathlib import Path

import click
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from serving import ScriptedEngine, raw, running

from trivium.cli import cli
from trivium.serve import chat, command, fitting
from trivium.serve.measures import HELP
from trivium.serve.protocol import ChatBody, CompletionBody, EmbeddingBody

DOCS = Path(__file__).parent.parent / "docs"
SERVING = (DOCS / "serving.md").read_text(encoding="utf-8")
COMMANDS = [
    pytest.param(line.partition(" #")[0].partition(";")[0], id=f"{page.name}-{line[:60]}")
    for page in [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]
    for block in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if line.startswith("trivium ")
]


def section(name):
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", SERVING, re.M | re.S)[1]


def first_cells(name):
    """What stands in backticks in the first column of a section's table."""
    cells = re.findall(r"^\| (`.*?) \|", section(name), re.M)
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_in_the_documentation_can_be_said(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # `verify` takes a folder that is there.
    (tmp_path / "BUNDLE").mkdir()
    _, verb, *words = shlex.split(line)
    said = cli.commands[verb]
    if "ignore_unknown_options" not in said.context_settings:
        said.make_context(verb, words)


def test_the_example_in_python_runs():
    [example] = re.findall(r"```python\n(.*?)```", SERVING, re.S)
    engine = ScriptedEngine("in the tower")
    with running({"sft": engine}) as address:
        exec(example.replace("http://127.0.0.1:8000", address), told := {})
    assert told["answer"].choices[0].message.content == "in the tower"
    assert engine.samplings[-1].min_p == 0.05


def test_the_routes_are_those_there_are():
    with running({"one": ScriptedEngine("word")}) as address, raw(address) as http:
        for route in first_cells("Routes"):
            method, path = route.split()
            # a body without a word is refused by a route that is there
            assert http.request(method, path).status_code == (400 if method == "POST" else 200), route
    assert len(first_cells("Routes")) == 7


def test_every_field_beyond_openais_is_told():
    known = set()
    for module, name in (
        (chat_create_params, "CompletionCreateParamsBase"),
        (completion_create_params, "CompletionCreateParamsBase"),
        (embedding_create_params, "EmbeddingCreateParams"),
    ):
        known |= set(typing.get_type_hints(getattr(module, name), vars(module)))
    ours = {name for body in (ChatBody, CompletionBody, EmbeddingBody) for name in body.model_fields}
    assert set(first_cells("Fields beyond OpenAI's")) == ours - known - {"stream"}


def test_headers_measures_commands_and_flags_are_those_there_are():
    for header in (fitting.LEFT_OUT, fitting.SUMMARISED, fitting.FORGOTTEN):
        assert f"`{header}`" in SERVING
    assert sorted(first_cells("Measures")) == sorted(HELP)
    commands = {word.split()[0] for word in first_cells("In the terminal")}
    assert commands == set(re.findall(r"^/\w+", chat.HELP, re.M))
    flags = {
        name
        for verb in cli.commands.values()
        for one in verb.params
        if isinstance(one, click.Option)
        for name in one.opts
    }
    assert set(re.findall(r"(?<=[` ])--[a-z-]+", SERVING)) - {"--help"} <= flags
    assert command.BOUNDS in SERVING
