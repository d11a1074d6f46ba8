"""The runner and the store: reuse, resumption, locks, links, checkpoints, damage, gc, several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked import forked
from ports import free_port
from toys import RECIPE, ToyTrain, write_recipe

from trivium.cli import main
from trivium.generate.exactness import BIT_EXACT, CLOSE
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.kernels import kernels
from trivium.kit.seals import read_seal
from trivium.model.arithmetic import note_product
from trivium.pipeline import show
from trivium.pipeline.lock import locked
from trivium.pipeline.plan import plan
from trivium.pipeline.run import run
from trivium.pipeline.status import rows
from trivium.pipeline.store import Entry, Store

TESTS = Path(__file__).parent
SCRIPT = "import sys, toys; from trivium.cli import main; main(sys.argv[1:])"


def command(*words: str | Path, program: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*program, "-c", SCRIPT, *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS)}


def trivium(*words: str | Path) -> subprocess.CompletedProcess[str]:
    process = forked(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, *said)


def test_layout_reuse_and_links(tmp_path):
    runs = tmp_path / "runs"
    prepared = run(write_recipe(tmp_path), runs)
    assert set(prepared.became.values()) == {"ran"}
    for name, node in prepared.nodes.items():
        link = runs / "toy" / name
        assert os.readlink(link) == f"../store/{name}-{node.fingerprint}"
        assert (link / "COMPLETE").is_file()
        assert not (link / "LOCK").exists()
    record = prepared.entry("left").record
    assert record["settings"]["from"] == "base"
    assert record["parents"] == {"base": f"base-{prepared.nodes['base'].fingerprint}"}
    assert record["summary"] == {"tokens": 2000, "loss": 0.5}
    assert record["seed"] == 7
    assert record["machine"]["cores"] >= 1
    assert record["moved"] == []
    assert read_json(runs / "toy" / "base" / "model" / "model.json")["seed"] == 7
    again = run(tmp_path / "toy.yaml", runs)
    assert set(again.became.values()) == {"reused"}
    other = run(tmp_path / "toy.yaml", runs, ["left.steps=3", "name=other"])
    assert other.became == {"words": "reused", "base": "reused", "right": "reused", "left": "ran"}
    assert (runs / "other" / "base").resolve() == (runs / "toy" / "base").resolve()


def test_only_runs_what_the_stage_stands_on(tmp_path):
    prepared = run(write_recipe(tmp_path), tmp_path / "runs", only=["base"])
    assert prepared.became == {"words": "ran", "base": "ran"}
    with pytest.raises(TriviumError, match=r"no stage `zzz`; it has words, base, left, right\."):
        run(tmp_path / "toy.yaml", tmp_path / "runs", only=["zzz"])


def test_a_killed_stage_goes_on_where_it_was_cut_off(tmp_path):
    path = write_recipe(tmp_path)
    died = trivium("run", path, "--runs", tmp_path / "runs", "--set", "base.die_at=2")
    assert died.returncode == 9
    entry = Store(tmp_path / "runs").recipes()["toy"]["base"]
    assert entry.state == "cut off"
    assert not (entry.folder / "model").exists()
    prepared = run(path, tmp_path / "runs")
    assert prepared.became["base"] == "resumed"
    assert [row["step"] for row in entry.metrics] == [1, 2, 3, 4]
    assert entry.state == "done"


def test_resuming_with_other_kernels_is_said_in_the_log_and_in_the_record(tmp_path, capsys):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    trivium("run", path, "--runs", runs, "--set", "base.die_at=2")
    entry = Store(runs).recipes()["toy"]["base"]
    record = entry.record
    assert record["machine"]["generation"] in (BIT_EXACT, CLOSE)
    here = record["machine"]["kernels"]
    assert here == str(kernels())
    record["machine"]["kernels"] = "AuthenticAMD family 25 model 17, AVX512, 1 thread, torch 2.13.0"
    entry.note(record)
    run(path, runs, only=["base"])
    (sentence,) = entry.record["moved"]
    assert f"(AuthenticAMD family 25 model 17, AVX512, 1 thread, torch 2.13.0 -> {here})" in sentence
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert entry.record["machine"]["kernels"] == here


def test_a_second_process_waits_and_then_reuses(tmp_path):
    path = write_recipe(tmp_path)
    gate = tmp_path / "gate"
    words = ("run", path, "--runs", tmp_path / "runs", "--only", "base", "--set", f"base.gate={gate}")
    first = forked(*words, stderr=subprocess.PIPE)
    while not list((tmp_path / "runs" / "store").glob("base-*/LOCK")):
        assert first.poll() is None
        time.sleep(0.02)
    refused = trivium(*words, "--no-wait")
    assert refused.returncode == 2
    assert f"process {first.pid} on {socket.gethostname()}" in refused.stderr
    second = forked(*words, stderr=subprocess.PIPE)
    assert second.stderr is not None
    lines = iter(second.stderr.readline, "")
    assert any(f"process {first.pid}" in line for line in lines)
    gate.touch()
    first.communicate(timeout=60)
    said = second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "base: done before, reused" in said
    entry = Store(tmp_path / "runs").recipes()["toy"]["base"]
    assert [row["step"] for row in entry.metrics] == [1, 2, 3, 4]


def test_many_at_once_hold_a_lock_one_after_the_other(tmp_path):
    inside, most = [], []

    def work() -> None:
        with locked(tmp_path / "entry", lambda _: None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_kept_checkpoint_is_a_parent(tmp_path):
    path = write_recipe(tmp_path, RECIPE.replace("from: base, steps: 2}", "from: base@tokens=2k, steps: 1}"))
    with pytest.raises(TriviumError, match=r"base kept no checkpoint at tokens=2000 \(it kept: none\)"):
        run(path, tmp_path / "runs")
    prepared = run(path, tmp_path / "runs", ["base.keep=[2]"])
    entry = prepared.entry("left")
    assert entry.record["parents"]["base@tokens=2k"].endswith("@tokens=2000")


@pytest.mark.parametrize(
    ("parent", "file", "child"),
    [
        ("words", "tokenizer/words.txt", "base"),
        ("base", "model/model.json", "left"),
        ("judge", "model/model.json", "tuned"),
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_parent_is_named_and_not_used(tmp_path, parent, file, child, gone):
    more = "  judge: {kind: toy_reward, from: base}\n  tuned: {kind: toy_train, from: base, reward: judge}\n"
    path = write_recipe(tmp_path, RECIPE + more)
    run(path, tmp_path / "runs", only=[parent])
    damaged = (tmp_path / "runs" / "toy" / parent / file).resolve()
    text = damaged.read_text()
    damaged.unlink() if gone else damaged.write_text(text.replace("7", "8").replace("4000", "4001"))
    with pytest.raises(TriviumError) as caught:
        run(path, tmp_path / "runs")
    assert str(damaged) in str(caught.value)
    damaged.write_text(text)
    # The child had been begun.
    assert run(path, tmp_path / "runs").became[child] == "resumed"


def test_time_and_work_before_a_stop_are_added_to_those_after_it(tmp_path, monkeypatch):
    """One product of [8, 16] and [16, 32] in every attempt; the first attempt is made to look long."""
    original, attempts = ToyTrain.run, []

    def working(self, work):
        note_product(8, torch.ones(16, 32))
        attempts.append(work.resume)
        if len(attempts) == 1:
            raise RuntimeError("the lights went out")
        return original(self, work)

    monkeypatch.setattr(ToyTrain, "run", working)
    path = write_recipe(tmp_path)
    with pytest.raises(RuntimeError, match="lights"):
        run(path, tmp_path / "runs", only=["base"])
    entry = Store(tmp_path / "runs").recipes()["toy"]["base"]
    before = entry.record
    assert before["flops"] == 2 * 8 * 16 * 32
    entry.note({**before, "seconds": 1000.0, "started": "yesterday"})
    run(path, tmp_path / "runs", only=["base"])
    assert attempts == [False, True]
    assert entry.record["flops"] == 2 * before["flops"]
    assert 1000 < entry.record["seconds"] < 2000
    assert entry.record["started"] == "yesterday"


def test_status_shows_the_tree(tmp_path):
    path = write_recipe(tmp_path)
    runs = tmp_path / "runs"
    with pytest.raises(TriviumError, match="Nothing has run"):
        rows(runs)
    assert [row[1] for row in rows(runs, str(path))[2:]] == ["pending"] * 4
    run(path, runs)
    table = rows(runs)
    assert [row[0] for row in table[1:]] == ["toy", "└ words", "  └ base", "    ├ left", "    └ right"]
    assert table[3][1:4] == ["done", "4k", "0.250"]
    path.write_text(RECIPE.replace("steps: 4", "steps: 5"))
    states = {row[0].strip("└├ │"): row[1] for row in rows(runs, str(path))[2:]}
    assert states == {"words": "done", "base": "changed", "left": "changed", "right": "changed"}


def test_plan_says_what_would_run(tmp_path):
    path = write_recipe(tmp_path)
    runs = tmp_path / "runs"
    run(path, runs, only=["words"])
    table = plan(path, runs)
    assert [row[2] for row in table[1:]] == ["reuse", "run", "run", "run", ""]
    assert "tokens 4,000" in table[2][4]
    assert table[2][3].startswith("about")
    assert not list((runs / "store").glob("base-*"))


def test_show(tmp_path):
    runs = tmp_path / "runs"
    run(write_recipe(tmp_path), runs)
    assert "rate: 0.1 -> 0.1" in show.text(show.find(runs, "left"))
    assert show.documents(show.find(runs, "toy/base"), 3) == ["doc-7-3"]
    assert show.find(runs, str(runs / "toy" / "base")).folder == show.find(runs, "base").folder
    with pytest.raises(TriviumError, match="`left`\\?"):
        show.find(runs, "leftt")
    with pytest.raises(TriviumError, match="has no steps"):
        show.documents(show.find(runs, "words"), 1)


def test_hidden_files_are_no_part_of_a_result(tmp_path):
    entry = Entry(tmp_path / "made-1")
    (entry.folder / "data").mkdir(parents=True)
    entry.note({"produces": "data"})
    for name in ("rows.jsonl", ".DS_Store"):
        (entry.folder / "data" / name).write_text("{}")
    entry.complete()
    assert read_seal(entry.folder)["files"].keys() == {"stage.yaml", "data/rows.jsonl"}


def test_gc_keeps_what_recipes_reach(tmp_path):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    old = run(path, runs)
    new = run(path, runs, ["base.steps=5"])
    store = Store(runs)
    gone = {entry.folder.name for entry in store.unreached()}
    assert gone == {old.nodes[name].entry for name in ("base", "left", "right")}
    (runs / "toy" / "base").unlink()
    assert new.nodes["base"].entry not in {entry.folder.name for entry in store.unreached()}
    said = trivium("gc", "--runs", runs)
    assert said.stdout.count("would remove") == 3
    assert {entry.folder.name for entry in store.unreached()} == gone
    trivium("gc", "--runs", runs, "--yes")
    assert not list(store.unreached())
    assert new.entry("base").state == "done"


def test_gc_keeps_what_a_kept_checkpoint_of_it_was_a_parent_of(tmp_path):
    """`left` goes on from a checkpoint of a `base` that no recipe links to any more."""
    runs = tmp_path / "runs"
    path = write_recipe(tmp_path, RECIPE.replace("from: base, steps: 2}", "from: base@tokens=2k, steps: 1}"))
    old = run(path, runs, ["base.keep=[2]"], only=["left"])
    store = Store(runs)
    for name in ("base", "words"):
        (runs / "toy" / name).unlink()
    assert list(store.unreached()) == []
    main(["gc", "--runs", str(runs), "--yes"])
    assert (store.product(old.entry("left").record["parents"]["base@tokens=2k"]) / "model.json").is_file()
    assert {name: old.entry(name).state for name in old.nodes if name != "right"} == {
        "words": "done", "base": "done", "left": "done",
    }  # fmt: skip
    (runs / "toy" / "left").unlink()
    assert {entry.folder.name for entry in store.unreached()} == {
        old.nodes[name].entry for name in ("words", "base", "left")
    }


def test_two_processes_make_a_recipe_together(tmp_path):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    port = str(free_port())
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command("run", path, "--runs", runs),
                env=environment() | place | where,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[1][0] == ""
    entry = Store(runs).recipes()["toy"]["base"]
    assert [row["step"] for row in entry.metrics] == [1, 2, 3, 4]
    assert entry.record["processes"] == 2
