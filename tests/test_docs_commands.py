"""What people do with results: every command of the pages in docs/, and a bundle that makes them again.

They are those of `pocket`, where a page speaks of `laptop`.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import trivium
from trivium.cli import cli, main
from trivium.kit.files import read_json
from trivium.pipeline.bundle import verify, write_bundle

DOCS = Path(__file__).parent.parent / "docs"
WAITS = {"serve", "watch"}
"""What goes on until a person stops it; its words are parsed and nothing is started."""
TAKES_LONG = (
    "run laptop",
    "run experiments/",
    "launch",
    "pretrain",
    "sft",
    "dpo",
    "rlvr",
    "distill",
    "init",
    "doctor",
)
"""What other tests run; here its words are parsed."""


def commands() -> list[str]:
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for language, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            if language in ("", "bash", "sh"):
                lines = block.replace("\\\n", " ").splitlines()
                found += [
                    f"{page.name}: {line.strip()}" for line in lines if line.strip().startswith("trivium ")
                ]
    return list(dict.fromkeys(found))


def status_of(words: list[str]) -> int:
    try:
        main(words)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def words_of(command: str) -> list[str]:
    words = shlex.split(command.partition(": ")[2], comments=True)[1:]
    meant = {"laptop/": "pocket/", "mine/": "pocket/", "Qwen/Qwen3-0.6B": "pocket/rl"}
    for name, there in meant.items():
        words = [word.replace(name, there) for word in words]
    return words


def test_the_pages_have_commands_and_each_is_a_verb_with_known_options():
    found = commands()
    assert len(found) >= 20
    for command in found:
        verb, *words = words_of(command)
        assert verb in cli.commands, command
        known = {name for option in cli.commands[verb].params for name in option.opts}
        if verb not in ("grade", "pretrain", "midtrain", "sft", "dpo", "reward", "rlvr", "ppo", "distill"):
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, command


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of the recipe `pocket`."""
    runs = tmp_path_factory.mktemp("pocket") / "runs"
    trivium.run("pocket", runs=runs)
    return runs


@pytest.mark.slow
def test_pocket_is_made_again_from_its_bundle(pocket, tmp_path):
    bundle = tmp_path / "bundle"
    assert {"rl", "sft", "long", "mid", "base", "corpus", "words"} <= set(
        write_bundle(pocket, "pocket/rl", bundle)
    )
    rows = verify(bundle, tmp_path / "fresh")
    assert {(row[1], row[2]) for row in rows[1:]} == {("ran", "equal")}, rows


@pytest.mark.slow
def test_every_command_of_the_pages_runs_and_its_numbers_are_the_reports(
    pocket, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(pocket)
    (tmp_path / "mine").symlink_to((pocket / "pocket" / "sft").resolve() / "model")
    (tmp_path / "my.txt").write_text("The town of\n")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "2 + 3 =", "completion": " 5"}\n' * 3)
    asked: set[str] = set()
    for command in commands():
        verb, *words = words_of(command)
        whole = " ".join([verb, *words])
        if verb in WAITS or whole.startswith(TAKES_LONG) or re.search(r"\b[A-Z]{4,}\b|\.yaml|RECIPE", whole):
            continue
        if any(word.endswith((".gguf", ".md")) or word.startswith("/") for word in words):
            continue
        if "peft" in words:  # none of pocket's stages has an adapter
            continue
        if verb == "chat":
            monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2 + 3?\n"))
        if verb == "distance" and "--count" not in words and "--prompts" not in words:
            words += ["--count", "2"]
        if verb == "compare" and "--on" in words:
            words[words.index("--limit") + 1] = "2"
        assert status_of([verb, *words]) == 0, f"{command}: {capsys.readouterr().err}"
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        asked.add(verb)
    assert {"compare", "eval", "distance", "chat"} <= asked
    main(["compare", "base", "sft", "rl"])
    skills = read_json(tmp_path / "runs" / "pocket" / "report.json")["numbers"]["skills"]
    reported = {(row["task"], row["metric"]): row["cells"] for row in skills}
    for row in json.loads((tmp_path / "runs" / "compare.json").read_text())["numbers"]["skills"]:
        for name, cell in row["cells"].items():
            before = reported[row["task"], row["metric"]].get(name)
            assert (cell and cell["value"]) == (before and before["value"]), (row["task"], name)
