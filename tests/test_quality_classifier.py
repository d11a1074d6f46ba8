"""The quality classifier: fitted, calibrated, judged on texts it has not seen, and its control."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from curating import rows, write_lines
from fake_endpoint import FakeEndpoint, serving
from generating import tiny_model, tokenizer
from synthesizing import QUICK

import trivium
from trivium import world
from trivium.cli import main
from trivium.curate.classifier import Classifier, _language_model, auc, report, train
from trivium.kit.errors import TriviumError
from trivium.model.folder import save_model
from trivium.stages import quality_classifier

FORK = multiprocessing.get_context("fork")
SETTINGS = {"features": "ngrams", "buckets": 1 << 14, "sizes": (1, 2), "penalty": 1e-5}


def labelled(count: int) -> list[dict[str, object]]:
    """Pages of the web, good (5) or dirt (0)."""
    return [
        {"text": page.text, "score": 0 if page.truth["label"] in ("spam", "noise", "language") else 5}
        for page in world.documents("web", limit=count)
    ]


def test_area_under_the_curve_is_that_of_all_pairs() -> None:
    chance = np.random.default_rng(0)
    scores, good = chance.integers(0, 6, 80), chance.random(80) < 0.3
    pairs = [(one > other) + (one == other) / 2 for one in scores[good] for other in scores[~good]]
    assert auc(scores, good) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(scores, np.ones(80, dtype=bool)))


def test_dirt_is_told_from_good_pages_and_shuffled_labels_teach_nothing() -> None:
    pages = labelled(1200)
    texts = [str(page["text"]) for page in pages]
    targets = np.array([float(page["score"] == 5) for page in pages])
    found = train(texts[:800], targets[:800], **SETTINGS)
    assert auc(found.raw(texts[800:]), targets[800:] > 0) >= 0.95
    wrong = targets[:800].copy()
    random.Random(1).shuffle(wrong)
    control = train(texts[:800], wrong, **SETTINGS)
    assert abs(auc(control.raw(texts[800:]), targets[800:] > 0) - 0.5) < 0.2


def test_calibration_finds_slope_and_offset_wherever_scores_lie() -> None:
    raw = np.linspace(3, 7, 400)
    found = Classifier("ngrams", torch.zeros(1 << 10), 0.0)
    found.calibrate(raw, 1 / (1 + np.exp(-2 * (raw - 5))))
    assert (found.slope, found.offset) == pytest.approx((2, -10), rel=0.02)


def test_calibrated_scores_are_probabilities(tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    # Words that make a text good with known odds.
    texts, targets = [], []
    for _ in range(4000):
        count = int(chance.integers(0, 5))
        texts.append(" ".join(["good"] * count + ["plain"] * (4 - count)))
        targets.append(float(chance.random() < (0.1, 0.3, 0.5, 0.7, 0.9)[count]))
    goals = np.array(targets)
    found = train(texts[:1500], goals[:1500], **SETTINGS)
    found.calibrate(found.raw(texts[1500:2500]), goals[1500:2500])
    scores = found.scores(texts[2500:])
    facts = report(texts[2500:], texts[2500:], scores, goals[2500:])
    assert facts["calibration_error"] < 0.05
    assert 0 <= scores.min() <= scores.max() <= 1
    assert len(facts["disagreements"]) == 20
    kept = [row["kept"] for row in facts["thresholds"]]
    assert kept == sorted(kept, reverse=True)
    found.save(tmp_path)
    assert np.array_equal(Classifier.load(tmp_path).scores(texts[:50]), found.scores(texts[:50]))


RECIPE = """
name: rated
seed: 1
stages:
  judge: {kind: quality_classifier, data: ./labelled.jsonl, buckets: 16384}
  web:
    kind: curate
    data: {path: world:web, limit: 200}
    steps: [{language: {keep: [en]}}, {quality: {classifier: judge, keep: 0.5}}]
