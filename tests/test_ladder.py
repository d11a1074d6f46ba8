"""A scaling ladder: its law, its interval, and that both are written before the next size is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trivium.cli import main
from trivium.evals import scaling
from trivium.evals.scaling import PowerLaw, fit, forecast
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.lab import ladder
from trivium.pipeline.run import prepare
from trivium.recipe import graph
from trivium.recipe.schema import load

RECIPE = """\
name: rungs
seed: 1
stages:
  words: {kind: tokenizer, vocabulary: 300, data: {path: world:prose, limit: 100}}
  corpus: {kind: corpus, tokenizer: words, data: {path: world:prose, limit: 200}}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32}, context: 64, batch: 256, tokens: 4k}
experiment:
  seeds: 1
  ladder: [depth 1, 2, 3]
"""


def written(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "rungs.yaml"
    path.write_text(text)
    return path


def test_the_law_behind_the_losses_is_found() -> None:
    flops = [1e12, 3e12, 1e13, 3e13, 1e14]
    true = PowerLaw(1.7, 400.0, 0.2)
    found = fit(flops, [true.at(one) for one in flops])
    assert found.at(1e15) == pytest.approx(true.at(1e15), rel=0.005)
    assert found.floor == pytest.approx(1.7, abs=0.05)


def test_three_sizes_have_no_floor() -> None:
    found = fit([1e12, 1e13, 1e14], [3.0, 2.4, 2.0])
    slope, start = np.polyfit(np.log([1e12, 1e13, 1e14]), np.log([3.0, 2.4, 2.0]), 1)
    assert found.floor == 0
    assert found.at(1e15) == pytest.approx(float(np.exp(start + slope * np.log(1e15))))


@pytest.mark.parametrize(("floor", "power"), [(0.0, 0.1), (0.6, 0.3)])
def test_the_interval_covers_what_comes(monkeypatch: pytest.MonkeyPatch, floor: float, power: float) -> None:
    # Three sizes fit no floor, so where there is one the law of the first sizes bends.
    monkeypatch.setattr(scaling, "RESAMPLES", 30)
    random, law, inside = np.random.default_rng(0), PowerLaw(floor, 30.0 if not floor else 3000.0, power), 0
    for seed in range(100):
        rungs = [
            [(flops, law.at(flops) + random.normal(0, 0.01)) for _ in range(3)]
            for flops in (1e12, 4e12, 16e12)
        ]
        low, high = forecast(rungs, seed).interval(64e12)
        inside += low <= law.at(64e12) + random.normal(0, 0.01) <= high
    assert 0.91 <= inside / 100 <= 0.99


def test_sizes_that_spent_the_same_forecast_nothing() -> None:
    with pytest.raises(TriviumError, match="sizes that differ"):
        forecast([[(1e12, 2.0)], [(1e12, 1.9)], [(1e12, 1.8)]])


def test_the_next_size_waits_for_the_forecast(tmp_path: Path) -> None:
    prepared = prepare(written(tmp_path, RECIPE.replace("seeds: 1", "seeds: 2")), tmp_path / "runs")
    order = list(prepared.nodes)
    trained = [f"base.depth-{depth}.{seed}" for depth in (2, 3) for seed in (1, 2)]
    next_size = ["base.depth-4.1", "base.depth-4.2"]
    assert {"base.1", "base.2", *trained} == {
        name for rung in prepared.nodes["forecast"].stage.of for name in rung
    }
    assert max(map(order.index, trained)) < order.index("forecast") < min(map(order.index, next_size))
    assert "forecast" in graph.needed(prepared.nodes, ["base.depth-4.2"])
    # What it says decides nothing of the next size: the same stage elsewhere is the same result.
    plain = RECIPE.replace("depth: 1", "depth: 4").partition("experiment:")[0]
    alone = prepare(written(tmp_path, plain), tmp_path / "runs")
    assert alone.nodes["base"].fingerprint == prepared.nodes["base.depth-4.1"].fingerprint


def test_a_ladder_is_climbed_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(written(tmp_path)), "--runs", str(tmp_path / "runs")]) in (0, None)
    said = capsys.readouterr().out
    found = read_json(tmp_path / "runs" / "rungs" / "experiment.json")["ladder"]
    assert [len(rung) for rung in found["rungs"]] == [1, 1, 1]
    assert found["written_before"]
    assert found["low"] <= found["forecast"] <= found["high"]
    assert found["runs"][0]["flops"] > found["rungs"][-1][0][0]
    assert found["verdict"] in said
    assert found["verdict"] in (tmp_path / "runs" / "rungs" / "experiment.html").read_text().lower()


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.8, 1.9, ladder.HOLDS), (1.6, 1.7, ladder.MISSED), (1.8, 2.1, ladder.VAGUE)],
)
def test_a_verdict_needs_more_than_no_change(low: float, high: float, verdict: str) -> None:
    assert ladder.judged(value=1.85, low=low, high=high, unchanged=2.0) == verdict


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("[depth 1, 2, 3]", "{depths: [1, 2, 3], tokens: [1k, 2k, 3k]}", "needs 4 numbers"),
        ("[depth 1, 2, 3]", "[1, 3, 2]", "rise"),
        ("[depth 1, 2, 3]", "[1, 2]", "ladder"),
        ("[depth 1, 2, 3]", "{depths: [1, 2, 3], stage: bas}", "`stage` to train; one of base"),
        ("  base: {", "  forecast: {", "adds a stage `forecast`"),
        ("  seeds: 1\n", "  seeds: 1\n  arms: {a: {}, b: {}}\n", "makes the arms itself"),
        ("  ladder: [depth 1, 2, 3]\n", "", "or a `ladder`"),
    ],
)
def test_what_cannot_be_a_ladder(tmp_path: Path, before: str, after: str, complaint: str) -> None:
    with pytest.raises(TriviumError, match=complaint):
        load(written(tmp_path, RECIPE.replace(before, after)))
