"""What a person reads: model cards, metrics, progress, rewards that fail, how a model is sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import trivium
from trivium.cli import main
from trivium.generate.defaults import sampling_defaults
from trivium.grade.rewards import reward_from_file
from trivium.kit.errors import TriviumError
from trivium.learn.trainer import SHOWN
from trivium.pipeline.cards import results_in
from trivium.serve.models import open_engine

RECIPE = """\
name: told
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
  sft: {kind: sft, from: base, data: [{path: ./chats.jsonl, validation: 0.2}], steps: 1}
  dpo: {kind: preference, from: sft, data: [./pairs.jsonl], pairs: 4, steps: 1, sycophancy: 0}
  rl:
    kind: rlvr
    from: sft
    data: ./problems.jsonl
    reward: [rewards.py:same]
    steps: 1
    prompts_per_step: 2
    num_generations: 2
    max_new_tokens: 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 4)
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(30)
    ]
    pairs = [{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(20)]
    problems = [{"prompt": f"{n}?", "answer": str(n)} for n in range(20)]
    for name, rows in (("chats", chats), ("pairs", pairs), ("problems", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "zero.jsonl").write_text('{"prompt": "zero", "answer": "0"}\n' * 4)
    (folder / "rewards.py").write_text(
        "def same(completions, **columns):\n    return [1.0 for _ in completions]\n\n\n"
        "def wrong(prompts, completions, **columns):\n"
        "    return [1 / (prompt != 'zero') for prompt in prompts]\n"
    )
    (folder / "told.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return trivium.run(folder / "told.yaml", runs=folder / "runs")


def test_every_model_has_a_card_with_its_lineage_data_andresults_in(folder, run):
    text = (folder / "runs" / "told" / "dpo" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "other", "library_name": "transformers", "tags": ["trivium", "preference"],
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert "license: other  # fill in" in header
    for name in ("base", "sft", "dpo"):
        assert f"| {name} | " in body
        assert (folder / "runs" / "told" / name).resolve().name in body, "the lineage names the fingerprint"
    assert "| ./pairs.jsonl | " in body
    assert "| loss | " in body
    assert "| last step: accuracy | " in body
    assert "| last step: validation_loss | " in (folder / "runs" / "told" / "base" / "README.md").read_text()
    assert str(folder) not in text
    assert not (folder / "runs" / "told" / "words" / "README.md").exists()


def test_a_card_leaves_out_an_interval_that_is_not_known():
    known = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}
    unknown = {"value": 1.0, "low": None, "high": None, "n": 1}
    rows = dict(results_in({"validation": {"right": known, "margin": unknown}}))
    assert rows == {"validation: right": "0.5 (0.25 to 0.75, n = 12)"}


def test_metrics_are_rows_of_steps_and_changes_are_apart(run):
    assert [row["step"] for row in run["base"].metrics] == [1, 2]
    assert {row["change"] for row in run["sft"].changes} >= {"learning rate"}
    pandas = pytest.importorskip("pandas")
    frame = run["base"].metrics_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [1, 2]
    assert frame["loss"].notna().all()


def test_a_stage_in_which_nothing_was_learned_says_so(folder, run, capsys):
    assert run["rl"].metrics[0]["frac_reward_zero_std"] == 1.0
    trivium.run(folder / "told.yaml", runs=folder / "runs", only=["rl"], set={"rl.steps": 2})
    told = capsys.readouterr().err
    assert "rl: nothing was learned: all answers to each prompt earned the same reward" in told
    line = next(line for line in told.splitlines() if line.startswith("rl  100%"))
    assert "reward 1" in line
    assert "tokens/s" in line
    assert "taught nothing 1" in line
    assert "length" in line


def test_preference_and_policy_rows_have_what_progress_shows(run):
    assert {"rewards/accuracies", "rewards/margins"} <= run["dpo"].metrics[0].keys()
    assert "entropy" in {SHOWN[name] for name in run["rl"].metrics[0] if name in SHOWN}


def test_a_reward_that_fails_is_named_with_its_line_and_row(folder):
    reward = reward_from_file("rewards.py:wrong", folder)
    said = r"wrong failed at rewards.py:\d+ \(ZeroDivisionError: .*\) on the row with the prompt 'zero'"
    with pytest.raises(TriviumError, match=said):
        reward(prompts=["one", "zero"], completions=["a", "b"])


def test_status_says_how_reinforcement_goes(folder, run, capsys):
    main(["status", "told", "--runs", str(folder / "runs")])
    said = capsys.readouterr().out
    assert "told/rl, last step: reward 1, " in said
    assert "taught nothing 100%" in said
    assert "told/dpo, last step: accuracy " in said
    assert "told/sft, last step" not in said
    assert max(map(len, said.splitlines())) <= 100


def test_a_model_is_sampled_as_its_own_config_says(folder, run, tmp_path):
    made = folder / "runs" / "told" / "sft" / "model"
    assert sampling_defaults(made) == {"temperature": 0.0}, (
        "a small chat model is asked for its likeliest answer"
    )
    assert sampling_defaults(folder / "runs" / "told" / "base" / "model") == {}
    first, second = (trivium.load(made).generate("3 and", max_new_tokens=6).tokens for _ in range(2))
    assert first == second
    assert open_engine(made).sampling_defaults == {"temperature": 0.0}
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.9}


def test_a_run_ends_with_what_to_try_next_in_a_hundred_columns(folder, capsys):
    main(["run", str(folder / "told.yaml"), "--runs", str(folder / "runs"), "--set", "rl.steps=1"])
    printed = capsys.readouterr().out
    assert "Try next:\n  trivium chat told/rl" in printed
    lines = [line for line in printed.splitlines() if str(folder) not in line]
    assert max(map(len, lines)) <= 100


def test_a_reward_that_fails_names_its_stage(folder, run):
    with pytest.raises(TriviumError, match=r"Stage `rl`: The reward wrong failed at rewards.py:\d+"):
        trivium.run(
            folder / "told.yaml",
            runs=folder / "runs",
            set={"rl.reward": ["rewards.py:wrong"], "rl.data": "./zero.jsonl"},
        )