"""


def test_a_recipe_keeps_the_better_half_and_the_page_shows_why(tmp_path: Path) -> None:
    write_lines(tmp_path / "labelled.jsonl", labelled(300))
    (tmp_path / "r.yaml").write_text(RECIPE)
    trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")
    folder = tmp_path / "runs" / "rated"
    kept, dropped = rows(folder / "web" / "data"), rows(folder / "web" / "dropped")
    worse = [row for row in dropped if row["step"] == "quality"]
    assert abs(len(kept) - len(worse)) <= 1
    bound = min(row["quality"] for row in kept)
    assert all(float(row["reason"].rpartition(" ")[2]) <= bound + 0.001 for row in worse)
    facts = json.loads((folder / "judge" / "classifier" / "report.json").read_text())
    page = (folder / "report.html").read_text()
    assert f"{facts['documents']} held-out texts" in page
    assert f"{len(kept)} of 200 documents are kept" in page
    assert "quality: low quality" in page
    assert sum(row["id"] in page for row in worse) >= 20


def test_rules_see_what_the_rules_before_them_made_of_a_text() -> None:
    text = "Some one wrote to jane@example.org\n" + "a plain line of text\n" * 4
    # Masked it is nine characters shorter.
    rules: list = ["mask", {"filters": {"preset": "code", "rules": {"characters": [len(text) - 4, 1000]}}}]
    assert quality_classifier._kept_by(rules, [text]) == [False]
    assert quality_classifier._kept_by(rules[1:], [text]) == [True]


@pytest.mark.parametrize("step", [{"deduplicate": "exact"}, "extract", {"decontaminate": "world:facts"}])
def test_rules_that_need_more_than_a_text_are_refused(step: object) -> None:
    with pytest.raises(ValueError, match="judge one text by itself"):
        quality_classifier.QualityClassifier(
            kind="quality_classifier", data=["./pages.jsonl"], labels="rules", rules=[step]
        )


def test_labels_that_teach_nothing_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    for pages, words in (
        ([{"text": f"text {number}", "score": 1} for number in range(50)], "every text has the label 1"),
        ([{"text": "one", "rating": 3}], "needs a `text` and a number as `score`, not None"),
        (
            [{"text": f"text {number}", "score": number % 2} for number in range(5)],
            "5 labelled texts are too few",
        ),
    ):
        write_lines(tmp_path / "labelled.jsonl", pages)
        with pytest.raises(TriviumError, match="judge") as error:
            trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs", only=["judge"])
        assert words in str(error.value)


def useful(text: str) -> int:
    """What the judge of these tests thinks of a text: a point for each number in it, five at most."""
    return min(5, sum(word.isdigit() for word in text.split()))


def between_the_lines(prompt: str) -> str:
    return prompt.split("\n-----\n")[1]


def says(prompt: str, seed: int) -> str:
    return f"I read it. Score: {useful(between_the_lines(prompt))}"


def pages_with_numbers(count: int, known: int = 0) -> list[dict[str, object]]:
    chance = random.Random(4)
    found: list[dict[str, object]] = []
    for place in range(count):
        words = [chance.choice(["river", "mill", "7", "12"]) for _ in range(chance.randint(1, 8))]
        text = f"{place} " + " ".join(words) if place % 2 else f"page{place} the river and the mill"
        found.append({"text": text} | ({"score": useful(text)} if place < known else {}))
    return found


def judged(folder: Path, endpoint: str, documents: list[dict[str, object]], **settings: object) -> Path:
    """A recipe whose classifier learns from a judge's labels and has it decide around the bound."""
    write_lines(folder / "pages.jsonl", documents)
    there = {"endpoint": {"url": endpoint, "model": "fake", **QUICK}}
    stages = {
        "judge": {
            "kind": "quality_classifier", "data": "./pages.jsonl", "buckets": 4096,
            "labels": {"judge": {**there, "rows": 150, **settings}},
        },
        "web": {
            "kind": "curate", "data": "./pages.jsonl",
            "steps": [{"quality": {"classifier": "judge", "keep": 0.5, "rejudge": {**there, "band": 0.3}}}],
        },
    }  # fmt: skip
    place = folder / "r.yaml"
    place.write_text(yaml.safe_dump({"name": "rated", "seed": 1, "stages": stages}, sort_keys=False))
    return place


