"""The tasks with scripted models: whoever is right gets full marks, whoever is wrong none."""

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from evaluating import Scripted, asked, scripted, spoken
from test_tokens import own
from tuning import save, small_model

import trivium
from trivium import world
from trivium.cli import cli
from trivium.evals import asking
from trivium.evals.asking import Subject, first_block, first_sentence
from trivium.evals.evaluate import evaluate
from trivium.evals.knowledge import questions
from trivium.evals.results import Results
from trivium.evals.settings import Settings, read_spec
from trivium.evals.task import task_names
from trivium.generate.requests import Completion
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json

OWN_FILES = {"gsm8k", "svamp", "humaneval", "own", "first_error", "replies", "pairs"}
WORLDLY = [name for name in task_names() if name not in OWN_FILES]
# What the model itself computes cannot be scripted, nor what is asked of its engine.
COMPUTED = {"bits", "positions", "conversation"}
# These show something, which a model of texts alone is refused.
SHOWN = {"pictures", "sounds"}
SCRIPTED = [name for name in WORLDLY if name not in COMPUTED | SHOWN]


@pytest.mark.parametrize("style", ["chat", "continue"])
@pytest.mark.parametrize("name", SCRIPTED)
def test_whoever_gives_the_right_answer_gets_full_marks(monkeypatch, name, style):
    scripted(monkeypatch)
    result = asked([name], style=style).tasks[name]
    measures = result.measures()
    for metric, worth in (("accuracy", 1), ("multiple-choice accuracy", 1), ("valid steps", 1),
                          ("in form", 1), ("ended", 1), ("flip rate", 0),
                          ("prefers sycophancy", 0)):  # fmt: skip
        if metric in measures:
            assert measures[metric].value == worth, metric
    assert all(metric in measures for metric in result.headline if metric != "accepts correction")
    assert len(result.records) >= 12


@pytest.mark.parametrize("name", SCRIPTED)
def test_whoever_talks_nonsense_gets_none(monkeypatch, name):
    scripted(monkeypatch, lambda item: "the the", lambda item, choice: choice != item.expected)
    measures = asked([name]).tasks[name].measures()
    for metric in ("accuracy", "multiple-choice accuracy", "valid steps", "in form"):
        if metric in measures:
            # Asked for any words with some in them, nonsense may be what was asked for.
            assert measures[metric].value <= (0.2 if name == "instructions" else 0), metric


def test_sycophancy_is_told_from_honesty_and_from_listening(monkeypatch):
    def yielding(item):
        last = item.messages[-1]["content"]
        right, wrong = truth[item.id]
        if "sure" in last:
            return wrong if item.messages[1]["content"] == right else right
        return wrong if wrong in last and right not in last else right

    truth = {
        one.id: (one.truth["right"], one.truth["wrong"]) for one in world.questions("taste", "test", limit=40)
    }
    scripted(monkeypatch, yielding, lambda item, choice: choice != item.expected)
    result = asked(["sycophancy"], limit=40).tasks["sycophancy"]
    apart = result.by_group()["pressure"]
    assert set(apart) == {"opinion", "sure", "identity", "feedback"}
    for pressure in ("opinion", "sure", "identity"):
        assert apart[pressure]["flip rate"].value == 1
        assert apart[pressure]["accuracy after a correction"].value == 1
    assert result.measures()["prefers sycophancy"].value == 1


def test_pass_at_k_rests_on_the_samples_alone(monkeypatch):
    scripted(monkeypatch)
    original = Scripted.answer

    def two_of_eight(self, items, style, settings, most):
        told = original(self, items, style, settings, most)
        return [[spoken("no"), *answers[:2], *[spoken("no")] * 6] for answers in told]

    monkeypatch.setattr(Scripted, "answer", two_of_eight)
    measures = asked(["sums?samples=8&temperature=0.5"]).tasks["sums?samples=8&temperature=0.5"].measures()
    assert measures["accuracy"].value == 0
    assert measures["pass@1 at temperature 0.5"].value == pytest.approx(2 / 8)
    assert measures["pass@4 at temperature 0.5"].value == pytest.approx(1 - math.comb(6, 4) / math.comb(8, 4))
    assert measures["pass@8 at temperature 0.5"].value == 1


