"""The stage `distill`: vocabularies, what is stored, what the student writes, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trivium
from trivium.data.preview import previewed
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors
from trivium.kit.metrics import read_metrics
from trivium.learn.trainer import Trainer
from trivium.pipeline.plan import planned
from trivium.pipeline.run import run
from trivium.stages.parts import teachers
from trivium.stages.parts.on_policy import Asked, OnPolicy, StudentAnswers, _prompt_size
from trivium.tokens.tokenizer import Tokenizer

SHAPE = "{depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32}"
RECIPE = f"""\
name: school
seed: 3
stages:
  words: {{kind: tokenizer, data: ./texts.jsonl, vocabulary: 280}}
  others: {{kind: tokenizer, data: ./others.jsonl, vocabulary: 290}}
  corpus: {{kind: corpus, data: ./texts.jsonl, tokenizer: words}}
  base: {{kind: pretrain, data: corpus, model: {SHAPE}, context: 64, batch: 256, steps: 8}}
  second: {{kind: pretrain, data: corpus, model: {SHAPE}, context: 64, batch: 256, steps: 8, seed: 4}}
  foreign: {{kind: pretrain, data: ./texts.jsonl, tokenizer: others, model: {SHAPE}, context: 64, batch: 256,
            steps: 2}}
  grown: {{kind: midtrain, from: second, data: corpus, vocabulary: {{data: ./others.jsonl, added: 6}},
          steps: 2, batch: 256}}
  chatty: {{kind: sft, from: second, data: ./chats.jsonl, context: 64, batch: 256, steps: 4}}
"""


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """The models that learn and teach, made once."""
    folder = tmp_path_factory.mktemp("school")
    texts = [f"{one} and {other} make {one + other}." for one in range(20) for other in range(9)]
    write(folder / "texts.jsonl", [{"text": text} for text in texts])
    write(folder / "others.jsonl", [{"text": f"the river {text[::-1]} rises"} for text in texts])
    write(
        folder / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": text.split(" make")[0]},
                    {"role": "assistant", "content": text.split("make ")[1]},
                ]
            }
            for text in texts[:60]
        ],
    )
    (folder / "school.yaml").write_text(RECIPE)
    run(folder / "school.yaml", folder / "runs")
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(school: Path, text: str) -> Path:
    """The models' recipe with one more stage, called `student`."""
    path = school / "one.yaml"
    path.write_text(RECIPE + f"  student: {{kind: distill, context: 64, batch: 256, {text}}}\n")
    return path


def taught(school: Path, text: str):
    made = trivium.run(recipe(school, text), runs=school / "runs", only=["student"])["student"]
    return made, [row for row in made.metrics if "step" in row]


@pytest.mark.slow
def test_what_is_learned_is_what_the_teacher_says(school):
    """Of a plain corpus; the student comes nearer to its teacher, on held-out text as well."""
    made, log = taught(school, "from: base, teacher: second, data: corpus, steps: 30")
    assert log[-1]["forward_kl"] < 0.5 * log[0]["forward_kl"]
    assert log[0]["loss"] == pytest.approx(log[0]["forward_kl"])
    assert log[-1]["teacher_agreement"] > log[0]["teacher_agreement"]
    assert made.summary["unseen"]["forward_kl"] < 0.6 * log[0]["forward_kl"]
    assert log[-1]["flops"] > 0


def test_another_vocabulary_is_refused_by_the_plan_and_by_the_stage(school):
    path = recipe(school, "from: base, teacher: foreign, data: corpus, steps: 2")
    for refusing in (lambda: planned(path, school / "runs"), lambda: run(path, school / "runs")):
        with pytest.raises(TriviumError, match=r"different vocabularies.*`synthesize`") as refusal:
            refusing()
        assert "\n" not in str(refusal.value)
        assert "base and foreign" in str(refusal.value)


