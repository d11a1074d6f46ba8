"""A divided model is whole only where something looks at it, and begins with the numbers of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of
from test_parallel import losses, meet, together

from tests.test_pretrain import write
from trivium.data.rows import PackedSequence
from trivium.kit import processes
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.kit.metrics import read_metrics
from trivium.learn.trainer import Hooks
from trivium.learn.validation import ValidationLoss, measure
from trivium.model.config import ExpertsConfig
from trivium.model.initialise import empty_model, initialise, new_model
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.transformer import Transformer
from trivium.pipeline.run import run
from trivium.pipeline.store import Store

pytestmark = pytest.mark.slow
WHOLE = {"shard": 1, "expert": 1}


def bytes_of(model: Transformer) -> int:
    """The memory that a model's weights take."""
    return sum(one.untyped_storage().nbytes() for one in model.parameters())


def train(rank: int, size: int, port: int, folder: str, watched: bool, shard: Any, model_has: str) -> None:
    """What each process does: train, measuring twice and keeping once, and say what it held meanwhile."""
    meet(rank, size, port)
    experts, adapter = model_has == "experts", model_has == "adapter"
    shape = {"experts": ExpertsConfig(4, 2, 16)} if experts else {}
    parallel = {"shard": shard, "expert": 2 if experts else 1}
    config, place, held = small_model(**shape).config, Path(folder), []

    class Batches(SmallBatches):
        def rows(self, step: int) -> list[PackedSequence]:
            held.append(bytes_of(trainer.model))
            return super().rows(step)

    def validate() -> dict[str, ValidationLoss]:
        rows = [replace(row, columns={"bytes": row.weights}) for row in SmallBatches().rows(99)]
        return {"": measure(trainer.model, rows)}

    def keep(step: int, tokens: int) -> None:
        save_tensors(place / f"kept-{step}-{rank}.safetensors", weights_of(trainer.model))

    whole = watched or adapter
    model = new_model(config, seed=3) if whole else empty_model(config)
    if adapter:
        # All weights but the adapter's are frozen, and their parts are needed all the same.
        add_adapter(model, AdapterSettings(rank=4))
    trainer = small_trainer(
        place, model=model, batches=Batches(6, 3), watched=watched, optimiser="muon", ema=0.5, micro_batch=1,
        fill=None if whole else lambda model, put: initialise(model, 3, put), parallel=parallel,
        validation={"times": 2}, checkpoint={"at": ["step=4"]}, hooks=Hooks(validate=validate, keep=keep),
    )  # fmt: skip
    trainer.run()
    moments = trainer.moments()
    write_json(place / f"held-{rank}.json", {"during": held, "end": bytes_of(trainer.model)})
    if rank == 0:
        save_tensors(place / "end.safetensors", weights_of(trainer.model))
        save_tensors(place / "moments.safetensors", moments)
    else:
        assert (
            watched or parallel == WHOLE or all(bool(one.isnan().all()) for one in trainer.model.parameters())
        )
    processes.stop()


@pytest.mark.parametrize(
    ("shard", "model_has"), [("all", ""), ("all", "adapter"), (1, ""), (1, "experts"), ("all", "experts")]
)
def test_a_model_that_is_not_looked_at_takes_no_room(tmp_path: Path, shard: Any, model_has: str) -> None:
    """Losses, validation, what is kept and the end are bit for bit those of whole copies that follow."""
    together(train, 2, str(tmp_path / "watched"), True, shard, model_has)
    together(train, 2, str(tmp_path / "alone"), False, shard, model_has)
    one, other, replicas = tmp_path / "watched", tmp_path / "alone", (shard, model_has) == (1, "")
    assert losses(one) == losses(other)
    measured = [
        [row.get("validation_loss") for row in read_metrics(at / "metrics.jsonl")] for at in (one, other)
    ]
    assert measured[0] == measured[1]
    assert sum(loss is not None for loss in measured[0]) == 2
    for name in ("end.safetensors", "moments.safetensors", "kept-4-0.safetensors", "kept-4-1.safetensors"):
        assert_identical(load_tensors(one / name), load_tensors(other / name))
    whole = sum(4 * one.numel() for one in load_tensors(one / "end.safetensors").values())
    for rank in range(2):
        followed, free = (read_json(at / f"held-{rank}.json") for at in (one, other))
        assert set(followed["during"]) == {whole}
        assert max(free["during"]) < whole / 50 or replicas
        assert (free["end"] >= whole) == (rank == 0 or replicas)


STAGES = """\
name: tiny
stages:
  words:  {kind: tokenizer, data: ./texts, vocabulary: 268}
  corpus: {kind: corpus, data: ./texts, tokenizer: words, validation: 0.1}
  base:
    {kind: pretrain, data: corpus, model: {depth: 1, width: 32}, context: 32, batch: 256, steps: 4,
     checkpoint: {at: [step=2]}, parallel: all}
  mid: {kind: midtrain, from: base, data: corpus, batch: 256, steps: 2, optimiser_state: keep, parallel: all}
"""


def run_stages(rank: int, size: int, port: int, folder: str) -> None:
    meet(rank, size, port)
    run(Path(folder) / "tiny.yaml", Path(folder) / f"runs-{size}")
    processes.stop()


def test_stages_under_several_processes_end_as_under_one(tmp_path: Path) -> None:
    """A new model made without numbers, its checkpoints, and its moments in a stage after it."""
    write(tmp_path, STAGES)
    together(run_stages, 1, str(tmp_path))
    together(run_stages, 2, str(tmp_path))
    one, two = (Store(tmp_path / f"runs-{size}").recipes()["tiny"] for size in (1, 2))
    for stage, file in (("base", "model"), ("base", "kept/step-000000002/model"), ("mid", "model")):
        expected, found = (load_tensors(at[stage].folder / file / "model.safetensors") for at in (one, two))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{stage} {file} {name}"
            )
    rows = [[row["loss"] for row in at["mid"].metrics if "loss" in row] for at in (one, two)]
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)
