"""The quality classifier: fitted, calibrated, judged on texts it has not seen, and its control."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from curating import rows, write_lines

import trivium
from trivium import world
from trivium.curate.classifier import Classifier, auc, report, train
from trivium.kit.errors import TriviumError

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
