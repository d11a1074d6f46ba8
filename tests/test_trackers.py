"""Metrics sent on: one setting, any tracker, never a fingerprint, and training outlives them."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import toys

from trivium.kit import trackers
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.trackers import Tracked, tracking
from trivium.pipeline.run import prepare, run


class FakeRun:
    """What `wandb.init` and `trackio.init` give."""

    def __init__(self, told: dict[str, Any], breaks_at: int | None = None) -> None:
        self.told, self.breaks_at = told, breaks_at
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step == self.breaks_at:
            raise ConnectionError("the network is gone")
        self.rows.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


def fake(monkeypatch: pytest.MonkeyPatch, package: str, breaks_at: int | None = None) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**told: Any) -> FakeRun:
        runs.append(FakeRun(told, breaks_at))
        return runs[-1]

    module = ModuleType(package)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == package or None)
    return runs


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_every_number_of_every_stage_arrives(monkeypatch, tmp_path, package):
    sent = fake(monkeypatch, package)
    prepared = run(toys.write_recipe(tmp_path), tmp_path / "runs", {"track": package})
    assert [one.told["name"] for one in sent] == [
        prepared.entry(name).folder.name for name in ("base", "left", "right")
    ]
    base = sent[0]
    assert base.told["project"] == "toy"
    assert base.told["resume"] == "allow"
    assert base.told["config"]["model"] == {"depth": 2, "width": None}
    rows = read_metrics(prepared.entry("base").folder / "metrics.jsonl")
    assert base.rows == [(row["step"], {"tokens": row["tokens"], "loss": row["loss"]}) for row in rows]
    assert all(one.finished for one in sent)


def test_where_numbers_go_is_not_what_a_stage_is(monkeypatch, tmp_path):
    path = toys.write_recipe(tmp_path)
    without = run(path, tmp_path / "runs")
    fake(monkeypatch, "wandb")
    assert {name: node.fingerprint for name, node in without.nodes.items()} == {
        name: node.fingerprint
        for name, node in prepare(path, tmp_path / "runs", {"track": ["wandb"]}).nodes.items()
    }
    assert set(run(path, tmp_path / "runs", {"track": "wandb"}).became.values()) == {"reused"}


def test_a_missing_package_or_an_unknown_name_is_said_before_anything_runs(monkeypatch, tmp_path):
    path = toys.write_recipe(tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(TriviumError, match="trackio is not installed; pip install"):
        run(path, tmp_path / "runs", {"track": "trackio"})
    with pytest.raises(TriviumError, match=r"track\.0 cannot be 'wundb'"):
        run(path, tmp_path / "runs", {"track": "wundb"})
    assert not list((tmp_path / "runs").glob("store/base-*"))


def test_training_outlives_a_tracker(monkeypatch, tmp_path, capsys):
    sent = fake(monkeypatch, "wandb", breaks_at=2)
    prepared = run(toys.write_recipe(tmp_path), tmp_path / "runs", {"track": "wandb"}, only=["base"])
    assert prepared.became["base"] == "ran"
    assert [step for step, _ in sent[0].rows] == [1]
    assert len(read_metrics(prepared.entry("base").folder / "metrics.jsonl")) == 4
    assert "wandb takes no more numbers (the network is gone)" in capsys.readouterr().err


def test_training_outlives_a_tracker_that_cannot_begin(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, "wandb")

    def refuse(**told: Any) -> FakeRun:
        raise ConnectionError("no key is configured")

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    prepared = run(toys.write_recipe(tmp_path), tmp_path / "runs", {"track": "wandb"}, only=["base"])
    assert len(read_metrics(prepared.entry("base").folder / "metrics.jsonl")) == 4
    told = capsys.readouterr().err
    assert told.count("wandb takes no more numbers (no key is configured)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_the_real_package_takes_the_numbers_without_a_network(monkeypatch, tmp_path, capsys, package):
    # Trackio looks at its folder when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip(package)
    run(toys.write_recipe(tmp_path), tmp_path / "runs", {"track": package}, only=["base"])
    assert "takes no more numbers" not in capsys.readouterr().err
    kept = tmp_path / ("trackio" if package == "trackio" else "runs/wandb")
    (found,) = [one for one in kept.rglob("*") if one.suffix in (".wandb", ".db") and one.is_file()]
    if package == "trackio":
        rows = sqlite3.connect(found).execute("select step, metrics from metrics order by step").fetchall()
        assert [(step, json.loads(row)["loss"]) for step, row in rows][:2] == [(1, 1.0), (2, 0.5)]


def test_nothing_is_imported_without_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    run(toys.write_recipe(tmp_path), tmp_path / "runs")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with tracking(log, [], Tracked("r", "s-1", tmp_path, {}), print) as same:
        assert same is log


def test_rows_without_numbers_of_a_step_stay_here(tmp_path, monkeypatch):
    sent = fake(monkeypatch, "wandb")
    with tracking(
        MetricsLog(tmp_path / "metrics.jsonl"), ["wandb"], Tracked("r", "s-1", tmp_path, {}), print
    ) as log:
        log.write({"change": "rate", "before": 0.1, "after": 0.2})
        assert not sent
        log.write({"step": 1, "loss": 2.0, "note": "a", "good": True})
    assert sent[0].rows == [(1, {"loss": 2.0})]


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prepared = run(toys.write_recipe(tmp_path), tmp_path / "runs", {"track": "tensorboard"}, only=["base"])
    folder: Path = tmp_path / "runs" / "tensorboard" / "toy" / prepared.entry("base").folder.name
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25),
    ]  # fmt: skip
    assert events.Tags()["scalars"] == ["tokens", "loss"]
