"""One-line commands: recipes of one stage, whose flags are the stage's settings, foreign names understood."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trivium
from trivium.cli import cli, main
from trivium.cli.train import KINDS, verbs
from trivium.kit.errors import TriviumError
from trivium.pipeline import oneliner
from trivium.pipeline.oneliner import described, settings_of
from trivium.recipe import foreign
from trivium.recipe.schema import load
from trivium.stages import kinds


def settings(kind: str, words: str) -> dict:
    return settings_of(kinds()[kind], words.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 3)
    rows = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(60)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_road_of_two_commands(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    shape = "--vocabulary 268 --depth 1 --width 32 --context 32"
    main(f"pretrain --data texts {shape} --batch 256 --steps 3".split())
    assert trivium.load("pretrain-texts/pretrain").transformer.config.width == 32
    line = (
        "sft pretrain --data chats.jsonl --num_train_epochs 1 --max_length 32 --adapter lora --lora_r 2"
        " --to out"
        " --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    )
    main(line.split())
    printed = capsys.readouterr().out
    assert "The model is in out as well." in printed
    assert max(map(len, printed.splitlines())) <= 100
    made = trivium.load("sft-chats/sft")
    assert trivium.load("out").logits([1, 2, 3]).equal(made.logits([1, 2, 3]))
    stage = load("runs/sft-chats/recipe.yaml").stages["sft"]
    assert (stage.batch, stage.epochs, stage.adapter.rank, stage.context) == (128, 1, 2, 32)
    main(["distill", "out", "--teacher", "pretrain", "--data", "chats.jsonl", "--print-recipe"])
    teacher = yaml.safe_load(capsys.readouterr().out)["stages"]["distill"]["teacher"]
    assert Path(teacher).samefile("runs/pretrain-texts/pretrain")
    main(line.split())
    assert "reused" in capsys.readouterr().out


def test_what_may_be_a_name_on_the_hub_stays_as_it_is(folder, monkeypatch):
    """The recipe lies in another folder, so that all else becomes a whole path."""
    monkeypatch.chdir(folder)
    for name in ("owner/set-v1.5", "owner/set", "stage", "world:facts"):
        assert oneliner._place(name) == name
    for name in ("texts", "chats.jsonl", "new.jsonl", "./new", "texts/*.txt"):
        assert oneliner._place(name) == str(folder / name.removeprefix("./"))


def test_the_recipe_is_printed_and_nothing_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    main(
        [
            "dpo",
            "owner/model",
            "--data",
            "pairs.jsonl",
            "--beta",
            "0.2",
            "--loss_type",
            "simpo",
            "--print-recipe",
            "--name",
            "mine",
        ]
    )
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["name"] == "mine"
    assert content["stages"]["dpo"] == {
        "kind": "preference", "from": "owner/model", "data": {str(folder / "pairs.jsonl"): {}}, "beta": 0.2,
        "loss": "simpo",
    }  # fmt: skip
    assert not (folder / "runs" / "mine").exists()


@pytest.mark.parametrize(
    ("kind", "words", "means"),
    [
        ("sft", "--lr 1e-4", {"learning_rate": 1e-4}),
        ("sft", "--learning_rate 1e-4 --warmup_ratio 0.1 --lr_scheduler_type cosine",
         {"learning_rate": {"from": 1e-4, "warmup": 0.1, "decay": "cosine"}}),
        ("sft", "--lr_scheduler_type cosine --learning-rate 2e-4",
         {"learning_rate": {"decay": "cosine", "from": 2e-4}}),
        ("sft", "--max_steps 300 --packing", {"steps": 300}),
        ("sft", "--micro_batch_size 4 --gradient_accumulation_steps 8 --max_seq_length 512",
         {"context": 512, "batch": 4 * 8 * 512}),
        ("sft", "--lora_r 8 --lora_alpha 16 --load_in_4bit",
         {"adapter": {"rank": 8, "alpha": 16, "base": "int4"}}),
        ("sft", "--adapter qlora --adapter.rank 4", {"adapter": {"base": "int4", "rank": 4}}),
        ("sft", "--adapter.rank 4 --adapter dora", {"adapter": {"rank": 4, "kind": "dora"}}),
        ("sft", "--train_on_inputs --neftune_noise_alpha 5", {"loss": "all", "neftune": 5}),
        ("sft", "--bf16 --gradient_checkpointing", {"precision": "bfloat16", "recompute": "full"}),
        ("preference", "--per_device_train_batch_size 8 --max_length 256", {"pairs": 8, "context": 256}),
        ("rlvr", "--reward math --num_generations 4 --max_completion_length 64 --beta 0.04 --loss_type grpo",
         {"reward": ["math"], "num_generations": 4, "max_new_tokens": 64, "kl": {"coefficient": 0.04},
          "algorithm": "grpo"}),
        ("rlvr", "--reward math --per_device_train_batch_size 32 --num_generations 8",
         {"reward": ["math"], "num_generations": 8, "prompts_per_step": 4}),
        ("pretrain", "--depth 6 --tokens 20M", {"model": {"depth": 6}, "tokens": 20_000_000}),
    ],
)  # fmt: skip
def test_the_names_of_other_tools_are_understood(kind, words, means):
    assert settings(kind, words) == means
    needed = {"reward": ["math"]} if kind == "rlvr" else {}
    whole = {"kind": kind, "from": "x", "data": "y", **needed, **means}
    known = {field.alias or name for name, field in kinds()[kind].model_fields.items()}
    kinds()[kind].model_validate({key: value for key, value in whole.items() if key in known})


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("sft", "--logging_steps 5", "--logging_steps: every step is logged"),
        ("sft", "--fp16", "write `precision: bfloat16`"),
        ("sft", "--learnin_rate 1", "did you mean `learning_rate`"),
        ("sft", "--num_generations 8", "--num-generations is not a setting of sft"),
        ("sft", "epochs 2", "epochs is no flag; settings are written --key VALUE"),
        ("sft", "--per_device_train_batch_size 0", "whole numbers from 1 on"),
    ],
)
def test_what_is_not_a_setting_is_answered(kind, words, said):
    with pytest.raises(TriviumError, match=said):
        settings(kind, words)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("max_steps: 3", "max_steps is not a setting; write `steps`"),
        ("lora_r: 3", "write `adapter: {rank: ...}`"),
        ("adapter: lra", "adapter.kind cannot be 'lra': it should be 'lora'"),
        ("eval_strategy: steps", "says how often the loss is measured"),
        ("per_device_train_batch_size: 3", "a step's tokens are counted in `batch`"),
        ("packing: true", "examples are always packed"),
        ("num_train_epochs: 3", "write `epochs`"),
    ],
)
def test_a_foreign_name_in_a_recipe_is_answered_with_the_right_key(tmp_path, key, said):
    (tmp_path / "r.yaml").write_text(f"stages:\n  sft: {{kind: sft, from: a/b, data: c/d, {key}}}\n")
    with pytest.raises(TriviumError, match=said):
        load(tmp_path / "r.yaml")


def test_every_key_that_is_meant_exists_somewhere():
    known = {field.alias or name for kind in kinds().values() for name, field in kind.model_fields.items()}
    for key in [*foreign.KEYS.values(), *foreign.POLICY.values()]:
        assert key.partition(".")[0] in known, key


def test_every_kind_that_trains_has_a_verb_and_help_names_its_settings(capsys):
    names = {verb.name for verb in verbs()}
    assert {"pretrain", "midtrain", "sft", "dpo", "reward", "rlvr"} <= names
    assert names <= set(cli.commands)
    assert "--neftune" in described(kinds()[KINDS["sft"]])
    main(["sft", "--help"])
    assert "Strength of the noise" in capsys.readouterr().out


def test_the_verbs_cost_no_import():
    program = "import sys, trivium.cli; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
