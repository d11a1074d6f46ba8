"""The report of a run on a person's own data asks about that data, and not about the invented world."""

import json

import pytest

import trivium
from trivium.data.sources import read_documents
from trivium.data.split import in_validation, text_hash, unseen
from trivium.evals.asking import Subject
from trivium.evals.own import run_replies
from trivium.evals.settings import Settings
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.lab.gather import Seen
from trivium.lab.own_data import own_tasks

RECIPE = """\
name: mine
stages:
  words: {kind: tokenizer, data: ./texts, vocabulary: 300}
  base:
    kind: pretrain
    data: ./texts
    tokenizer: words
    model: {depth: 1, width: 32}
    context: 96
    batch: 1k
    steps: 2
  sft: {kind: sft, from: base, data: {./chats.jsonl: {validation: 0.2}}, steps: 1}
  dpo: {kind: preference, from: sft, data: [./pairs.jsonl], pairs: 4, steps: 1, sycophancy: 0}
  rl:
    kind: rlvr
    from: sft
    data: ./problems.jsonl
    reward: [math]
    steps: 1
    prompts_per_step: 2
    num_generations: 2
    max_new_tokens: 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 4)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(40)
    ]
    pairs = [{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(20)]
    problems = [{"prompt": f"{n}?", "answer": str(n)} for n in range(20)]
    for name, rows in (("chats", chats), ("pairs", pairs), ("problems", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


def test_models_are_asked_about_the_data_that_taught_them(folder, capsys):
    trivium.run(folder / "mine.yaml", runs=folder / "runs")
    assert "may ask differently" not in capsys.readouterr().err, "it is the recipe's own report"
    found = read_json(folder / "runs" / "mine" / "report.json")
    tasks = found["collected"]["tasks"]
    assert set(tasks) == {
        "text of texts", "replies of chats.jsonl", "pairs of pairs.jsonl", "own of problems.jsonl",
    }  # fmt: skip
    assert [one["name"] for one in found["collected"]["models"]] == ["base", "sft", "dpo", "rl"]
    replies = tasks["replies of chats.jsonl"]["models"]["sft"]["records"]
    chats = read_documents(str(folder / "chats.jsonl"))
    held_out = [one.id for one in chats if in_validation(text_hash(one), 0.2)]
    assert [one["id"] for one in replies] == held_out[:24]
    assert 0 < len(held_out) < 40
    assert len(tasks["pairs of pairs.jsonl"]["models"]["dpo"]["records"]) == 20
    assert {"base", "sft", "dpo", "rl"} <= set(found["numbers"]["behaviour"]["manner"]), "lengths, endings"
    assert "replies of chats.jsonl" in (folder / "runs" / "mine" / "report.html").read_text()
    # what has no conversation that ends with an answer is refused
    model = trivium.load(folder / "runs" / "mine" / "sft" / "model")
    (folder / "asked.jsonl").write_text('{"messages": [{"role": "user", "content": "hm?"}]}\n')
    with pytest.raises(TriviumError, match=r"asked\.jsonl"):
        run_replies(Subject(model.transformer, model.tokenizer), Settings(), str(folder / "asked.jsonl"))


def test_tasks_are_of_ones_own_files_alone(folder, tmp_path):
    stage = tmp_path / "store" / "sft-1"
    stage.mkdir(parents=True)

    def tasks(**changes):
        place = str(folder / "chats.jsonl")
        data = {"./chats.jsonl": {"validation": 0.5}, "world:chat": {}, "owner/set": {}}
        outside = {"./chats.jsonl": place, "world:chat": "world:chat", "owner/set": "owner/set"}
        record = {
            "stage": "sft", "kind": "sft", "produces": "model", "settings": {"data": data},
            "outside": outside,
            **changes,
        }  # fmt: skip
        (stage / "stage.yaml").write_text(json.dumps(record))
        return own_tasks([Seen("sft", stage)], 5)

    place = str(folder / "chats.jsonl")
    assert tasks() == [
        {"task": "replies", "name": "replies of chats.jsonl", "limit": 5, "data": place, "held_out": 0.5}
    ]
    rl = {"kind": "rlvr", "outside": {"./problems.jsonl": str(folder / "problems.jsonl")}}
    asked = {"data": "./problems.jsonl", "reward": ["rewards.py:mine"]}
    assert tasks(**rl, settings=asked) == [], "a person's function scores under no name"
    assert tasks(**rl, settings={**asked, "reward": [{"name": "math"}]})[0]["scorer"] == "math"


def test_what_was_held_out_is_asked_or_all_where_nothing_was(folder):
    chats = str(folder / "chats.jsonl")
    assert len(unseen(chats, 0.0, 1000)) == 40
    some = unseen(chats, 0.2, 1000)
    assert 0 < len(some) < 40
    assert [one.id for one in unseen(chats, 0.2, 2)] == [one.id for one in some[:2]]


def test_no_more_of_a_file_is_read_than_is_asked_about(folder, tmp_path):
    (tmp_path / "chats.jsonl").write_text((folder / "chats.jsonl").read_text() + "not a row\n")
    assert len(unseen(str(tmp_path / "chats.jsonl"), 0.2, 2)) == 2