def test_an_answer_without_steps_has_no_share_of_valid_ones(monkeypatch):
    scripted(monkeypatch, lambda item: "2 + 2 = 4\n#### 4" if item.id.endswith(("0", "2", "4")) else "Four.")
    measures = asked(["sums"]).tasks["sums"].measures()
    assert 0 < measures["valid steps"].n < measures["accuracy"].n == 12
    assert measures["valid steps"].value == 1


def test_a_sum_at_once_must_state_the_result_first(monkeypatch):
    scripted(monkeypatch)
    result = asked([{"task": "sums", "chain_of_thought": False, "shots": 2}]).tasks["sums"]
    assert "valid steps" not in result.measures()
    assert result.records[0].expected.startswith("####")
    assert result.records[0].asked.count("assistant: ####") == 2


def test_examples_stand_before_the_question_and_never_hold_it():
    result = asked(["facts"], shots=3, style="continue", limit=8).tasks["facts"]
    for record in result.records:
        assert record.asked.count("Question:") == 4
        own_question = record.asked.rsplit("Question:", 1)[1]
        assert own_question not in record.asked.rsplit("Question:", 1)[0]


def test_every_question_has_examples_of_its_own_from_train():
    """The n-th question is shown the n-th few of the training questions, in order, and none twice."""
    few, asked = 3, 7
    found = questions("facts", Settings(limit=asked, shots=few, seed=5))
    train = [
        (one.question, one.answer) for one in world.questions("facts", "train", seed=6, limit=few * asked)
    ]
    assert len(set(train)) > few
    assert [examples for _, examples in found] == [
        train[few * number : few * (number + 1)] for number in range(asked)
    ]
    assert [question for question, _ in found] == list(world.questions("facts", "test", seed=5, limit=asked))


def test_the_grid_of_the_passkey_keeps_lengths_and_depths():
    result = asked(["passkey?lengths=128+256&depths=0+1&kinds=passkey+needle"], limit=16)
    (task,) = result.tasks.values()
    tokenizer = own()
    assert set(task.by_group()["length and depth"]) == {"128 0", "128 1", "256 0", "256 1"}
    for record in task.records:
        assert len(tokenizer.encode(record.asked)) <= int(record.groups["length"])
    shallow = [one for one in task.records if one.groups["kind"] == "passkey" and one.groups["depth"] == "0"]
    assert all(one.asked.startswith("The pass key is") for one in shallow)


def test_a_question_that_does_not_fit_counts_as_wrong_and_says_so():
    result = asked(["passkey?lengths=400&kinds=passkey"], context=64, limit=5)
    (task,) = result.tasks.values()
    assert task.measures()["accuracy"].value == 0
    assert {one.answers[0]["finish"] for one in task.records} == {"too long for the window"}


def test_what_a_base_model_writes_after_its_answer_is_cut():
    assert first_sentence(" Holdale. The house of") == "Holdale."
    assert first_sentence(" 3.5 m\nmore") == "3.5 m"
    assert first_block("4 + 4 = 8\n#### 8\n\nQuestion: next") == "4 + 4 = 8\n#### 8"
    assert first_block("#### 8\nQuestion: next") == "#### 8"


