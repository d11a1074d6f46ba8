"""What `trivium launch` renders for each scheduler, held by golden files, and how it is submitted.

`make lint` looks at the golden scripts with shellcheck. To write them again: `python tests/test_launch.py`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import forked
from small import tiny_recipe

from trivium.cli import main
from trivium.kit import stopping
from trivium.kit.errors import TriviumError
from trivium.pipeline.launch import script

GOLDEN = Path(__file__).parent / "golden" / "launch"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "torchrun.sh": ("torchrun", {"processes": 2}),
    "slurm.sh": ("slurm", {"nodes": 2, "directives": ("--partition=gpu", "--account=me")}),
    "slurm_array.sh": ("slurm", {"processes": 1, "cpus": 4, "jobs": 6, "time": "90m", "gpus": False}),
    "sky_bucket.yaml": ("sky", {"bucket": "s3://mine", "more": ["--set", "base.tokens=2M"]}),
    "sky_volume.yaml": ("sky", {"nodes": 2, "volume": "shared", "accelerator": "A100"}),
    "ray.sh": ("ray", {"processes": 1, "gpus": False}),
}


def rendered(name: str) -> str:
    target, wishes = CASES[name]
    return script("pocket", target, "/runs", **wishes)


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_the_golden_one(name):
    text = rendered(name)
    assert text == (GOLDEN / name).read_text()
    if name.endswith(".sh"):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    else:
        task = yaml.safe_load(text)
        assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0
        assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [stopping.GO_ON_STATUS]


@pytest.mark.parametrize(
    ("target", "wishes", "said"),
    [
        ("ray", {"nodes": 2}, "ray starts the processes of one machine"),
        ("slurm", {"time": "10m"}, "--time 10m leaves no time to work before the last 5m"),
        ("slurm", {"time": "soon"}, "'soon' is no time span; write 90m"),
        ("slurm", {"bucket": "s3://mine"}, "--bucket and --volume are SkyPilot's"),
        ("sky", {"bucket": "s3://mine", "nodes": 2}, "name a --volume"),
        ("sky", {"jobs": 2}, "--jobs makes an array of SLURM"),
    ],
)
def test_what_a_target_cannot_do_is_refused(target, wishes, said):
    with pytest.raises(TriviumError, match=said):
        script("pocket", target, "runs", **wishes)


def test_a_job_is_handed_to_sbatch(tmp_path, monkeypatch, capsys):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sbatch").write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho Submitted batch job 12\n'
    )
    (commands / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    main(["launch", "pocket", "--on", "slurm", "--runs", str(tmp_path / "runs"), "--time", "2h"])
    printed = capsys.readouterr().out
    kept = tmp_path / "runs/pocket/.logs/launch.sh"
    assert printed == f"Submitted batch job 12\nThe script: {kept}\n"
    assert (tmp_path / "asked").read_text() == f"{kept}\n"
    assert "#SBATCH --time=0-02:00:00\n" in kept.read_text()


def test_without_a_scheduler_nothing_is_submitted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["launch", "pocket", "--on", "slurm", "--runs", str(tmp_path)])
    assert "there is no `sbatch` on this machine, so nothing was submitted" in capsys.readouterr().err


def test_time_spans():
    assert [stopping.seconds(text) for text in ("90s", "1h30m", "2d", "24:00:00", "1-02:00:03")] == [
        90, 5400, 172_800, 86_400, 93_603,
    ]  # fmt: skip
    for wrong in ("", "10", "soon", "1h 30m"):
        with pytest.raises(TriviumError, match="is no time span"):
            stopping.seconds(wrong)


@pytest.mark.slow
def test_a_stop_file_stops_at_a_saved_state_and_the_status_says_go_on(tmp_path):
    recipe, runs, stop = tmp_path / "tiny.yaml", tmp_path / "runs", tmp_path / "STOP"
    recipe.write_text(tiny_recipe(steps=100_000, every=1000))
    word = tmp_path / "GO-ON"
    environment = {**stopping.without_requests(dict(os.environ)), stopping.GO_ON_FILE: str(word)}
    process = forked(
        "run", recipe, "--runs", runs, "--stop-file", stop, env=environment, stderr=subprocess.PIPE
    )
    while not list(runs.glob("store/base-*/metrics.jsonl")):
        assert process.poll() is None
    stop.touch()
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, word.exists()) == (stopping.GO_ON_STATUS, True), said
    assert len(list(runs.glob("store/base-*/checkpoints/step-*"))) == 1
    assert "stopped as it was asked to; the same command goes on from here" in said
    # The stage is not begun while the file is there.
    again = forked(
        "run", recipe, "--runs", runs, "--stop-file", stop, env=environment, stderr=subprocess.PIPE
    )
    said = again.communicate(timeout=60)[1]
    assert again.returncode == stopping.GO_ON_STATUS
    assert "base: going on" not in said


def test_a_run_past_its_time_stops_before_it_begins(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny_recipe(steps=2, every=1000))
    monkeypatch.setenv(stopping.STOP_AT, "1000")
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--runs", str(tmp_path / "runs")])
    assert stopped.value.code == stopping.GO_ON_STATUS
    monkeypatch.setenv(stopping.STOP_AT, "4000000000")
    main(["run", str(recipe), "--runs", str(tmp_path / "runs")])
    assert "already complete" not in capsys.readouterr().out
    monkeypatch.setenv(stopping.STOP_AT, "1000")
    main(["run", str(recipe), "--runs", str(tmp_path / "runs")])
    assert "tiny is already complete: every stage was done before." in capsys.readouterr().out
    monkeypatch.setenv(stopping.STOP_AT, "noon")
    with pytest.raises(TriviumError, match="TRIVIUM_STOP_AT=noon is no time"):
        stopping.requested()


def test_under_torchrun_a_stop_is_no_failure(tmp_path, monkeypatch):
    """Else it would start the processes again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv(stopping.GO_ON_FILE, str(tmp_path / "logs" / "GO-ON"))
    assert stopping.stopped_as_asked() == 0
    assert (tmp_path / "logs" / "GO-ON").exists()


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        (GOLDEN / case).write_text(rendered(case))
