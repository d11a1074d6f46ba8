"""`trivium init`: templates filled in for data, and README's example on the data that it makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import trivium
from trivium.cli import main
from trivium.kit.errors import TriviumError
from trivium.pipeline.plan import planned
from trivium.pipeline.starting import WANTED, filled, templates
from trivium.recipe.schema import load

README = Path(__file__).parent.parent / "README.md"
DATA = {
    "text": "texts",
    "examples": "chats.jsonl",
    "preferences": "pairs.jsonl",
    "problems": "problems.jsonl",
}
SMALL = """\
name: small
stages:
  words: {kind: tokenizer, data: ./texts, vocabulary: 300}
  base:
    kind: pretrain
    data: ./texts
    tokenizer: words
    model: {depth: 1, width: 32}
    context: 128
    batch: 2k
    steps: 1
"""


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 20)
    chats = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        for n in range(60)
    ]
    write_rows(folder / "chats.jsonl", [{"messages": turns} for turns in chats])
    write_rows(
        folder / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(60)]
    )
    problems = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(60)]
    write_rows(folder / "problems.jsonl", problems)
    (folder / "small.yaml").write_text(SMALL)
    trivium.run(folder / "small.yaml", runs=folder / "runs")
    return folder


@pytest.mark.parametrize("template", templates())
def test_a_template_filled_in_for_data_is_planned_without_a_complaint(folder, template, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / f"{template}-mine.yaml"
    data = str(folder / DATA[WANTED[template]])
    main(["init", str(path), "--template", template, "--data", data, "--model", "small/base"])
    text = path.read_text()
    assert not re.search(r"@\w+@", text), "a place was left empty"
    recipe = load(path)
    assert recipe.name == f"{template}-mine"
    settings = [line for line in text.splitlines() if re.match(r" +\w+: \S", line) or "{" in line]
    assert text.count("#") > len(settings) / 2, "most lines say what they are for"
    found = planned(path, folder / "runs")
    assert not any("holds out none" in note for note in found.notes), found.notes
    trained = [name for name, stage in recipe.stages.items() if hasattr(stage, "learning_rate")]
    assert all("steps" in found.numbers[name] for name in trained), "how long each will really be"


def test_numbers_follow_from_the_data(folder):
    few = filled("sft", folder / "m.yaml", str(folder / "chats.jsonl"), None, "runs", None)
    assert "epochs: 3" in few
    assert "60 documents" in few
    assert re.search(r"the longest here has \d+ tokens", few)
    text = filled("pretrain", folder / "m.yaml", str(folder / "texts"), None, "runs", None)
    numbers = re.search(r"tokens: (\S+) +# about ([\d.]+) times", text)
    assert float(numbers[2]) <= 4
    share = float(re.search(r"validation: ([\d.]+)", text)[1])
    assert share > 0.01, "a hundredth of thirty documents would be none"


def test_the_wrong_data_for_a_template_is_answered(folder):
    pairs = str(folder / "pairs.jsonl")
    with pytest.raises(
        TriviumError, match="sft needs examples; such rows are learned from by: preference, reward"
    ):
        filled("sft", folder / "m.yaml", pairs, None, "runs", None)
    with pytest.raises(TriviumError, match="did you mean `rlvr`"):
        filled("rlvrr", folder / "m.yaml", pairs, None, "runs", None)
    with pytest.raises(TriviumError, match="needs data to look at: name it with --data"):
        filled("new-language", folder / "m.yaml", None, None, "runs", None)


@pytest.mark.slow
def test_the_second_example_of_the_readme_runs_word_for_word(tmp_path, monkeypatch, capsys):
    """Every command of it but those that wait for a person, on the data that its first command makes."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    recipe = re.search(r"```yaml\n(name: mine.*?)```", text, re.S)[1]
    commands = re.search(r"```\n(trivium init mine.yaml.*?)```", text, re.S)[1].splitlines()
    ran = 0
    for command in commands:
        words = command.partition("#")[0].split()[1:]
        if words[0] in ("watch", "serve", "chat"):
            continue
        main(words)
        ran += 1
        if words[0] == "init":
            assert recipe.strip() in Path("mine.yaml").read_text()
    printed = capsys.readouterr().out
    assert ran >= 6
    assert "reused" not in printed.split("trivium status")[0]
    assert Path("runs/mine/report.html").is_file()
    assert trivium.load("mine/sft").tokenizer.templates