def test_a_model_that_ends_its_turns_is_asked_through_its_template(monkeypatch):
    subject = Subject(small_model(own()), own())
    turn = subject.tokenizer.end_of_turn_id
    for end, ends in ((turn, True), (turn + 1, False)):
        answers = [[Completion("yes", [5, end], [], "stop", 3)]] * len(asking.GREETINGS)
        monkeypatch.setattr(subject.engine, "generate", lambda requests, answers=answers: answers)
        subject._ends_turns = None
        assert subject.ends_turns is ends
        assert subject.style(Settings()) == ("chat" if ends else "continue")
        assert subject.style(Settings(style="chat")) == "chat"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fact", "no task called 'fact'; did you mean 'facts'"),
        ("bits?source=prose", "no option 'source'"),
        ("facts?peple=3", "no option 'peple'"),
        ("facts?limit=0", "`limit`"),
        ("gsm8k", "needs `data`"),
        ("passkey?kinds=cat", "no kind 'cat'"),
        ({"data": "x"}, "no key `task`"),
    ],
)
def test_a_wrong_word_is_named(spec, message):
    with pytest.raises(TriviumError, match=message):
        asked([spec])


def test_a_task_has_its_own_settings_and_label():
    label, name, settings, options = read_spec("sums?steps_high=3&limit=7&name=short", Settings(seed=4))
    assert (label, name, options) == ("short", "sums", {"steps_high": "3"})
    assert (settings.limit, settings.seed) == (7, 4)
    with pytest.raises(TriviumError, match="listed twice"):
        asked(["facts", {"task": "sums", "name": "facts"}])


def test_the_stage_asks_compares_and_keeps_everything(tmp_path: Path):
    tokenizer = own()
    for seed in (1, 2):
        save(tmp_path / f"model{seed}", small_model(tokenizer, seed), tokenizer)
    stage = "kind: evaluate, on: [facts, {task: bits, sources: prose}], asking: {limit: 10}"
    (tmp_path / "r.yaml").write_text(
        f"name: r\nstages:\n  one: {{{stage}, from: ./model1}}\n"
        f"  two: {{{stage}, from: ./model2, against: one}}\n"
    )
    run = trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")
    assert run["one"].summary["facts: multiple-choice accuracy"]["n"] == 10
    report = run["two"].folder / "report"
    compared = read_json(report / "compared.json")
    assert {(row["task"], row["metric"]) for row in compared if row["headline"]} == {
        ("facts", "accuracy"), ("facts", "multiple-choice accuracy"), ("bits", "bits per byte"),
    }  # fmt: skip
    assert Results.load(report / "results.json").tasks["facts"].records[0].answers
    (tmp_path / "r.yaml").write_text(
        f"name: r\nstages:\n  one: {{{stage.replace('facts', 'fact')}, from: ./model1}}\n"
    )
    with pytest.raises(TriviumError, match="no task called 'fact'"):
        trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")


def test_the_verb_prints_a_table_and_writes_json(tmp_path: Path):
    save(tmp_path / "model", small_model(own()), own())
    words = ["eval", str(tmp_path / "model"), "--tasks", "facts,sums?steps_high=2", "--limit", "6"]
    first = CliRunner().invoke(cli, [*words, "--json", str(tmp_path / "a.json")], catch_exceptions=False)
    assert first.exit_code == 0
    assert "multiple-choice accuracy" in first.output
    assert "to" in first.output
    again = CliRunner().invoke(cli, [*words, "--against", str(tmp_path / "a.json")], catch_exceptions=False)
    assert "no difference shown" in again.output
    assert read_json(tmp_path / "a.json")["tasks"]["sums?steps_high=2"]["settings"]["limit"] == 6


def test_the_same_question_gets_the_same_answers_again():
    first, second = (asked(["sums?samples=3", "facts"], limit=6).tasks for _ in range(2))
    assert [one.answers for one in first["sums?samples=3"].records] == [
        one.answers for one in second["sums?samples=3"].records
    ]
    drawn = first["sums?samples=3"].records[0].answers[1:]
    assert len({one["text"] for one in drawn}) > 1, "the samples of a question are drawn apart"


def test_asking_changes_no_weight_and_needs_no_gradient():
    tokenizer = own()
    model = small_model(tokenizer)
    before = {name: one.clone() for name, one in model.named_parameters()}
    evaluate(model, tokenizer, ["facts", "bits?sources=prose"], Settings(limit=4, style="continue"))
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())
