"""`trivium plan` looks before minutes are spent: what a stage would refuse when reached, the plan refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import trivium
from trivium.cli import main
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.pipeline import checks
from trivium.pipeline.checks import Checked
from trivium.pipeline.plan import plan, planned
from trivium.pipeline.preview import preview
from trivium.pipeline.why import reasons
from trivium.pipeline.workload import job_of

BASE = """\
  words: {kind: tokenizer, data: ./texts, vocabulary: 268}
  base:
    kind: pretrain
    data: ./texts
    tokenizer: words
    model: {depth: 1, width: 32}
    context: 32
    batch: 256
    tokens: 2k
"""


def rows(path: Path, *some: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 4)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tiny.txt").write_text("A file of 28 bytes, no more.")
    rows(
        tmp_path / "chats.jsonl",
        *[{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(60)],
    )
    rows(
        tmp_path / "pairs.jsonl",
        *[{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(60)],
    )
    rows(tmp_path / "problems.jsonl", *[{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(60)])
    rows(tmp_path / "bodies.jsonl", *[{"body": f"A body of {n}."} for n in range(60)])
    return tmp_path


def refused(folder: Path, stages: str, said: str) -> None:
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{stages}")
    with pytest.raises(TriviumError, match=said) as error:
        plan(folder / "r.yaml", folder / "runs")
    assert "\n" not in str(error.value)


def noted(folder: Path, stages: str) -> list[str]:
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{stages}")
    return planned(folder / "r.yaml", folder / "runs").notes


RL = "  rl: {kind: rlvr, from: base, steps: 1"
SFT = "  sft: {kind: sft, from: base, data: ./chats.jsonl, context: 32}\n"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("  sft: {kind: sft, from: base, data: ./pairs.jsonl}", "sft.data: pairs.jsonl:1 holds"),
        ("  sft: {kind: sft, from: base, data: ./bodies.jsonl}", r"name yours with `columns`"),
        ("  dpo: {kind: preference, from: base, data: ./chats.jsonl}", "dpo.data: chats.jsonl:1 holds"),
        ("  rm: {kind: reward, from: base, data: ./problems.jsonl}", "rm.data: problems.jsonl:1 holds"),
        (f"{RL}, data: ./bodies.jsonl, reward: [math]}}", "has no prompt, only 'body'"),
        (
            f"{RL}, data: ./chats.jsonl, reward: [math], max_new_tokens: 8}}",
            r"stages.rl.reward: ./chats.jsonl: chats.jsonl:1: The scorer 'math' needs one of the columns",
        ),
        (
            f"{RL}, data: ./problems.jsonl, reward: [mine.py:score]}}",
            "mine.py",
        ),
        (
            f"{RL}, data: ./problems.jsonl, reward: [math], max_new_tokens: 64}}",
            "base reads 32 tokens, which `max_new_tokens: 64` fills",
        ),
        ("  corpus: {kind: corpus, data: ./bodies.jsonl, tokenizer: words}", "no column 'text', only"),
        (
            "  long: {kind: midtrain, from: base, data: ./texts, context: 64, tokens: 1k}",
            "base reads 32 tokens",
        ),
        ("  mid: {kind: midtrain, from: base, data: ./texts, tokens: 1k, batch: 16}", "write `batch: 32`"),
        ("  soup: {kind: merge, of: [sft]}\n" + SFT.rstrip(), "name the text to measure on"),
        (
            "  small: {kind: quantize, from: base, data: ./tiny}",
            r"no held-out part to measure on; write `data: \{./tiny: \{validation: 0.1\}\}`",
        ),
        (
            "  wide: {kind: midtrain, from: base, data: ./texts, tokens: 1k, parallel: {tensor: 64}}",
            "wide: `parallel.tensor` is 64, which does not divide the model's",
        ),
        (
            "  mixed: {kind: midtrain, from: base, data: ./texts, tokens: 1k, parallel: {expert: 2}}",
            "mixed: `parallel.expert` divides the experts of a mixture, and this model has none",
        ),
        (
            "  dpo: {kind: preference, from: base, data: ./pairs.jsonl, parallel: {context: 2}}",
            "dpo: `parallel.context` cannot divide answers that share a prompt",
        ),
    ],
)
def test_what_a_stage_would_refuse_the_plan_refuses(folder, stage, said):
    refused(folder, BASE + stage + "\n", said)


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_stage_of_another_recipe_is_named_by_its_path(folder, verb, capsys):
    other = folder / "runs" / "other" / "base"
    other.mkdir(parents=True)
    (other / "stage.yaml").touch()
    (folder / "r.yaml").write_text(
        "name: r\nstages:\n  mid: {kind: midtrain, from: other/base, data: ./texts, tokens: 1k}\n"
    )
    with pytest.raises(SystemExit):
        main([verb, str(folder / "r.yaml"), "--runs", str(folder / "runs")])
    assert f"other/base is a stage of another recipe; write its path seen from the recipe, {other}." in (
        capsys.readouterr().err
    )


def test_rows_that_teach_nothing_or_do_not_fit_are_found_before_the_stage_runs(folder):
    rows(
        folder / "alike.jsonl", *[{"prompt": f"{n}?", "chosen": " yes", "rejected": " yes"} for n in range(5)]
    )
    dpo = "  dpo: {kind: preference, from: base, data: ./alike.jsonl}\n"
    refused(folder, BASE + dpo, "both answers of each of the first 5 pairs are the same")
    answers = [" yes"] * 2 + [" yes" * 100] * 3
    rows(folder / "long.jsonl", *[{"prompt": "So?", "completion": answer} for answer in answers])
    notes = noted(folder, BASE + SFT.replace("chats", "long"))
    assert [one for one in notes if "sft: about 3 of the first 5 rows of ./long.jsonl are cut" in one]


def test_how_processes_share_a_training_is_named(folder):
    stage = "  mid: {kind: midtrain, from: base, data: ./texts, tokens: 1k, parallel: {shard: 4}}\n"
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{stage}")
    found = planned(folder / "r.yaml", folder / "runs", {"stages.base.parallel": {"shard": 8, "tensor": 1}})
    assert found.numbers["base"]["parallel"] == "shard 8"
    assert found.numbers["mid"]["parallel"] == "shard 4"
    assert "parallel shard 4" in found.rows[3][4]


def test_a_reward_that_cannot_be_imported_is_named(folder):
    (folder / "mine.py").write_text("import nothing_of_that_name\n")
    stage = "  rl: {kind: rlvr, from: base, data: ./problems.jsonl, reward: [mine.py:score], steps: 1}\n"
    refused(folder, BASE + stage, "mine.py:score cannot be imported: ModuleNotFoundError")


def test_a_batch_in_a_stage_of_pairs_is_answered_with_the_line_to_write(folder):
    refused(folder, BASE + "  dpo: {kind: preference, from: base, data: ./pairs.jsonl, batch: 8}\n",
            "write `pairs: 8` in place of it")  # fmt: skip


def test_a_reward_model_with_an_adapter_is_saved_merged_by_itself(folder):
    stage = "  rm: {kind: reward, from: base, data: ./pairs.jsonl, adapter: {rank: 2}, context: 32}\n"
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{stage}")
    found = planned(folder / "r.yaml", folder / "runs")
    assert found.prepared.nodes["rm"].stage.adapter.save == "merged"
    refused(folder, BASE + stage.replace("rank: 2", "rank: 2, save: both"), "say `save: merged`")


def test_a_tiny_file_is_not_learned_by_heart_without_a_word(folder):
    stages = BASE.replace("data: ./texts\n    tokenizer", "data: ./tiny\n    tokenizer")
    refused(
        folder, stages, r"base: ./tiny is so small that it would be repeated \d+ times; .*max_repeats: \d+"
    )
    meant = stages.replace("data: ./tiny\n", "data: {./tiny: {max_repeats: 900}}\n")
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{meant}")
    assert plan(folder / "r.yaml", folder / "runs")


def test_what_holds_nothing_out_is_said_and_a_wish_to_measure_it_refused(folder):
    few = folder / "few"
    few.mkdir()
    for number in range(16):
        (few / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 20)
    stages = BASE.replace("data: ./texts\n    tokenizer", "data: ./few\n    tokenizer")
    [note] = noted(folder, stages)
    assert "`validation: 0.01` holds out none of the 16 documents of ./few" in note
    refused(
        folder, stages + "    validation: {times: 2}\n", "`validation` is asked for and nothing is held out"
    )


def test_an_absurd_model_is_refused_with_the_memory_it_would_need(folder):
    refused(
        folder, BASE.replace("depth: 1, width: 32", "depth: 100000"), "TiB of memory to train; lower `depth`"
    )


@pytest.mark.parametrize(("adapter", "bytes_each"), [(None, 16), ({"rank": 4}, 4)])
def test_a_training_larger_than_the_memory_here_is_noted(adapter, bytes_each, monkeypatch):
    here = replace(machine.describe(), device_memory=2**30)
    monkeypatch.setattr(machine, "describe", lambda: here)
    stage = SimpleNamespace(learning_rate=0.1, adapter=adapter)
    fits = 2**30 // bytes_each
    for parameters, seen in ((fits, Checked()), (fits + 1, Checked(here=False)), (0, Checked())):
        checks._check_memory("base", stage, {"parameters": parameters}, seen)
        assert seen.notes == []
    checks._check_memory("base", stage, {"parameters": fits + 1}, checked := Checked())
    (note,) = checked.notes
    assert "need about 1 GiB to train" in note


def test_the_numbers_that_are_planned_are_those_that_run(folder):
    text = f"name: r\nstages:\n{BASE}{SFT}".replace("batch: 256", "batch: 250")
    (folder / "r.yaml").write_text(text)
    runs = folder / "runs"
    trivium.run(folder / "r.yaml", runs=runs, only="words")
    before = planned(folder / "r.yaml", runs).numbers
    run = trivium.run(folder / "r.yaml", runs=runs)
    for name in ("base", "sft"):
        assert before[name]["steps"] == pytest.approx(run[name].summary["steps"], rel=0.1), name
        assert before[name]["tokens"] == pytest.approx(run[name].summary["tokens"], rel=0.1), name
    assert before["sft"]["epochs"] == {"./chats.jsonl": pytest.approx(1.0, rel=0.15)}


def test_the_last_layer_is_planned_for_learned_places_alone_where_they_are_few_or_distilled(folder):
    student = "  student: {kind: distill, from: base, teacher: base, data: ./chats.jsonl, context: 32}\n"
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{SFT}{student}")
    found = planned(folder / "r.yaml", folder / "runs")
    for name, learned, is_part in (("sft", 0.5, True), ("sft", 0.9, False), ("student", 0.9, True)):
        numbers = {**found.numbers[name], "learned": learned}
        job = job_of(found.prepared, name, {**found.numbers, name: numbers}, Checked())
        training = next(one for one in job.phases if one.name == "training")
        assert training.last_layer == (pytest.approx(training.tokens * learned) if is_part else None)


def test_the_prompts_of_a_synthesis_are_as_long_as_its_rows_in_the_mean(folder):
    stage = (
        "  made: {kind: synthesize, data: ./few.jsonl, from: base, steps: [{answer: {max_new_tokens: 8}}]}\n"
    )
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{stage}")
    found = set()
    for count in (1, 9):
        rows(folder / "few.jsonl", *[{"prompt": f"What is it, {n}?"} for n in range(count)])
        found.add(planned(folder / "r.yaml", folder / "runs").numbers["made"]["prompt tokens"])
    assert len(found) == 1


def test_every_stage_that_computes_has_a_cost(folder):
    stages = BASE + SFT + (
        "  dpo: {kind: preference, from: sft, data: ./pairs.jsonl, context: 32}\n"
        "  rl: {kind: rlvr, from: sft, data: ./problems.jsonl, reward: [math], steps: 2, max_new_tokens: 8}\n"
    )  # fmt: skip
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{stages}")
    numbers = planned(folder / "r.yaml", folder / "runs").numbers
    assert all(numbers[name]["flops"] > 0 for name in ("base", "sft", "dpo", "rl"))
    assert numbers["dpo"]["steps"] == 2
    assert numbers["rl"]["answers"] == 2 * 8 * 8


@pytest.mark.slow
def test_why_names_the_field_and_what_follows_from_it(folder, capsys):
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{SFT}")
    runs = str(folder / "runs")
    trivium.run(folder / "r.yaml", runs=runs)
    prepared = planned(folder / "r.yaml", runs, ["base.tokens=3k"]).prepared
    assert reasons(prepared, "words") == ["done before"]
    assert reasons(prepared, "base") == ["tokens: 2000 -> 3000"]
    [parent] = reasons(prepared, "sft")
    assert parent.startswith("base is another result: base-")
    (folder / "chats.jsonl").write_text('{"prompt": "new", "completion": " row"}\n' * 30)
    main(["plan", str(folder / "r.yaml"), "--runs", runs, "--why"])
    printed = capsys.readouterr().out
    assert "sft: the content of ./chats.jsonl changed" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "form", "shown"),
    [
        ("chats.jsonl", "prompt-completion", "What is 0?⟦ It is 0.<|im_end|>⟧"),
        ("pairs.jsonl", "preference", "⟦ 0<|im_end|>⟧"),
        ("problems.jsonl", "prompt-completion, conversational (prompt and answer)", "⟦1<|im_end|>"),
        ("texts", "plain text", "⟦ and 3 make 3"),
        ("bodies.jsonl", "unknown columns", "body: A body of 0."),
    ],
)
def test_data_shows_what_a_file_holds(folder, name, form, shown, capsys):
    table, example = preview(str(folder / name))
    found = dict(table)
    assert form in found["format"]
    assert shown in example.replace("0⟦ and", "⟦ and")
    assert found["rows"] == ("40" if name == "texts" else "60")
    main(["data", str(folder / name)])
    assert found["format"] in capsys.readouterr().out


def test_data_that_is_not_there_is_one_sentence(folder):
    with pytest.raises(TriviumError, match="There is no file or folder"):
        preview(str(folder / "none.jsonl"))


def test_steps_without_a_batch_are_planned_also_where_the_context_grows(folder):
    longer = (
        "  mid: {kind: midtrain, from: base, data: ./texts, steps: 5, context: {length: 64, method: yarn}}"
    )
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{longer}\n")
    [row] = [row for row in plan(folder / "r.yaml", folder / "runs") if row[0] == "mid"]
    assert "steps 5" in row[4]


def test_the_rates_of_a_new_model_are_those_of_its_optimiser(folder):
    def line(*settings: str) -> str:
        (folder / "r.yaml").write_text(
            f"name: r\nstages:\n{BASE}" + "".join(f"    {one}\n" for one in settings)
        )
        return next(row[4] for row in plan(folder / "r.yaml", folder / "runs") if row[0] == "base")

    assert "Muon learning rate 0.03" in line()
    assert "AdamW learning rate of embeddings" in line()
    assert "Muon learning rate 0.015" in line("learning_rate: 0.015")
    by_adamw = line("optimiser: adamw", "learning_rate: 0.002")
    assert "AdamW learning rate 0.002" in by_adamw
    assert "Muon" not in by_adamw


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "recipe", ["pocket", "experiments/skip_pretraining", "experiments/early_reinforcement"]
)
def test_what_ships_is_planned(recipe, tmp_path):
    rows = plan(recipe, tmp_path / "runs")
    assert all(row[3] for row in rows[1:] if row[1] in ("pretrain", "sft", "rlvr", "preference")), rows


def test_of_a_pair_both_answers_are_laid_into_the_template(folder):
    judge = "  judge: {kind: reward, from: base, data: ./pairs.jsonl, epochs: 1, pairs: 4}\n"
    (folder / "r.yaml").write_text(f"name: r\nstages:\n{BASE}{judge}")
    found = {one.job.stage: one.job for one in planned(folder / "r.yaml", folder / "runs").estimates}
    assert found["judge"].conversations == 2 * 60
