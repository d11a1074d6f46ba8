"""Files of questions: published ones in their published form, and a person's own."""

import json
from pathlib import Path

import pytest
from evaluating import asked, scripted

from trivium.kit.errors import TriviumError


def lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_published_files_are_read_in_their_published_form(monkeypatch, tmp_path: Path):
    gsm8k = lines(tmp_path / "gsm8k.jsonl", [
        {"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 4"},
        {"question": "A thousand and one?", "answer": "Add.\n#### 1,001"},
    ])  # fmt: skip
    svamp = tmp_path / "svamp.json"
    svamp.write_text(json.dumps([
        {"ID": "chal-1", "Body": "A box has 8 pears", "Question": "How many in 2?",
         "Equation": "( 8.0 * 2.0 )", "Answer": 16.0, "Type": "Multiplication"},
    ]))  # fmt: skip
    scripted(monkeypatch)
    results = asked([
        {"task": "gsm8k", "data": gsm8k, "examples": gsm8k, "shots": 1},
        {"task": "svamp", "data": str(svamp)},
    ])  # fmt: skip
    assert results.tasks["gsm8k"].measures()["accuracy"].value == 1
    assert "<<" not in results.tasks["gsm8k"].records[0].asked
    svamp_record = results.tasks["svamp"].records[0]
    assert svamp_record.id == "chal-1"
    assert svamp_record.asked.endswith("A box has 8 pears. How many in 2?")
    assert svamp_record.scores["accuracy"] == 1
    scripted(monkeypatch, lambda item: "#### 5")
    assert asked([{"task": "gsm8k", "data": gsm8k}]).tasks["gsm8k"].measures()["accuracy"].value == 0


@pytest.mark.slow
@pytest.mark.parametrize("style", ["chat", "continue"])
def test_humaneval_runs_programs_in_the_sandbox(monkeypatch, tmp_path: Path, style):
    row = {
        "task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """Add."""\n', "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    }  # fmt: skip
    data = lines(tmp_path / "humaneval.jsonl", [row, {**row, "task_id": "HumanEval/1"}])

    def say(item):
        body = item.expected if item.id.endswith("0") else "    return a - b\n"
        if style == "chat":
            return f"```python\n{item.prompt}{body}```"
        return f"{body}\ndef other():\n    raise"

    scripted(monkeypatch, say)
    result = asked([{"task": "humaneval", "data": data}], style=style).tasks["humaneval"]
    assert [one.scores["accuracy"] for one in result.records] == [1, 0]


def test_own_questions_use_the_scorer_they_name(monkeypatch, tmp_path: Path):
    data = lines(tmp_path / "mine.jsonl", [
        {"question": "Half of one?", "answer": "1/2", "kind": "easy"},
        {"messages": [{"role": "user", "content": "Half of three?"}], "answer": "1.5", "kind": "hard"},
    ])  # fmt: skip
    scripted(monkeypatch, lambda item: "The answer is 0.5")
    result = asked([{"task": "own", "data": data, "scorer": "math"}]).tasks["own"]
    assert result.by_group()["kind"]["easy"]["accuracy"].value == 1
    assert result.by_group()["kind"]["hard"]["accuracy"].value == 0
    with pytest.raises(TriviumError, match="no scorer called"):
        asked([{"task": "own", "data": data, "scorer": "maths"}])
    with pytest.raises(TriviumError, match="has no question"):
        asked([{"task": "own", "data": lines(tmp_path / "bad.jsonl", [{"text": "x"}])}])
