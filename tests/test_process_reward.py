"""Process reward models: TRL's tokens, loss and gradient, transformers' form, and the first error found."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
import transformers
from tuning import own, save, small_model, write_rows

import trivium
from trivium.data.counted import CountedSource
from trivium.data.rows import collate
from trivium.data.sources import Document
from trivium.data.steps import (
    StepBatches,
    StepData,
    StepSolution,
    labelled_steps,
    split_steps,
    up_to_first_error,
)
from trivium.evals import first_error
from trivium.evals.first_error import first_error_measures, step_report
from trivium.evals.settings import Settings
from trivium.grade.process import ProcessScorer, aggregate
from trivium.grade.rewards import combine
from trivium.grade.steps import labels_of_steps
from trivium.kit.errors import TriviumError
from trivium.learn.objectives.reward import StepCorrectness
from trivium.model.folder import stored_form
from trivium.model.scalar_head import (
    WITH_TOKEN_CLASSIFIER,
    ScalarHead,
    load_reward_model,
    save_reward_model,
    without_language_head,
)
from trivium.model.weights import stored_tensors
from trivium.stages.parts import stepwise
from trivium.stages.parts.stepwise import judged_steps

ROWS = [
    {"prompt": "the river", "completions": ["rises in", "the hills", "345"], "labels": [True, True, False]},
    {"prompt": "12 or 345 sacks?", "completions": ["12", "the miller counts"], "labels": [True, False]},
    {"prompt": "the miller", "completions": ["counts sacks"], "labels": [True]},
]


def solutions(rows=ROWS, context: int = 256):
    documents = [Document(None, row, f"rows.jsonl:{n}") for n, row in enumerate(rows, 1)]
    return list(StepData(own(), context).read(documents))


def batch_of(rows=ROWS):
    batches = StepBatches([CountedSource("rows", solutions(rows))], batch=len(rows), seed=0, steps=1)
    places = sorted(batches.plan.rows(0))
    batches.plan.__dict__["rows"] = lambda step: places
    return batches.rows(0)


def trl_row(row, tokenizer, separator="\n"):
    """TRL's PRMTrainer.tokenize_row, recomputed: ids, and a label at the last token of every separator."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    after = tokenizer.encode(separator, add_special_tokens=False)
    steps = [tokenizer(one, add_special_tokens=False)["input_ids"] + after for one in row["completions"]]
    labels = [[-100] * (len(one) - 1) + [int(y)] for one, y in zip(steps, row["labels"], strict=True)]
    if tokenizer.bos_token_id is not None:
        prompt = [tokenizer.bos_token_id, *prompt]
    return [*prompt, *chain(*steps)], [-100] * len(prompt) + list(chain(*labels))


def test_tokens_loss_and_gradient_are_those_of_a_token_classifier_on_trls_rows(tmp_path):
    tokenizer = own()
    model = without_language_head(small_model(tokenizer))
    head = ScalarHead(model.config.width, seed=1, bias=True)
    with torch.no_grad():
        head.score.bias.fill_(0.3)
    save_reward_model(model, head, tmp_path, pad_id=tokenizer.pad_id, separator="\n")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__name__ == "Qwen3ForTokenClassification"
    features = [
        dict(
            zip(
                ("input_ids", "labels"),
                trl_row(row, transformers.AutoTokenizer.from_pretrained(tmp_path)),
                strict=True,
            )
        )
        for row in ROWS
    ]
    mine = batch_of()
    for one, other in zip(mine, features, strict=True):
        assert one.tokens.tolist() == other["input_ids"]
        labels = np.where(one.columns["step"] > 0, one.columns["label"], -100).astype(int)
        assert labels.tolist() == other["labels"]
    collator = transformers.DataCollatorForTokenClassification(
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    )
    loss = theirs.train()(**collator(features)).loss
    loss.backward()
    objective = StepCorrectness(head)
    found = objective.loss(model, collate(mine))
    (found.sum / objective.weight(mine)).backward()
    torch.testing.assert_close(found.sum / 6, loss, atol=1e-6, rtol=1e-6)
    named = dict(theirs.named_parameters())
    # Of the two rows only the difference counts, so each has the gradient of one of its sides.
    for sign, row in ((-1, 0), (1, 1)):
        torch.testing.assert_close(
            sign * named["score.weight"].grad[row], head.score.weight.grad[0], atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            sign * named["score.bias"].grad[row], head.score.bias.grad[0], atol=1e-6, rtol=1e-5
        )
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for stored in stored_tensors(model.config):
        torch.testing.assert_close(
            stored_form(stored, gradients), named[stored.name].grad, atol=1e-6, rtol=1e-5
        )
    # What the scorer reads from the folder is the classifier's probability of "right" at those places.
    scorer = ProcessScorer(tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([features[0]["input_ids"]])).logits[0].softmax(-1)[:, 1]
    places = [place for place, label in enumerate(features[0]["labels"]) if label >= 0]
    scores = scorer.step_scores([row["prompt"] for row in ROWS], [row["completions"] for row in ROWS])
    assert [len(one) for one in scores] == [3, 2, 1]
    assert scores[0] == pytest.approx(expected[places].tolist(), abs=1e-5)