@pytest.mark.slow
def test_a_judge_labels_and_decides_where_the_classifier_is_unsure(tmp_path: Path) -> None:
    documents = pages_with_numbers(200, known=80)
    with serving(FakeEndpoint(answer=says)) as fake:
        place = judged(tmp_path, fake.url, documents)
        trivium.run(place, runs=tmp_path / "runs")
        folder = tmp_path / "runs" / "rated"
        facts = json.loads((folder / "judge" / "classifier" / "report.json").read_text())
        assert facts["judge"]["labelled"] == 150
        assert facts["judge"]["calibration"]["accuracy"]["value"] == 1
        assert len(facts["disagreements"]) == min(20, facts["documents"])
        assert all(one["label"] == useful(one["text"]) / 5 for one in facts["disagreements"])
        kept, dropped = rows(folder / "web" / "data"), rows(folder / "web" / "dropped")
        assert (len(kept), len(dropped)) == (100, 100)
        read = [row for row in kept if row["judged"] is not None]
        refused = [row for row in dropped if row["reason"].startswith("judged low: ")]
        assert len(read) + len(refused) == 60
        assert all(row["judged"] == useful(row["text"]) for row in read)
        # Within the band the judge decides.
        worst = min(row["judged"] for row in read)
        assert max(int(row["reason"].split()[2]) for row in refused) <= worst
        decided = json.loads((folder / "web" / "funnel.json").read_text())["decisions"]["01"]
        assert decided["judged"] == 60
        assert decided["kept by the judge alone"] == decided["left out by the judge alone"]
        page = (folder / "report.html").read_text()
        for words in ("labels from a judge", "ranks 40 pairs of known score", "kept by the judge alone"):
            assert words in page
        # What was asked for the labels is known when the band is read, and nothing is asked twice.
        assert set(fake.delivered.values()) == {1}
        # Another share asks about those alone that it had not read.
        place.write_text(place.read_text().replace("keep: 0.5", "keep: 0.6"))
        trivium.run(place, runs=tmp_path / "runs")
        assert set(fake.delivered.values()) == {1}


def test_the_plan_says_what_a_judge_costs_at_most(tmp_path: Path, capsys: Any) -> None:
    place = judged(tmp_path, "http://127.0.0.1:9/v1", pages_with_numbers(200, known=80), max_new_tokens=50)
    main(["plan", str(place), "--runs", str(tmp_path / "runs")])
    said = {
        line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines() if "requests" in line
    }
    # Of 200 documents 150 are labelled and 80 try the judge; of all of them 30 % lie around the bound.
    assert "requests 200," in said["judge"]
    assert "requests 60," in said["web"]
    with serving(FakeEndpoint(answer=says)) as fake:
        place.write_text(place.read_text().replace("http://127.0.0.1:9/v1", fake.url))
        trivium.run(place, runs=tmp_path / "runs", only=["judge"])
        assert 150 <= sum(fake.delivered.values()) <= 200


def test_a_judge_that_contradicts_known_scores_is_refused(tmp_path: Path) -> None:
    wrong = lambda prompt, seed: f"Score: {5 - useful(between_the_lines(prompt))}"
    with serving(FakeEndpoint(answer=wrong)) as fake:
        place = judged(tmp_path, fake.url, pages_with_numbers(120, known=80))
        with pytest.raises(
            TriviumError, match=r"The judge fake at .* is refused: accuracy 0.00 is below 0.7"
        ):
            trivium.run(place, runs=tmp_path / "runs")
    with serving(FakeEndpoint(answer=lambda prompt, seed: "It is a complete sentence.")) as fake:
        place = judged(tmp_path, fake.url, pages_with_numbers(120, known=80))
        with pytest.raises(TriviumError, match=r"accuracy 0.50 is below 0.7 .* no score for 80 of the texts"):
            trivium.run(place, runs=tmp_path / "runs")


def test_a_judge_of_our_own_engine_whose_words_are_no_score_leaves_too_few_labels(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "teacher")
    tokenizer().save(tmp_path / "teacher")
    write_lines(tmp_path / "pages.jsonl", pages_with_numbers(30))
    how = "{judge: {model: ./teacher, rows: 25, characters: 20, max_new_tokens: 4, rubric: short}}"
    stage = f"{{kind: quality_classifier, data: ./pages.jsonl, labels: {how}}}"
    (tmp_path / "r.yaml").write_text(f"name: rated\nstages:\n  judge: {stage}\n")
    with pytest.raises(TriviumError, match="0 labelled texts are too few"):
        trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")
    [journal] = (tmp_path / "runs" / "store").glob("*/checkpoints/answers.jsonl")
    assert len(journal.read_text().splitlines()) == 25