def test_tokens_that_the_teacher_alone_has_are_added_to_the_student(school):
    made, log = taught(school, "from: base, teacher: grown, data: ./chats.jsonl, steps: 4")
    theirs, own = (Tokenizer.load(school / "runs" / "school" / name / "model") for name in ("grown", "base"))
    assert theirs.vocabulary_size > own.vocabulary_size
    assert Tokenizer.load(made.folder / "model").fingerprint == theirs.fingerprint
    assert made.model().transformer.config.vocabulary == theirs.vocabulary_size
    changes = read_metrics(made.folder / "metrics.jsonl")
    assert {"change": "tokenizer", "before": "its own", "after": "the teacher's"} in changes
    assert len(log) == 4


def test_conversations_need_a_template_on_some_side(school):
    shutil.copytree(school / "runs" / "school" / "second" / "model", school / "bare")
    (school / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(TriviumError, match="bare has no chat template"):
        taught(school, "from: ./bare, teacher: ./bare, data: ./chats.jsonl, steps: 2")
    _, log = taught(school, "from: base, teacher: ./bare, data: ./chats.jsonl, steps: 2")
    assert len(log) == 2


def test_a_plan_counts_the_teacher(school):
    derived = planned(
        recipe(school, "from: base, teacher: second, data: corpus, tokens: 10k"), school / "runs"
    ).numbers
    student, teacher = derived["student"], derived["second"]
    assert student["teacher_parameters"] == teacher["parameters"]
    alone = planned(
        recipe(school, "from: base, teacher: second, data: corpus, tokens: 10k, label_weight: 1"),
        school / "runs",
    ).numbers["student"]
    # The table of tokens multiplies nothing, and attention adds a little.
    shape = student["teacher_model"]
    multiplied = teacher["parameters"] - shape["vocabulary"] * shape["width"]
    asked = student["flops"] - alone["flops"]
    assert asked == pytest.approx(2 * multiplied * student["tokens"], rel=0.1)


# stored once


@pytest.mark.slow
def test_what_is_stored_is_resumed_part_by_part_and_checked(school, monkeypatch):
    """Killed while it stores, it keeps the parts that are whole; a damaged part is named and never used."""
    text = "from: base, teacher: second, data: corpus, steps: 6, top_k: 12"
    monkeypatch.setattr(teachers, "PART", 4)
    whole, log = taught(school, text)
    path = recipe(school, text + ", seed: 3, ema: 0.5")
    said, save = [], teachers.save_tensors

    def dies_at_the_third(place, tensors):
        if len(said) == 2:
            raise KeyboardInterrupt
        said.append(place.name)
        return save(place, tensors)

    monkeypatch.setattr(teachers, "save_tensors", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(path, school / "runs")
    (store,) = (school / "runs" / "store").glob("student-*/teacher/*")
    parts = sorted(one.name for one in store.glob("*.safetensors"))
    assert parts == ["000000000.safetensors", "000000004.safetensors"]
    content = (store / parts[1]).read_bytes()
    (store / parts[1]).write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    monkeypatch.setattr(teachers, "save_tensors", save)
    with pytest.raises(TriviumError, match="damaged"):
        run(path, school / "runs")
    (store / parts[1]).write_bytes(content)
    written = []
    monkeypatch.setattr(
        teachers, "save_tensors", lambda place, tensors: (written.append(place.name), save(place, tensors))
    )
    run(path, school / "runs")
    assert not set(parts) & set(written)
    assert not list((school / "runs" / "store").glob("student-*/teacher"))
    again = read_metrics(next((school / "runs" / "school").glob("student")) / "metrics.jsonl")
    losses = [row["loss"] for row in again if "step" in row]
    assert losses == [row["loss"] for row in log]
    assert whole.summary["unseen"]["forward_kl"] > 0


def test_all_tokens_but_one_stored_are_the_live_teacher(school):
    known = Tokenizer.load(school / "runs" / "school" / "base" / "model").vocabulary_size
    text = "from: base, teacher: second, data: corpus, steps: 4, precision: float32, temperature: 2"
    _, live = taught(school, text)
    _, stored = taught(school, f"{text}, top_k: {known - 1}")
    for one, other in zip(live, stored, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


# on the student's own words


def test_the_student_writes_and_the_teacher_judges(school):
    made, log = taught(
        school,
        "from: chatty, teacher: chatty, data: ./chats.jsonl, steps: 2, loss: reverse_kl,"
        " on_policy: {max_new_tokens: 8}",
    )
    assert [row["on_policy"] for row in log] == [1, 1]
    assert log[0]["reverse_kl"] == pytest.approx(0, abs=1e-4)
    assert all(row["completions/mean_length"] <= 8 for row in log)
    shown = read_metrics(made.folder / "completions.jsonl")
    assert [row["step"] for row in shown] == [1, 1, 2, 2]
    assert all(" and " in row["prompt"] for row in shown)


def test_an_answer_is_asked_for_where_the_datas_began(school, monkeypatch):
    """The prompt is what comes before the last answer, and every token of the student's own is learned."""
    rows = []
    gradient = Trainer._gradient
    monkeypatch.setattr(Trainer, "_gradient", lambda self, mine: (rows.extend(mine), gradient(self, mine))[1])
    made, _ = taught(
        school, "from: chatty, teacher: chatty, data: ./chats.jsonl, steps: 1, on_policy: {max_new_tokens: 5}"
    )
    tokenizer = Tokenizer.load(made.folder / "model")
    text = previewed(rows[0], tokenizer, colour=False)
    first = tokenizer.decode(rows[0].tokens[: rows[0].lengths[0]].tolist())
    assert " and " in first
    start = 0
    for length in rows[0].lengths:
        learned = rows[0].weights[start : start + length] > 0
        begin = int(learned.argmax())
        assert learned[begin : length - 1].all()
        assert not learned[:begin].any()
        assert 1 <= learned.sum() <= 5
        start += length
    assert "⟦" in text


@pytest.mark.parametrize(
    ("learned", "size"),
    [("0110100110", 8), ("0011111000", 3), ("1111111111", 5), ("0000000000", 0), ("1000100000", 5)],
)
def test_a_prompt_ends_before_the_last_of_several_answers(learned, size):
    """What is learned at a place is the token after it; of a text without a prompt, half is the prompt."""
    assert _prompt_size(np.array([one == "1" for one in learned])) == size


def test_every_step_and_prompt_is_answered_with_a_seed_of_its_own():
    seeds = []
    engine = SimpleNamespace(
        refresh=lambda: None,
        generate=lambda requests: [[seeds.append(one.sampling.seed)] for one in requests],
    )
    student = SimpleNamespace(
        engine=engine, settings=OnPolicy(), work=SimpleNamespace(seed=3),
        model=SimpleNamespace(config=SimpleNamespace(reach=64)),
    )  # fmt: skip
    for step in range(3):
        StudentAnswers._answers(student, step, [Asked(0, [1], "a", 0, 1.0)] * 2)
    assert len(set(seeds)) == 6


@pytest.mark.slow
def test_on_policy_goes_on_bit_for_bit(school, monkeypatch):
    text = (
        "from: base, teacher: chatty, data: ./chats.jsonl, steps: 5, learning_rate: 0.01,"
        " on_policy: {share: 0.5, max_new_tokens: 6}, checkpoint: {every_steps: 2}"
    )
    made, whole = taught(school, text)
    step = Trainer._one_step

    def stops(self):
        if self.step == 3:
            raise RuntimeError("the power is gone")
        return step(self)

    weights = load_tensors(made.folder / "model" / "model.safetensors")
    shutil.rmtree(made.folder)
    monkeypatch.setattr(Trainer, "_one_step", stops)
    with pytest.raises(RuntimeError, match="power"):
        taught(school, text)
    monkeypatch.setattr(Trainer, "_one_step", step)
    again, log = taught(school, text)
    after = load_tensors(again.folder / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    drop = ("tokens_per_second", "data_wait")
    assert [{k: v for k, v in row.items() if k not in drop} for row in log] == [
        {k: v for k, v in row.items() if k not in drop} for row in whole
    ]
