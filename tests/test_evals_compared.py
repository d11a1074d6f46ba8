"""Results of evaluations: kept on disk, estimated, and compared item by item."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluating import asked

from trivium.evals.evaluate import compare, comparison_table, line_of
from trivium.evals.results import Record, Results, TaskResult, answers_path, estimate
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json


def test_results_survive_the_disk_with_every_answer(tmp_path: Path):
    results = asked(["facts", "calibration", "bits?sources=prose+sums"], limit=20)
    results.save(tmp_path / "out.json")
    lines = [json.loads(line) for line in answers_path(tmp_path / "out.json").read_text().splitlines()]
    assert len(lines) == sum(len(one.records) for one in results.tasks.values())
    back = Results.load(tmp_path / "out.json")
    assert back.summary() == results.summary()
    measures = read_json(tmp_path / "out.json")["tasks"]["facts"]["measures"]
    assert set(measures["accuracy"]) == {"value", "low", "high", "n"}
    assert measures["accuracy"]["n"] == 20
    apart = [
        one.scores["confidence"] - one.scores["multiple-choice accuracy"]
        for one in results.tasks["calibration"].records
    ]
    surer = back.tasks["calibration"].whole["overconfidence"]
    assert surer.value == pytest.approx(sum(apart) / 20)
    assert -1 < surer.low < surer.value < surer.high < 1
    answers_path(tmp_path / "out.json").unlink()
    with pytest.raises(TriviumError, match=r"answers\.jsonl is missing"):
        Results.load(tmp_path / "out.json")


def results_of(scores, metric="accuracy", expected="x", **facts):
    records = [Record(f"q{n}", "?", expected, (), {metric: one}, **facts) for n, one in enumerate(scores)]
    return Results("m", {"t": TaskResult("t", "", (metric,), records, "chat")})


def test_models_are_compared_item_by_item_and_corrected():
    worse, better = [0.0] * 40, [1.0] * 20 + [0.0] * 20
    (one,) = compare(results_of(worse), results_of(better))
    assert one.better is True
    assert (one.before, one.after) == (0.0, 0.5)
    (same,) = compare(results_of(better), results_of(better))
    assert same.better is None
    assert same.corrected == 1
    (less,) = compare(results_of(worse, "bits per byte"), results_of(better, "bits per byte"))
    assert less.better is False
    assert comparison_table([one])[1][-1] == "better"
    many = Results("m", {f"t{n}": results_of(worse).tasks["t"] for n in range(5)})
    other = Results("m", {f"t{n}": results_of([1.0] * 7 + [0.0] * 33).tasks["t"] for n in range(5)})
    corrected = compare(many, other)
    assert all(one.corrected == pytest.approx(min(1, 5 * one.difference.p_value)) for one in corrected)


def test_only_the_same_items_are_compared():
    with pytest.raises(TriviumError, match="different items"):
        compare(results_of([1.0] * 4), results_of([1.0] * 5))
    with pytest.raises(TriviumError, match="expects different answers"):
        compare(results_of([1.0] * 4), results_of([1.0] * 4, expected="y"))
    with pytest.raises(TriviumError, match="no task in common"):
        compare(results_of([1.0]), Results("m", {}))


def test_a_single_item_has_no_interval_and_the_line_says_so():
    """It was (-inf to inf)."""
    one = Record("a", "", "", (), {"bits per byte": 2.0}, {"bits per byte": 30.0})
    assert "bits per byte 2 (interval unknown)" in line_of(
        "bits", TaskResult("bits", "", ("bits per byte",), [one], "chat")
    )


def test_documents_count_by_their_bytes_and_people_are_drawn_together():
    records = [
        Record("a", "", "", (), {"bits per byte": 1.0}, {"bits per byte": 30.0}),
        Record("b", "", "", (), {"bits per byte": 5.0}, {"bits per byte": 10.0}),
    ]
    assert estimate(records, "bits per byte").value == pytest.approx(2.0)
    single = [Record(f"{n}", "", "", (), {"accuracy": float(n % 2)}) for n in range(64)]
    shared = [replace(one, cluster=f"{int(one.id) % 8}") for one in single]
    assert estimate(shared, "accuracy").high - estimate(shared, "accuracy").low > (
        1.5 * (estimate(single, "accuracy").high - estimate(single, "accuracy").low)
    )
    alike = [replace(one, scores={"accuracy": 1.0}) for one in shared]
    assert estimate(alike, "accuracy").low < 0.7, "eight people who are all known prove little"


@pytest.mark.slow
def test_a_model_against_an_equal_one_shows_no_difference_in_any_task():
    """Two hundred comparisons over a proportion of shared people, a plain proportion and bits per byte."""

    def answered(random, known, easy, hard):
        def right(share):
            return {"accuracy": float(random.random() < share)}

        facts = [Record(f"{n}", "", "", (), right(known[n % 30]), {}, f"{n % 30}") for n in range(90)]
        sums = [Record(f"{n}", "", "", (), right(share)) for n, share in enumerate(easy)]
        bits = [
            Record(f"{n}", "", "", (), {"bits": one + random.normal(0, 0.1)}, {"bits": 50.0 + n})
            for n, one in enumerate(hard)
        ]
        tasks = {
            "facts": TaskResult("facts", "", ("accuracy",), facts, "chat"),
            "sums": TaskResult("sums", "", ("accuracy",), sums, "chat"),
            "bits": TaskResult("bits", "", ("bits",), bits, "chat"),
        }
        return Results("m", tasks)

    calls = 0
    for repeat in range(200):
        random = np.random.default_rng(repeat)
        skills = random.random(30), random.random(80), random.normal(2.0, 0.5, 80)
        found = compare(answered(random, *skills), answered(random, *skills), seed=repeat)
        calls += any(one.better is not None for one in found)
    assert calls / 200 <= 0.07