def test_transformers_has_a_token_classifier_of_every_family_that_is_offered():
    from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as known

    from trivium.model.scalar_head import architecture_of

    assert {name: known[name] for name in WITH_TOKEN_CLASSIFIER} == {
        name: architecture_of(name, steps=True) for name in WITH_TOKEN_CLASSIFIER
    }
    with pytest.raises(TriviumError, match="olmo2"):
        architecture_of("olmo2", steps=True)


def test_soft_labels_micro_batches_and_unknown_steps():
    rows = [{**ROWS[0], "labels": [0.75, None, 0.25]}, ROWS[1]]
    model, head = without_language_head(small_model(own())), ScalarHead(32, seed=1, bias=True)
    objective, mine = StepCorrectness(head), batch_of(rows)
    assert objective.weight(mine) == 4
    whole = objective.loss(model, collate(mine)).sum
    apart = sum(objective.loss(model, collate([row])).sum for row in mine)
    torch.testing.assert_close(whole, apart)
    said = torch.tensor(np.concatenate([row.columns["label"][row.columns["step"] > 0] for row in mine]))
    assert said.tolist() == [0.75, 0.25, 1.0, 0.0]


def test_what_is_too_long_loses_its_last_steps_and_what_is_wrong_is_named():
    short = len(solutions()[0]) - 1
    assert len(solutions(context=short)[0].places) == 2
    assert len(solutions(ROWS[:1], context=short)[0]) < short
    for wrong, words in (
        ({**ROWS[0], "labels": [True]}, "3 `completions` and 1 `labels`"),
        ({**ROWS[0], "labels": [True, 2, True]}, "label 2"),
        ({"prompt": "a", "text": "b"}, "neither `prompt`"),
        ({"problem": "a", "steps": ["b"], "label": 1}, "label` 1"),
    ):
        with pytest.raises(TriviumError, match="rows.jsonl:1.*" + words):
            solutions([wrong])
    bench = {"problem": "a", "steps": ["b", "c", "d"], "label": 1}
    labels = labelled_steps(bench)[2]
    assert labels[:2] == [1.0, 0.0]
    assert np.isnan(labels[2])
    assert labelled_steps({**bench, "label": -1})[2] == [1.0, 1.0, 1.0]


