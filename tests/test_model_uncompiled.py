"""What is left out of compiled code, and that the compiler is imported only where something is compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import small_model

from trivium.model.attention import Documents
from trivium.model.compiling import compiled
from trivium.model.uncompiled import uncompiled

PROGRAM = """
import sys
from trivium.cli import main
for command in ("plan", "run"):
    main([command, *sys.argv[1:]])
print("compiler imported:", bool({"torch._dynamo", "sympy"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_without_anything_to_compile_the_compiler_is_not_imported(tmp_path: Path) -> None:
    words = ["pocket", "--runs", str(tmp_path), "--set", "base.tokens=2k", "--only", "base"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "compiler imported: False"


@pytest.mark.slow
def test_a_marked_function_runs_as_it_is_inside_of_compiled_code() -> None:
    traced: list[bool] = []

    @uncompiled
    def twice(rows: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return inner(rows)

    def inner(rows: torch.Tensor) -> torch.Tensor:
        traced.append(torch.compiler.is_compiling())
        return 2 * rows

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend)
    def whole(rows: torch.Tensor) -> torch.Tensor:
        return twice(rows + 1) - 3

    for rows in (torch.ones(2), torch.ones(2), torch.ones(5)):
        traced.clear()
        assert whole(rows).tolist() == [1.0] * len(rows)
        assert traced == [False, False]
    # what comes before, and what comes after; once more for another number of rows
    assert len(graphs) == 4


def graphs(layers: int) -> int:
    """How many programs a model of so many layers is compiled to over two batches."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_model(layers=layers)
    forward = compiled(model, backend="eager")
    with torch.no_grad():
        for lengths in ([7, 12, 30], [20, 9, 14]):
            tokens = torch.arange(sum(lengths)) % model.config.vocabulary
            torch.testing.assert_close(forward(tokens, Documents(lengths)), model(tokens, Documents(lengths)))
    torch._dynamo.reset()
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_layers_share_their_programs() -> None:
    assert graphs(3) == graphs(2)
