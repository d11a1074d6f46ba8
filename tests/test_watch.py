"""Watching a run: what is read while it is written, what is told, and a page that follows by itself."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import toys

from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog
from trivium.lab.charts import log_axis
from trivium.lab.watch import Tail, application, page, thinned
from trivium.pipeline.run import run
from trivium.pipeline.watch import Watched, watch


def test_a_log_is_read_as_it_grows_and_anew_when_it_was_cut_back(tmp_path):
    log, tail = MetricsLog(tmp_path / "metrics.jsonl"), Tail(tmp_path / "metrics.jsonl")
    tail.update()
    assert tail.columns == {}
    log.write({"change": "rate", "before": 1, "after": 2})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1 / step, "gone": None, "word": "a"})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "loss"')
    tail.update()
    assert tail.columns == {"loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)]}
    assert tail.changes == [{"change": "rate", "before": 1, "after": 2}]
    with open(log.path, "a") as file:
        file.write(": 0.1}\n")
    tail.update()
    assert tail.columns["loss"][-1] == (4, 0.1)
    log.rewind(2)
    log.write({"step": 3, "loss": 7.0})
    tail.update()
    assert tail.columns == {"loss": [(1, 1.0), (2, 0.5), (3, 7.0)]}


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    points = [(step, 1.0) for step in range(10_000)]
    points[4321], points[6000] = (4321, 9.0), (6000, -3.0)
    kept = thinned(points)
    assert len(kept) <= 240
    assert {points[0], points[-1], points[4321], points[6000]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:240]) == points[:240]


def test_a_run_is_told_with_what_is_still_to_come(tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(TriviumError, match="Nothing has begun"):
        Watched(runs).state()
    run(toys.write_recipe(tmp_path), runs, only=["base"])
    state = Watched(runs).state()
    stages = {one["name"]: one for one in state["stages"]}
    assert {name: one["state"] for name, one in stages.items()} == {
        "words": "done", "base": "done", "left": "pending", "right": "pending",
    }  # fmt: skip
    assert stages["left"]["parents"] == ["base"]
    assert stages["base"]["loss"] == 0.25
    assert state["shown"] == "base"
    assert state["columns"]["loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    left = Watched(runs, "toy").state("left")
    assert (left["shown"], left["columns"]) == ("left", {})
    with pytest.raises(TriviumError, match="other has not begun"):
        Watched(runs, "other").state()


def test_a_stage_at_work_says_how_far_it_is(tmp_path):
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    path = toys.write_recipe(tmp_path)
    text = toys.RECIPE.replace("model: {depth: 2}, steps: 4", f"steps: 4, gate: {gate}")
    path.write_text(text)
    at_work = threading.Thread(target=run, args=(path, runs))
    at_work.start()
    try:
        watched = Watched(runs)
        deadline = time.monotonic() + 60
        stages: dict = {}
        while stages.get("base", {}).get("state") != "running":
            assert time.monotonic() < deadline
            time.sleep(0.05)
            if (runs / "toy" / "graph.json").is_file():
                stages = {one["name"]: one for one in watched.state()["stages"]}
        assert stages["base"]["share"] is None
        while not (runs / "toy" / "base").is_symlink():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # A stage that begins takes rows of later steps away: on a busy machine it may begin only now.
        while stages["base"]["share"] is None:
            assert time.monotonic() < deadline
            # Without a pause this loop holds the interpreter, and the run in the other thread stands still.
            time.sleep(0.05)
            MetricsLog(runs / "toy" / "base" / "metrics.jsonl").write(
                {"step": 1, "tokens": 1000, "loss": 1.0, "tokens_per_second": 500.0}
            )
            state = watched.state()
            stages = {one["name"]: one for one in state["stages"]}
        assert state["shown"] == "base"
        assert stages["base"]["share"] == 0.25
        assert stages["base"]["left"] == 3 * 1000 / 500
    finally:
        gate.touch()
        at_work.join()


def test_only_this_machine_is_answered_and_nothing_outside_is_asked(tmp_path):
    from starlette.testclient import TestClient

    run(toys.write_recipe(tmp_path), tmp_path / "runs")
    made = application(Watched(tmp_path / "runs").state)
    here = TestClient(made, base_url="http://127.0.0.1:8321")
    page = here.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert here.get("/state").json()["recipe"] == "toy"
    assert here.get("/state?stage=left").json()["shown"] == "left"
    assert TestClient(made, base_url="http://elsewhere.example").get("/state").status_code == 400
    waiting = TestClient(application(Watched(tmp_path / "none").state), base_url="http://localhost")
    assert "waiting" in waiting.get("/state").json()
    assert not re.search(r"https?://", page.text)
    assert set(re.findall(r"(?:src|href)=\"[^\"]*\"", page.text)) == {
        f'href="?stage={stage}"' for stage in ("words", "base", "left", "right")
    }
    assert not re.search(r"@import|url\(|innerHTML", page.text)


def page_state(**changes):
    stage = {
        "name": "rl", "kind": "rlvr", "parents": [], "entry": "rl-1", "state": "running", "share": 0.5,
        "step": 20, "tokens": 1000, "loss": 0.1, "telling": "reward 0.5", "seconds": None, "rate": 100.0,
        "progress": {"reward": "0.5", "taught nothing": "25%"}, "left": 90.0, "mfu": 0.412,
        "memory": 62e9,
    }  # fmt: skip
    columns = {
        "loss": [(step, 30.0 if step == 1 else 2.0 / step) for step in range(1, 21)],
        "validation_loss": [(10, 0.4), (20, 0.3)],
        "reward": [(step, step / 40) for step in range(1, 21)],
    }
    return {
        "recipe": "mine", "stages": [stage], "shown": "rl", "columns": columns, "changes": [],
        "others": ["other/rl"], "beside": None, "beside_columns": {}, **changes,
    }  # fmt: skip


def test_the_page_shows_reward_first_time_left_validation_and_what_is_cut():
    text = page(page_state())
    titles = re.findall(r'data-title="([^"]*)"', text)
    assert titles == ["reward", "loss"], "validation lies in the panel of the loss"
    assert "90 s left" in text
    assert "MFU 41 %" in text
    assert "58 GiB" in text
    assert "Last step: reward 0.5, taught nothing 25%" in text
    assert text.count("<polyline") == 3
    assert text.count('class="above"') == 1, "one mark where the loss of the first step leaves the scale"
    assert "values outside the scale" in text


def test_a_logarithmic_page_holds_all_values_and_marks_its_box():
    plain, log = page(page_state()), page(page_state(), logarithmic=True)
    assert 'name="log" value="1" checked' in log
    assert 'name="log" value="1">' in plain
    ticks = re.findall(r'data-title="reward".*?<div class="y">(.*?)</div>', log, re.S)[0]
    assert re.findall(r">([0-9.]+)<", ticks) == ["0.02", "0.05", "0.1", "0.2", "0.5"]
    assert log_axis([0.02, 30.0]).place(30.0) > log_axis([0.02, 30.0]).place(0.02)
    assert len(log_axis([1.0]).ticks) >= 1


@pytest.mark.slow
def test_another_result_is_laid_over_the_curves(tmp_path):
    runs = tmp_path / "runs"
    path = toys.write_recipe(tmp_path)
    run(path, runs)
    first = (runs / "toy" / "left").resolve().name
    path.write_text(path.read_text().replace("name: toy", "name: again"))
    run(path, runs, ["left.steps=3"])
    watched = Watched(runs, "again")
    state = watched.state("left", "toy/left")
    assert "toy/left" in state["others"]
    assert state["beside"] == "toy/left"
    assert state["beside_columns"]["loss"] == watched._tail(first).columns["loss"]
    assert page(state).count("<polyline") > page(watched.state("left")).count("<polyline")
    assert watched.state("left", "no/such")["beside"] is None


@pytest.mark.slow
def test_the_page_follows_a_run_by_itself(tmp_path):
    from browser import Browser

    runs = tmp_path / "runs"
    path = toys.write_recipe(tmp_path)
    run(path, runs, only=["base"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=watch, args=(runs, "toy", port, print), daemon=True).start()
    browser = Browser(390, 844)
    try:
        for attempt in range(100):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert attempt < 99
                time.sleep(0.1)
        browser.go(f"http://127.0.0.1:{port}/")
        browser.until("document.title == '2/4 toy'")
        shown = "return document.querySelector('.panel[data-title^=loss] output').textContent"
        assert browser.run(shown) == "0.25"
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        run(path, runs)
        browser.until("document.title == '4/4 toy'")
        browser.click("[data-stage=left]")
        browser.until("document.getElementById('shown').textContent == 'left'")
        assert "0.1" in browser.run("return document.getElementById('changes').textContent")
        assert browser.log() == []
    finally:
        browser.close()


@pytest.mark.slow
def test_the_graph_that_is_left_names_every_entry(tmp_path):
    prepared = run(toys.write_recipe(tmp_path), tmp_path / "runs")
    graph = json.loads(Path(tmp_path / "runs" / "toy" / "graph.json").read_text())
    assert {name: one["entry"] for name, one in graph["stages"].items()} == {
        name: prepared.entry(name).folder.name for name in prepared.nodes
    }