def test_aggregations_and_the_measures_of_processbench():
    scores = [0.9, 0.5, 0.8]
    found = [aggregate(scores, how) for how in ("last", "min", "product", "mean")]
    assert found == pytest.approx([0.8, 0.5, 0.36, 2.2 / 3])
    assert aggregate([], "min") == 0.0
    measures = first_error_measures([-1, -1, 0, 2, 1, 1], [-1, 0, 0, 2, 1, -1])
    assert measures["accuracy_correct"].value == 0.5
    assert measures["accuracy_error"].value == 0.75
    assert measures["first-error F1"].value == pytest.approx(2 * 0.5 * 0.75 / 1.25)
    report = step_report([[0.9, 0.2], [0.8]], [[1.0, 0.0], [1.0]])
    assert report["first-error F1"]["value"] == 1.0
    assert report["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.2) / 3)
    # Whether a solution without a wrong step is right is not known where its end was cut off.
    cut = step_report([[0.9, 0.2], [0.8, 0.4]], [[1.0, 0.0], [1.0, 1.0]], cut=[True, True])
    assert (cut["solutions"], cut["cut_solutions"], cut["steps"]) == (2, 1, 4)
    assert cut["first-error F1"]["value"] == 1.0
    assert "accuracy_correct" not in cut


def test_a_solution_that_the_judge_cannot_read_counts_as_missed(tmp_path, monkeypatch):
    class Judge:
        separator = "\n"

        def step_scores(self, prompts, solutions):
            return [None if len(steps) > 2 else [0.9] * len(steps) for steps in solutions]

    rows = [{"prompt": "a", "completions": ["b"] * size, "labels": [True] * size} for size in (1, 2, 3, 4)]
    write_rows(tmp_path / "steps.jsonl", rows)
    monkeypatch.setattr(first_error, "ProcessScorer", lambda model: Judge())
    found = first_error.run_first_error(None, Settings(), "prm", str(tmp_path / "steps.jsonl"))
    assert [record.scores["found"] for record in found.records] == [1, 1, 0, 0]
    assert found.whole["accuracy_correct"].value == found.whole["read"].value == 0.5


def test_where_labels_do_not_tell_the_first_wrong_step_none_is_judged(tmp_path, monkeypatch):
    nan = float("nan")
    told = {(1, nan, 0): None, (1, 0, nan): 1, (1, nan): None, (nan, 0): None, (1, 1): -1, (0, nan): 0}
    assert {labels: first_error.first_wrong(labels) for labels in told} == told
    report = step_report([[0.9, 0.1, 0.2], [0.9, 0.2], [0.8, 0.9]], [[1, nan, 0], [1, 0], [1, nan]])
    assert (report["solutions"], report["partly_labelled_solutions"], report["steps"]) == (3, 2, 5)
    assert report["accuracy"]["value"] == report["first-error F1"]["value"] == 1.0
    assert "accuracy_correct" not in report
    assert "first-error F1" not in step_report([[0.9, 0.2]], [[nan, 1.0]])

    class Judge:
        separator = "\n"

        def step_scores(self, prompts, solutions):
            return [[0.9, 0.2, 0.9][: len(steps)] for steps in solutions]

    labels = [[True, None, False], [True, False, None], [True, None], [True]]
    rows = [{"prompt": "a", "completions": ["b"] * len(some), "labels": some} for some in labels]
    write_rows(tmp_path / "steps.jsonl", rows)
    monkeypatch.setattr(first_error, "ProcessScorer", lambda model: Judge())
    found = first_error.run_first_error(None, Settings(), "prm", str(tmp_path / "steps.jsonl"))
    assert [record.scores.get("found") for record in found.records] == [None, 1, None, 1]
    assert [record.scores["step accuracy"] for record in found.records] == [0.5, 1, 1, 1]
    assert [record.expected for record in found.records][:2] == ["not known", "step 2 is wrong"]
    assert found.whole["first-error F1"].value == found.whole["accuracy_error"].value == 1.0


def test_the_size_of_a_pass_changes_no_judgement(monkeypatch):
    model, head, chance = small_model(own()), ScalarHead(32, seed=0, bias=True), np.random.default_rng(0)
    solutions = []
    for number in range(9):
        places = np.cumsum(chance.integers(1, 5, chance.integers(1, 5)))
        tokens = chance.integers(0, 200, places[-1] + 1)
        labels = chance.integers(0, 2, len(places)).astype(float)
        solutions.append(StepSolution(str(number), tokens, places, labels))
    found = []
    for size in (4096, 30, 1):
        monkeypatch.setattr(stepwise, "PASS_TOKENS", size)
        found.append(judged_steps(model, head, [CountedSource("some", solutions)], "float32"))
    for one in found[1:]:
        assert one["accuracy"] == found[0]["accuracy"]
        assert one["calibration_error"] == pytest.approx(found[0]["calibration_error"], abs=1e-5)


def test_steps_after_the_first_error_may_be_left_out():
    nan = float("nan")
    told = {(1, 0, 0): [1, 0, nan], (1, 1): [1, 1], (0, 1): [0, nan], (nan, 1, 0, 1): [nan, 1, 0, nan]}
    for labels, expected in told.items():
        np.testing.assert_equal(up_to_first_error(labels), expected)


def test_exact_labels_hold_to_the_first_error():
    worked = ["3 + 4 = 7", "7 * 2 = 14"]
    assert labels_of_steps([*worked, "#### 14"], worked) == [1, 1, 1]
    assert labels_of_steps(["3 + 4 = 8", "8 * 2 = 16", "#### 16"], worked) == [0, 0, 0]
    assert labels_of_steps(["3 + 4 = 7", "7 + 2 = 9", "#### 9"]) == [1, 1, 1]
    assert labels_of_steps(["3 + 4 = 7", "7 + 2 = 8", "8 + 1 = 9"]) == [1, 0, 0]
    assert labels_of_steps(["3 + 4 = 7", "7 + 2 = 9", "#### 9"], worked) == [1, 0, 0]
    assert labels_of_steps(["3 + 4 = 7", "#### 7"], worked) == [1, 0]
    assert split_steps("a\n\nb\n") == ["a", "b"]


@pytest.mark.slow
def test_a_recipe_trains_measures_scores_and_rewards_with_it(tmp_path):
    save(tmp_path / "base", small_model(own()), own())
    rows = [
        {
            "prompt": f"{n} and {n}",
            "completions": ["the river", "345" if n % 2 else "12"],
            "labels": [True, n % 2 == 0],
        }
        for n in range(12)
    ]
    write_rows(tmp_path / "steps.jsonl", rows)
    (tmp_path / "prm.yaml").write_text(
        "name: prm\nstages:\n"
        "  prm: {kind: reward, steps: true, from: ./base, data: {./steps.jsonl: {validation: 0.3}}, "
        "test: ./steps.jsonl, pairs: 4, epochs: 25, learning_rate: 1e-2}\n"
        "  more: {kind: reward, process: true, from: prm, data: ./steps.jsonl, pairs: 4, steps: 2}\n"
        "  asked: {kind: evaluate, from: ./base, "
        "on: [{task: first_error, data: ./steps.jsonl, model: prm}]}\n"
    )
    run = trivium.run(tmp_path / "prm.yaml", runs=tmp_path / "runs")
    summary = run["prm"].summary
    assert summary["test"]["first-error F1"]["value"] == 1.0
    assert summary["test"]["solutions"] == 12
    assert summary["unseen"]["solutions"] + summary["data"]["./steps.jsonl"]["learned_from"] == 12
    assert {"loss", "accuracy", "mean_reward"} <= set(run["prm"].metrics[0])
    assert run["asked"].summary["first_error: first-error F1"]["value"] == 1.0
    folder = run["prm"].folder / "model"
    reward = combine([{"name": "learned", "model": str(folder), "called": "prm", "aggregate": "last"}])
    (values,) = reward.parts(prompts=["8 and 8"] * 2, completions=["the river\n12", "the river\n345"])
    assert values[0] > 0.5 > values[1]
    _, head = load_reward_model(run["more"].folder / "model")
    assert head.score.bias is not None
    for wrong, words in (
        ("{kind: reward, from: prm, data: ./steps.jsonl}", "chosen|steps: true"),
        ("{kind: reward, steps: true, from: ./base, data: ./pairs.jsonl}", "completions"),
    ):
        write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
        text = (tmp_path / "prm.yaml").read_text().splitlines()[:3]
        (tmp_path / "bad.yaml").write_text("\n".join([*text, f"  bad: {wrong}"]))
        with pytest.raises(TriviumError, match=words):
            trivium.run(tmp_path / "bad.yaml", runs=tmp_path / "runs")
