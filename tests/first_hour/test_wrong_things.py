"""Wrong things typed: `trivium plan` finds each and answers in one sentence with place and fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tuning import own, save, small_model

from trivium.cli import main

RECIPE = """\
name: mine
stages:
  words: {kind: tokenizer, data: ./texts, vocabulary: 300}
  base:
    kind: pretrain
    data: ./texts
    tokenizer: words
    model: {depth: 1, width: 32}
    context: 64
    batch: 512
    steps: 4
  sft: {kind: sft, from: base, data: ./chats.jsonl}
  dpo: {kind: preference, from: sft, data: ./pairs.jsonl}
  rl: {kind: rlvr, from: sft, data: ./problems.jsonl, reward: [math], steps: 2, max_new_tokens: 16}
"""
WRONG = {
    "an unknown key": (
        "    steps: 4",
        "    stepps: 4",
        "mine.yaml:11: stages.base.stepps",
        "did you mean `steps`",
    ),
    "a key of another tool": ("    steps: 4", "    max_steps: 4", "stages.base.max_steps", "write `steps`"),
    "an unknown kind": ("kind: sft", "kind: sftt", "mine.yaml:12: stages.sft", "did you mean `sft`"),
    "a value that cannot be": ("batch: 512", "batch: many", "stages.base.batch cannot be 'many'", "should"),
    "a missing file": (
        "./chats.jsonl",
        "./chat.jsonl",
        "stages.sft.data: `./chat.jsonl`",
        "nor a path that exists; did you mean `./chats.jsonl`?",
    ),
    "a kind of another tool": (
        "kind: preference",
        "kind: dpo",
        "mine.yaml:13: stages.dpo",
        "write `preference`",
    ),
    "pairs where chats are wanted": (
        "./chats.jsonl",
        "./pairs.jsonl",
        "stages.sft.data",
        "a `preference` stage",
    ),
    "chats where pairs are wanted": (
        "./pairs.jsonl",
        "./chats.jsonl",
        "stages.dpo.data",
        "name yours with `columns`",
    ),
    "problems without an answer": (
        "./problems.jsonl",
        "./asked.jsonl",
        "stages.rl.reward",
        "needs one of the columns",
    ),
    "a reward that is not there": ("[math]", "[mine.py:score]", "stages.rl.reward", "nor a path that exists"),
    "an absurd size": ("depth: 1, width: 32", "depth: 90000", "TiB of memory to train", "lower `depth`"),
    "a parent that is not there": (
        "from: base",
        "from: bass",
        "stages.sft.from: `bass`",
        "did you mean `base`",
    ),
    "an extra that is missing": (
        "./texts, vocabulary",
        "owner/texts, vocabulary",
        "stages.words",
        "pip install 'trivium[hub]'",
    ),
    "two lengths": (
        "    steps: 4",
        "    steps: 4\n    tokens: 1k",
        "mine.yaml:4: stages.base",
        "one of `tokens` and `steps`",
    ),
    "a vocabulary without room for bytes": (
        "vocabulary: 300",
        "vocabulary: 10",
        "mine.yaml:3: stages.words.vocabulary cannot be 10",
        "greater than or equal to 264",
    ),
    "a tab": ("    steps: 4", "\tsteps: 4", "mine.yaml:11 is not valid YAML", "indent with spaces"),
    "conversations without an answer": (
        "./chats.jsonl",
        "./users.jsonl",
        "mine.yaml:12: stages.sft.data../users.jsonl: none of the first 40 rows",
        "users.jsonl:1 teaches nothing",
    ),
    "pairs of the same answer": (
        "./pairs.jsonl",
        "./alike.jsonl",
        "mine.yaml:13: stages.dpo.data../alike.jsonl: both answers",
        "name pairs that differ",
    ),
    "a reward that takes other arguments": (
        "[math]",
        "['rewards.py:gold']",
        "mine.yaml:14: stages.rl.reward: ./problems.jsonl: the reward gold cannot be called",
        "missing a required argument: 'gold'",
    ),
    "a function that the file lacks": (
        "[math]",
        "['rewards.py:golds']",
        "mine.yaml:14: stages.rl.reward: The reward file",
        "did you mean `gold`",
    ),
    "a scorer's name": ("[math]", "[maths]", "mine.yaml:14: stages.rl.reward", "did you mean `math`"),
    "answers that are compared with none": (
        "steps: 2, max",
        "num_generations: 1, steps: 2, max",
        "mine.yaml:14: stages.rl: dapo compares",
        "write 2 or more",
    ),
    "a layer that is not there": (
        "from: base,",
        "from: base, adapter: {targets: [q_projj]},",
        "sft: adapter.targets: 'q_projj' names no layer",
        "there are",
    ),
    "a loss that is not there": (
        "from: sft, data: ./pairs",
        "from: sft, loss: dpoo, data: ./pairs",
        "mine.yaml:13: stages.dpo",
        "write one of dpo",
    ),
    "a share that changes nothing": (
        "data: ./problems.jsonl",
        "data: {./problems.jsonl: {validation: 0.1}}",
        "mine.yaml:14: stages.rl.data: `./problems.jsonl` has a `validation`",
        "leave it out",
    ),
    "an empty folder": (
        "    data: ./texts",
        "    data: ./nothing",
        "mine.yaml:6: stages.base.data:",
        "put the data there",
    ),
    "a name with a slash": ("name: mine", "name: my/own", "mine.yaml:1: name cannot be 'my/own'", "may hold"),
    "answers longer than the model reads": ("_tokens: 16", "_tokens: 640", "sft reads 64 tokens", "lower it"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 4)
    kinds = {
        "chats": [{"prompt": f"{n}?", "completion": f" {n}."} for n in range(40)],
        "pairs": [{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(40)],
        "problems": [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(40)],
        "asked": [{"prompt": f"{n} + 1 ="} for n in range(40)],
        "users": [{"messages": [{"role": "user", "content": f"{n}?"}]} for n in range(40)],
        "alike": [{"prompt": f"{n}?", "chosen": " a", "rejected": " a"} for n in range(40)],
    }
    (tmp_path / "nothing").mkdir()
    (tmp_path / "rewards.py").write_text("def gold(completions, gold, **columns):\n    return [0.0]\n")
    for name, rows in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_thing_is_answered_with_the_place_and_the_fix(what, folder, capsys, monkeypatch):
    right, wrong, place, fix = WRONG[what]
    assert right in RECIPE
    (folder / "mine.yaml").write_text(RECIPE.replace(right, wrong, 1))
    if "extra" in what:
        monkeypatch.setattr("trivium.pipeline.checks.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(folder / "mine.yaml"), "--runs", str(folder / "runs")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert place in said
    assert fix in said
    assert not (folder / "runs" / "mine").exists(), "nothing was made"


LINES = {
    "a missing model": ("sft ./nowhere --data chats.jsonl", "./nowhere is neither a folder nor a stage"),
    "a missing file": ("sft {model} --data chat.jsonl", "chats.jsonl`?"),
    "a value that cannot be": ("sft {model} --data chats.jsonl --epochs 0", "--epochs cannot be 0"),
    "longer than the model reads": (
        "sft {model} --data chats.jsonl --context 100000",
        "reads 64 tokens at most and `context` is 100,000",
    ),
    "a reward of another signature": (
        "rlvr {model} --data problems.jsonl --reward rewards.py:short --max-new-tokens 8",
        "the reward short cannot be called with",
    ),
    "a reward that is not there": (
        "rlvr {model} --data problems.jsonl --reward reward.py:right --max-new-tokens 8",
        "rewards.py`?",
    ),
    "a verb of another tool": ("finetune {model}", "did you mean `trivium sft`?"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return save(folder / "model", small_model(own(), context=64), own())


@pytest.mark.parametrize("what", LINES)
def test_a_wrong_word_of_a_command_is_answered_in_the_words_typed(what, folder, model, capsys, monkeypatch):
    words, said = LINES[what]
    monkeypatch.chdir(folder)
    Path("rewards.py").write_text("def short(answer, problem):\n    return 1.0\n")
    with pytest.raises(SystemExit) as stopped:
        main([*words.format(model=model).split(), *([] if "finetune" in words else ["--plan"])])
    assert stopped.value.code == 2
    complaint = capsys.readouterr().err.strip()
    assert said in complaint
    assert "recipe.yaml" not in complaint, "there is no recipe that a person wrote"


def test_the_reward_of_a_command_lies_where_it_is_typed(folder, model, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    Path("rewards.py").write_text(
        "def right(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
    )
    line = f"rlvr {model} --data problems.jsonl --reward rewards.py:right --max-new-tokens 8 --plan"
    main(line.split())
    assert "rlvr" in capsys.readouterr().out


def test_the_cost_of_a_model_that_is_not_here_is_said_to_be_unknown(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(["sft", "nobody/nothing-here", "--data", "chats.jsonl", "--plan"])
    printed = capsys.readouterr().out
    assert "unknown" in printed
    assert "its cost is unknown until its model is on this machine" in printed


def test_an_absurd_rate_is_noted_and_an_adapter_says_what_it_trains(folder, model, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    main(f"sft {model} --data chats.jsonl --adapter lora --learning-rate 2000 --plan".split())
    printed = " ".join(capsys.readouterr().out.split())
    assert "`learning_rate: 2000` is far above what trains" in printed
    assert "trained by the adapter " in printed


def test_the_same_recipe_without_a_mistake_is_planned(folder, capsys):
    (folder / "mine.yaml").write_text(RECIPE)
    main(["plan", str(folder / "mine.yaml"), "--runs", str(folder / "runs")])
    assert "rl" in capsys.readouterr().out
