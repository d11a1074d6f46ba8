"""How often a training step reads a number from the device, which on a GPU waits for all work there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from small import SmallBatches, small_trainer
from torch.overrides import TorchFunctionMode

READS = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "masked_select")
"""What is known only when the device has computed it: a number, or the shape of a result."""


class Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS:
            self.counts[name] += 1
        return function(*arguments, **(options or {}))


def reads_of_a_step(folder: Path, tokens: int) -> tuple[Counter[str], int]:
    trainer = small_trainer(folder, batches=SmallBatches(2, rows=8), micro_batch=tokens)
    trainer.make_ready()
    passes = 0
    learn = trainer.objective.loss

    def noted(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return learn(*arguments)

    trainer.objective.loss = noted  # type: ignore[method-assign]
    trainer._one_step()
    passes = 0
    with Reads() as reads:
        trainer._one_step()
    return reads.counts, passes


def test_a_pass_reads_nothing_and_a_step_reads_once(tmp_path: Path) -> None:
    """What the batch teaches is known before it is on the device; measures come over in one piece."""
    one, single = reads_of_a_step(tmp_path / "one", 10_000)
    many, several = reads_of_a_step(tmp_path / "many", 10)
    assert (single, several) == (1, 8)
    assert one == many
    assert one == {"tolist": 1}
