"""What keeps the code readable: short files and functions, stages with few imports and one base."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from tests.imports import Imports
from trivium.stages import kinds
from trivium.stages.parts.training import TrainingStage

MOST_IMPORTS, LONGEST_FUNCTION, LONGEST_FILE = 15, 80, 600


OURS = {name: kind for name, kind in kinds().items() if kind.__module__.startswith("trivium.")}
TRAINING = {name: kind for name, kind in OURS.items() if issubclass(kind, TrainingStage)}


@pytest.fixture(scope="module")
def imports() -> Imports:
    return Imports()


@pytest.mark.parametrize("name", OURS)
def test_a_stage_imports_few_modules(imports: Imports, name: str) -> None:
    module = OURS[name].__module__
    used = {one for one in imports.edges[module] if one.startswith("trivium.")}
    assert len(used) <= MOST_IMPORTS, f"{module} imports {sorted(used)}"


def test_only_the_base_opens_what_a_training_stage_trains() -> None:
    own = {name for name, kind in TRAINING.items() if "run" in vars(kind) or "batch_of" in vars(kind)}
    assert not own, f"{own} open their parent, model or batches in an order of their own"
    assert {"pretrain", "midtrain", "sft", "preference", "reward", "rlvr", "ppo"} <= TRAINING.keys()


def modules() -> list[Path]:
    root = Path(inspect.getfile(TrainingStage)).parents[2]
    return sorted(root.rglob("*.py"))


def test_functions_can_be_read_at_once() -> None:
    long = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    assert not long


def test_files_can_be_read_from_top_to_bottom() -> None:
    lines = {str(path): len(path.read_text().splitlines()) for path in modules()}
    assert len(lines) > 300
    assert {path: count for path, count in lines.items() if count > LONGEST_FILE} == {}
