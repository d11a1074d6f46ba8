"""The tokens of a pass divided among processes: loss, gradient, updated weights and tokens stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Here, so that processes that are forked need not import them anew.
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from objectives import CASES, OneBatch
from small import SmallBatches, small_model, small_trainer
from test_parallel import meet, together
from test_tensor_parallel import GEMMA, GPT2, MIXTURE, QWEN2, assert_the_same, run_and_keep

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.learn.context_parallel import head_tail, segments_of


class LongDocuments(SmallBatches):
    """Rows of a long document between short ones."""

    def rows(self, step: int) -> list[PackedSequence]:
        random = np.random.default_rng(step)
        documents = [random.integers(0, 61, length) for length in (5, 40, 1, 11)]
        learned = [(random.random(len(one)) < 0.8).astype(np.float32) for one in documents]
        return [row_of_documents(documents, learned=learned, ids=list("abcd")), *super().rows(step)]


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3": ({"heads": 4, "key_value_heads": 2}, {"micro_batch": 1}),
    "qwen2": (QWEN2, {"ema": 0.5, "recompute": "full"}),
    "gpt2": (GPT2, {}),
    "gemma": (GEMMA, {"recompute": "selective"}),
    "experts": (MIXTURE, {"micro_batch": 1, "recompute": "full"}),
}
"""The shape of a model, and settings of its training."""
OBJECTIVES = ["next-token-smoothed", "next-token-adapter", "near-predictions", "distillation-forward_kl"]


def run_one(folder: Path, name: str, parallel: dict[str, Any]) -> None:
    """Train one case, and leave its end and how many tokens this process normed."""
    settings: dict[str, Any] = {"parallel": parallel}
    if name in RUNS:
        shape, changes = RUNS[name]
        model, batches, objective = small_model(**shape), LongDocuments(3, 2), None
        settings |= changes
    else:
        case = CASES[name]("cpu")
        model, batches, objective = case.model, OneBatch(case.rows, 2), case.objective
    trainer = small_trainer(folder, model=model, batches=batches, objective=objective, **settings)
    run_and_keep(trainer, folder)


def run_all(rank: int, size: int, port: int, folder: str, names: list[str], parallel: dict[str, Any]) -> None:
    """What each process does."""
    meet(rank, size, port)
    for name in names:
        run_one(Path(folder) / name, name, parallel)
    with pytest.raises(TriviumError, match="cannot divide answers that share a prompt"):
        run_one(Path(folder) / "refused", "policy-grpo", parallel)
    processes.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "parallel", "names"),
    [
        (2, {"context": 2, "shard": 1}, [*RUNS, *OBJECTIVES]),
        (4, {"context": 2, "shard": 2}, ["qwen3", "experts"]),
        # Matrices are divided among those that have the same tokens.
        (4, {"context": 2, "tensor": 2, "shard": 1}, [*RUNS, "next-token-smoothed", "near-predictions"]),
        (8, {"context": 2, "tensor": 2, "shard": 2}, ["qwen3", "qwen2"]),
    ],
    ids=str,
)
def test_it_learns_what_one_process_learns(
    tmp_path: Path, size: int, parallel: dict[str, Any], names: list[str]
) -> None:
    together(run_all, size, str(tmp_path / "many"), names, parallel)
    for name in names:
        run_one(tmp_path / "one" / name, name, {})
        assert_the_same(tmp_path / "one" / name, tmp_path / "many" / name)
        if size == 2:
            alone = read_json(tmp_path / "one" / name / "held-0.json")
            held = [read_json(tmp_path / "many" / name / f"held-{rank}.json") for rank in range(size)]
            assert sum(one["normed"] for one in held) == alone["normed"]
            assert max(one["normed"] for one in held) < 0.6 * alone["normed"]
            assert held[0]["flops"] == pytest.approx(alone["flops"], rel=0.15)


def test_pieces_are_taken_from_head_and_tail() -> None:
    assert head_tail(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert sorted(head_tail(11, 3).tolist()) == list(range(11))


def test_a_run_ends_where_its_document_does() -> None:
    """Documents of 3, 4 and 1 tokens, of which this process has the first four and the last two."""
    found = segments_of(torch.tensor([0, 1, 2, 3, 6, 7]), [3, 4, 1])
    assert [(one.first, one.begin, one.end, one.count) for one in found] == [
        (0, 0, 3, 3), (3, 3, 4, 1), (4, 3, 7, 1), (5, 7, 8, 1),
    ]  # fmt: skip
    assert segments_of(torch.tensor([], dtype=torch.long), [3]) == []
