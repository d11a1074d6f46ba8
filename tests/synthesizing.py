"""Recipes with one stage that writes data, run as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import trivium
from trivium.generate import endpoint as endpoints

QUICK = {"concurrency": 4, "retries": 4, "timeout": 5.0}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(folder: Path, count: int, **columns: Any) -> Path:
    """Prompts `question number 0`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"question number {place}", **columns} for place in range(count)]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "seeds.jsonl"


def recipe(folder: Path, name: str = "asked", further: dict[str, Any] | None = None, **stage: Any) -> Path:
    """A recipe with the stage `asked`, and further ones."""
    written = {"kind": "synthesize", **stage}
    if "steps" not in written:
        written["steps"] = ["answer"]
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}.yaml"
    place.write_text(
        yaml.safe_dump({"name": name, "stages": {"asked": written, **(further or {})}}, sort_keys=False)
    )
    return place


def synthesized(folder: Path, name: str = "asked", runs: str = "runs", **stage: Any) -> Path:
    """Run such a recipe; the folder of the stage."""
    return trivium.run(recipe(folder, name, **stage), runs=folder / runs)["asked"].folder


def hurry(monkeypatch: Any) -> None:
    """Wait milliseconds where others wait seconds."""
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.005)
