"""Written data in a recipe: by a checkpoint of its own, and read by every stage that trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from fake_endpoint import FakeEndpoint, serving
from synthesizing import QUICK, lines, recipe

import trivium
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.metrics import read_metrics
from trivium.pipeline.plan import planned

FORK = multiprocessing.get_context("fork")
SMALL = {"depth": 1, "width": 32, "head_width": 16, "heads": 2, "inner_width": 32}
SUMS = "world:sums?form=prompt&steps_low=2&steps_high=2&largest=12"
MODEL = {
    "words": {"kind": "tokenizer", "vocabulary": 300, "data": {"path": "world:sums", "limit": 200}},
    "base": {
        "kind": "pretrain", "data": {"world:sums": {"limit": 200}}, "tokenizer": "words", "model": SMALL,
        "context": 160, "batch": 640, "steps": 2,
    },
}  # fmt: skip
TRAINED = {"batch": 640, "steps": 1, "context": 160}


def answers(prompt: str, seed: int) -> str:
    if prompt.startswith("Write the following"):
        return f"Again: {prompt[-80:]}"
    return f"2 + 2 = {seed % 2 + 4}\n#### {seed % 2 + 4}"


@pytest.mark.slow
def test_every_stage_that_trains_reads_what_was_written(tmp_path):
    with serving(FakeEndpoint(answer=answers)) as fake:
        teacher = {"kind": "synthesize", "endpoint": {"url": fake.url, "model": "fake", **QUICK}}
        data = {"path": SUMS, "limit": 40}
        every = [{"answer": {"samples": 4}}, {"verify": {"by": ["tests.py:first"], "every": True}}, "pairs"]
        (tmp_path / "tests.py").write_text(
            "def first(prompts, completions, **columns):\n"
            "    return [float(one.endswith('4')) for one in completions]\n"
        )
        stages = {
            **MODEL,
            "problems": {**teacher, "data": data, "steps": ["traces"]},
            "judged": {**teacher, "data": data, "steps": every},
            "texts": {**teacher, "data": {"path": "world:prose", "limit": 30}, "steps": ["rephrase"]},
            "corpus": {"kind": "corpus", "data": "texts", "tokenizer": "words"},
            "sft": {"kind": "sft", "from": "base", "data": "asked", **TRAINED},
            "dpo": {"kind": "preference", "from": "sft", "data": "judged", "steps": 1, "pairs": 4,
                    "context": 160, "sycophancy": 0},
            "rl": {"kind": "rlvr", "from": "sft", "data": "asked", "reward": ["math"], "steps": 1,
                   "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 4},
            "again": {"kind": "rlvr", "from": "sft", "data": "problems", "reward": ["math"], "steps": 1,
                      "prompts_per_step": 2, "num_generations": 2, "max_new_tokens": 4},
        }  # fmt: skip
        # The same rows in parquet, and what another stage makes of those.
        stages["known"] = {**teacher, "data": "asked", "steps": [{"mix": {"data": "asked", "share": 0.5}}]}
        place = recipe(
            tmp_path, endpoint=teacher["endpoint"], data=data, steps=["answer"], file_format="parquet",
            coverage_by=["truth.family"], further=stages,
        )  # fmt: skip
        run = trivium.run(place, runs=tmp_path / "runs")
    assert [path.name for path in (run["asked"].folder / "data").iterdir()] == ["rows.parquet"]
    covered = read_json(run["asked"].folder / "synthesis.json")["diversity"]["coverage"]
    assert covered["columns"] == ["truth.family"]
    assert covered["cells"] == covered["filled"] == len(covered["counts"]) > 3
    assert sum(covered["counts"].values()) == 40
    known = lines(run["known"].folder / "data" / "rows.jsonl")
    assert len(known) == 80
    for row in known:
        entry = {"step": "answer", "model": f"fake at {fake.url}", "temperature": 1.0, "samples": 1}
        assert row["provenance"][0] == entry
        assert [one["role"] for one in row["messages"]] == ["user", "assistant"]
        assert row["truth"]["steps"]
    assert all(
        {"chosen", "rejected", "prompt"} <= row.keys()
        for row in lines(run["judged"].folder / "data" / "rows.jsonl")
    )
    for name in ("sft", "dpo", "rl", "again"):
        assert [row["step"] for row in read_metrics(run[name].folder / "metrics.jsonl") if "step" in row] == [
            1
        ]
    assert read_json(run["corpus"].folder / "data" / "manifest.json")["splits"]["train"]["documents"] > 20


def own(folder: Path, **stage: object) -> Path:
    """A recipe in which a tiny checkpoint writes."""
    written = {
        "from": "base", "data": {"path": SUMS, "limit": 30}, "form": "completion",
        "steps": [{"answer": {"samples": 2, "max_new_tokens": 24, "cut": True}},
                  {"diversify": {"similarity": 1}}],
        **stage,
    }  # fmt: skip
    return recipe(folder, further=MODEL, **written)


def run_whole(place: Path, runs: Path) -> None:
    trivium.run(place, runs=runs)
    os._exit(0)


@pytest.mark.slow
def test_with_an_own_checkpoint_killed_and_run_again_it_writes_the_same(tmp_path):
    """What was answered before the kill is not written again, and the rows are those of a whole run."""
    place = own(tmp_path)
    trivium.run(place, runs=tmp_path / "runs", only=["base"])
    process = FORK.Process(target=run_whole, args=(place, tmp_path / "runs"))
    process.start()
    while process.is_alive() and answered(tmp_path) < 12:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = answered(tmp_path)
    run = trivium.run(place, runs=tmp_path / "runs")
    assert run["asked"].summary["requests"]["answered"] == 60 - before
    whole = trivium.run(place, runs=tmp_path / "others")
    for name in ("data/rows.jsonl", "answers.jsonl"):
        assert (run["asked"].folder / name).read_text() == (whole["asked"].folder / name).read_text()
    cost = read_json(run["asked"].folder / "synthesis.json")["cost"]
    assert cost["requests"] == 60


def answered(folder: Path) -> int:
    found = list((folder / "runs" / "store").glob("asked-*/checkpoints/answers.jsonl"))
    return found[0].read_bytes().count(b"\n") if found else 0


def test_a_plan_refuses_an_answer_that_leaves_no_room_for_a_prompt(tmp_path):
    with pytest.raises(TriviumError, match=r"reads 160 .*`steps\.0\.answer\.max_new_tokens: 160` fills"):
        planned(own(tmp_path, steps=[{"answer": {"max_new_tokens": 160}}]), tmp_path / "runs")


@pytest.mark.parametrize("budget", [{"tokens": 700}, {"requests": 9}])
def test_a_budget_holds_for_an_own_checkpoint_too(tmp_path, budget):
    run = trivium.run(own(tmp_path, budget=budget), runs=tmp_path / "runs")
    report = read_json(run["asked"].folder / "synthesis.json")
    for name, most in budget.items():
        assert 0.7 * most < report["cost"][name] <= most
    assert report["out_of_budget"]


def test_the_page_shows_the_steps_the_cost_and_rows_to_read(tmp_path):
    run = trivium.run(own(tmp_path), runs=tmp_path / "runs")
    page = (run["asked"].folder.parents[1] / "asked" / "report.html").read_text()
    for words in (
        "Synthetic data",
        "2 diversify",
        "rows that were kept, at random",
        "distinct runs of 2 words",
    ):
        assert words in page
    first = lines(run["asked"].folder / "data" / "rows.jsonl")[0]["prompt"]
    assert first[:40] in page