@pytest.mark.slow
def test_where_a_judge_of_our_own_says_nothing_the_classifier_decides(tmp_path: Path, capsys: Any) -> None:
    save_model(tiny_model(), tmp_path / "teacher")
    tokenizer().save(tmp_path / "teacher")
    write_lines(tmp_path / "labelled.jsonl", labelled(120))
    kept = []
    for again in (
        None,
        {"model": "./teacher", "band": 0.1, "characters": 20, "max_new_tokens": 2, "rubric": "short"},
    ):
        recipe = yaml.safe_load(RECIPE)
        recipe["stages"]["web"]["steps"] = [
            {"quality": {"classifier": "judge", "keep": 0.5, "rejudge": again}}
        ]
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        stage = trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs")["web"].folder
        kept.append([row["id"] for row in rows(stage / "data")])
    decided = json.loads((stage / "funnel.json").read_text())["decisions"]["01"]
    assert decided["judged"] == decided["without a score"] == 20
    # Copies are read once.
    assert 0 < decided["requests"] <= 20
    assert kept[0] == kept[1]
    assert "20 documents judged again by ./teacher, 20 of them without a score" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.slow
def test_a_killed_curation_asks_about_nothing_twice(tmp_path: Path) -> None:
    write_lines(tmp_path / "labelled.jsonl", labelled(120))
    with serving(FakeEndpoint(answer=says, delay=0.02)) as fake:
        again = {"endpoint": {"url": fake.url, "model": "fake", **QUICK}, "band": 0.8}
        recipe = yaml.safe_load(RECIPE)
        recipe["stages"]["web"]["steps"] = [
            {"quality": {"classifier": "judge", "keep": 0.5, "rejudge": again}}
        ]
        place = tmp_path / "r.yaml"
        place.write_text(yaml.safe_dump(recipe, sort_keys=False))
        runs = tmp_path / "runs"
        trivium.run(place, runs=runs, only=["judge"])
        process = FORK.Process(target=run_whole, args=(place, runs))
        process.start()
        while len(fake.delivered) < 20:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        in_flight = set(fake.open)
        process.join()
        time.sleep(0.1)
        [journal] = (runs / "store").glob("*/checkpoints/step-01/answers.jsonl")
        known = [line for line in journal.read_text().splitlines() if '"what": "answer"' in line]
        assert len(known) >= 20 - QUICK["concurrency"]
        trivium.run(place, runs=runs)
        twice = {prompt for prompt, count in fake.delivered.items() if count > 1}
        # Delivered in the moment of the kill is in flight, too.
        assert len(twice) <= QUICK["concurrency"] + len(in_flight) < len(known)
        decided = json.loads((runs / "rated" / "web" / "funnel.json").read_text())["decisions"]["01"]
        # Pages that are copies of another are read once.
        assert 20 < len(fake.delivered) <= decided["judged"]


def run_whole(place: Path, runs: Path) -> None:
    trivium.run(place, runs=runs)
    os._exit(0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"judge": {"rows": 5}}, "a judge is a `model` or an `endpoint`"),
        ({"judges": {}}, "did you mean `judge`"),
        ({"judge": {"model": "m", "scale": [3, 3]}}, "the lowest score, then the highest"),
        ({"judge": {"model": "m", "rubrik": "x"}}, "did you mean `rubric`"),
    ],
)
def test_a_judge_that_is_written_wrong_is_named(tmp_path: Path, how: dict, words: str) -> None:
    write_lines(tmp_path / "labelled.jsonl", labelled(30))
    recipe = yaml.safe_load(RECIPE)
    recipe["stages"]["judge"]["labels"] = how
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(TriviumError, match=words):
        trivium.run(tmp_path / "r.yaml", runs=tmp_path / "runs", only=["judge"])


def test_a_model_kept_in_half_the_precision_is_read_in_whole(tmp_path):
    """Its hidden states are the features that the weights were fitted to."""
    save_model(tiny_model().bfloat16(), tmp_path / "model")
    tokenizer().save(tmp_path / "model")
    model, _ = _language_model(str(tmp_path / "model"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
