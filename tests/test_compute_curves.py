"""What the same FLOPs reach: curves over all that an arm spent, and the price of a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import trivium
from trivium.lab.compute_curves import drawn, reached, summary


def test_the_price_of_a_value_lies_between_two_measurements() -> None:
    points = [[1e9, 3.0], [2e9, 2.0], [3e9, 2.5], [5e9, 1.0]]
    assert reached(points, 2.5) == pytest.approx(1.5e9)
    assert reached(points, 2.0) == pytest.approx(2e9)
    assert reached(points, 1.75) == pytest.approx(3e9 + 2e9 * 0.5)
    assert reached(points, 0.9) is None
    assert reached(points, 4.0) == 1e9


def test_two_targets_lie_between_the_ends_of_the_arms() -> None:
    curves = {"small": [[[1.0, 3.0], [2.0, 2.0]]], "large": [[[1.0, 4.0], [4.0, 1.0]]]}
    found = summary(curves, [], "bits_per_byte")
    assert [one["target"] for one in found["targets"]] == [2.0, 1.5]
    assert found["targets"][0]["flops"] == {"small": [2.0], "large": [3.0]}
    assert found["targets"][1]["flops"]["small"] == [None]
    shown = drawn(found)
    assert [panel.title for panel in shown["panels"]] == ["small", "large"]
    assert ["1.5", "small", "not reached", "–"] in shown["table"].rows


RECIPE = """\
name: price
stages:
  words: {kind: tokenizer, data: ./texts.jsonl, vocabulary: 272}
  corpus: {kind: corpus, data: ./texts.jsonl, tokenizer: words, validation: 0.2}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32, heads: 2, head_width: 16}, context: 32,
         batch: 128, steps: 6, validation: {times: 3}}
  more: {kind: midtrain, from: base, data: corpus, batch: 128, steps: 4, validation: {times: 2}}
experiment:
  seeds: 1
  arms: {narrow: {}, wide: {base: {model: {width: 64}}}}
  measure: {bits: {stage: more, take: bits_per_byte}}
  claims: [{says: wider is better, on: bits, arm: wide, against: narrow, below: 0, control: narrow}]
  compute: {stages: [base, more], targets: [9.0, 0.1]}
"""


def test_an_experiment_draws_what_its_arms_reach(tmp_path: Path) -> None:
    sums = [f"{one} and {other} make {one + other}." for one in range(12) for other in range(9)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sums))
    (tmp_path / "price.yaml").write_text(RECIPE)
    trivium.run(tmp_path / "price.yaml", runs=tmp_path / "runs")
    place = next((tmp_path / "runs").rglob("experiment.json"))
    found: dict[str, Any] = json.loads(place.read_text())
    narrow, wide = (found["compute"]["arms"][arm][0] for arm in ("narrow", "wide"))
    assert len(narrow) == len(wide) == 5
    assert [point[0] for point in narrow] == sorted(point[0] for point in narrow)
    # The curve ends where the cost table does: at the FLOPs of all stages, but for what measuring took.
    assert narrow[-1][0] <= found["arms"]["narrow"]["flops"] < 4 * narrow[-1][0]
    assert wide[-1][0] > 1.5 * narrow[-1][0]
    assert found["compute"]["targets"][0]["flops"]["narrow"] == [narrow[0][0]]
    assert found["compute"]["targets"][1]["flops"]["wide"] == [None]
    page = place.with_suffix(".html").read_text()
    assert "What the same FLOPs reach" in page
    assert "not reached" in page
