"""What people need in their first hour, in four roles, on data made here: no traceback, no wide table.

With the README alone (`tests/test_init.py` runs its example); with texts, chats, pairs and problems of one's
own; to read curves and change a setting; to serve a model to an application.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from forked import forked

from trivium.pipeline.watch import Watched

PROGRAM = "from trivium.cli import main; main()"
SHAPE = "--vocabulary 300 --depth 1 --width 32 --context 96 --batch 1k --steps 6"
WIDEST = 100


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hour")
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} and 3 make {number + 3}. " * 4)
    kinds = {
        "chats": [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
            for n in range(60)
        ],
        "pairs": [{"prompt": f"{n}?", "chosen": f" {n}", "rejected": " no"} for n in range(60)],
        "problems": [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(60)],
    }  # fmt: skip
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def typed(place: Path, command: str, *, status: int = 0, anew: bool = False) -> str:
    """What a command prints, which has to end as expected, without a traceback, in a hundred columns.

    In a copy of this process, or in one that starts `anew`, which then imports everything first.
    """
    into: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": place}
    words = [sys.executable, "-W", "error::UserWarning:torch", "-c", PROGRAM, *command.split()]
    process = subprocess.Popen(words, text=True, **into) if anew else forked(*command.split(), **into)
    out, complaints = process.communicate()
    said = out + complaints
    assert process.returncode == status, f"{command}: {said}"
    assert "Traceback" not in said, command
    # How long the name of a person's own folder is, a program cannot help.
    lines = out.replace(str(place), ".").splitlines()
    wide = [line for line in lines if len(line) > WIDEST]
    assert not wide, f"{command}: {wide[0]}"
    assert not re.search(r"torch\._dynamo|FutureWarning|DeprecationWarning", said), command
    if status:
        assert len(complaints.strip().splitlines()) == 1, f"{command}: one sentence, not {complaints}"
    return said


@pytest.mark.slow
def test_one_with_data_of_their_own_goes_the_whole_road(place):
    for name, form in (
        ("texts", "plain text"),
        ("chats.jsonl", "conversations"),
        ("pairs.jsonl", "preference"),
    ):
        assert form in typed(place, f"data {name}")
    typed(place, f"pretrain --data texts {SHAPE}", anew=True)
    assert "holds preferences" in typed(place, "sft pretrain --data pairs.jsonl", status=2)
    typed(place, "sft pretrain --data chats.jsonl --epochs 1 --adapter lora --adapter.rank 2 --to answers")
    typed(place, "dpo sft --data pairs.jsonl --pairs 8 --steps 2 --sycophancy 0")
    said = typed(
        place,
        "rlvr sft --data problems.jsonl --reward math --steps 1 --prompts-per-step 2 --num-generations 2"
        " --max-new-tokens 4",
    )
    assert "nothing was learned" in said, "a model that small gets every problem wrong"
    listed = typed(place, "ls --cost")
    assert all(name in listed for name in ("pretrain-texts/pretrain", "sft-chats/sft", "dpo-pairs/dpo"))
    assert (place / "answers" / "README.md").is_file()


@pytest.mark.slow
def test_two_who_reads_curves_and_changes_a_setting(place):
    shape = SHAPE.replace("--steps 6", "--steps 5")
    text = typed(place, f"pretrain --data texts {shape} --name curves --print-recipe")
    (place / "curves.yaml").write_text(text)
    typed(place, "run curves.yaml")
    shown = Watched(place / "runs", "curves").state("pretrain")
    assert len(shown["columns"]["loss"]) == 5
    why = typed(place, "plan curves.yaml --set pretrain.steps=8 --why")
    assert "pretrain: steps: 5 -> 8" in why
    typed(place, "run curves.yaml --set pretrain.steps=8")
    listed = typed(place, "ls curves")
    assert "done, earlier settings" in listed
    earlier = re.search(r"pretrain-[0-9a-f]+", listed)[0]
    typed(place, f"show {earlier}")
    typed(place, "show curves/pretrain --step 3")
    assert "per token" not in typed(place, f"distance {earlier} curves/pretrain --count 2")


@pytest.mark.slow
def test_three_who_serves_a_model_to_an_application(place):
    if not (place / "runs" / "sft-chats").exists():
        typed(place, f"pretrain --data texts {SHAPE}")
        typed(place, "sft pretrain --data chats.jsonl --epochs 1")
    words = ["serve", "sft-chats/sft", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, *words], cwd=place, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            lines = iter(server.stdout.readline, "")
            address = next(
                found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line))
            )
            body = {
                "model": "sft-chats/sft", "max_tokens": 4, "messages": [{"role": "user", "content": "3?"}],
            }  # fmt: skip
            answer = None
            while answer is None:
                try:
                    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
                except httpx.TransportError:
                    time.sleep(0.2)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["role"] == "assistant"
            assert "<html" in httpx.get(address, timeout=60).text
        finally:
            server.terminate()
            server.wait(timeout=60)
