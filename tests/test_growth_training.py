"""A model that grows while it trains: on the one loop, through stops, with its optimiser's state."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of

from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.progress import Progress
from trivium.learn.rows_ahead import RowsAhead
from trivium.learn.trainer import Hooks, Trainer
from trivium.model.folder import load_model, save_model
from trivium.model.growth import largest_difference, probe
from trivium.stages.parts.growing import GrowthPoint, reshapes
from trivium.stages.parts.stage import Work

POINTS = [GrowthPoint(at="step=3", layers=4), GrowthPoint(at=0.75, width=64, warmup=2)]


def trainer_of(
    folder: Path, points: list[GrowthPoint] = POINTS, *, seed: int = 0, **settings: Any
) -> Trainer:
    """A trainer whose model grows; eight steps, a state after every one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Work("base", folder, {}, 0, MetricsLog(folder / "metrics.jsonl"), Progress("test"))
    trainer = small_trainer(
        folder, model=small_model(seed), checkpoint={"every_steps": 1, "keep": 9}, **settings
    )
    trainer.reshapes = reshapes(work, points, trainer.batches.steps, 100, 64, trainer.model.config)
    return trainer


class Stops(SmallBatches):
    """Ends the process politely before a step, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at: int | None = at

    def rows(self, step: int) -> list:
        if step == self.at:
            self.at = None
            os.kill(os.getpid(), signal.SIGTERM)
        return super().rows(step)


def test_what_growth_froze_is_what_it_was_after_a_stop(tmp_path: Path) -> None:
    points = [GrowthPoint(at="step=3", layers=4, freeze=True)]
    straight = trainer_of(tmp_path / "straight", points)
    straight.run()
    stopped = trainer_of(tmp_path / "stopped", points)
    stopped.rows_ahead = RowsAhead(Stops(5))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = trainer_of(tmp_path / "stopped", points, seed=5)
    again.run()
    assert_identical(weights_of(straight.model), weights_of(again.model))


MASKED = GrowthPoint(at="step=2", layers=4, method="masked", steps=3)
LEARNED = GrowthPoint(at="step=2", layers=4, method="learned", steps=2)
STOPS = [
    *((POINTS, {"ema": 0.9}, at) for at in (1, 2, 3, 5, 6)),
    *((POINTS, {"optimiser": "adamw"}, at) for at in (1, 2, 3, 5, 6)),
    *(([MASKED, POINTS[1]], {"ema": 0.9}, at) for at in (2, 3, 4)),
    *(([LEARNED, POINTS[1]], {"ema": 0.9}, at) for at in (2, 3, 5)),
]  # fmt: skip


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("points", "settings", "at"), STOPS)
def test_a_run_stopped_around_a_growth_ends_as_one_that_was_not(
    tmp_path: Path, points: list[GrowthPoint], settings: dict, at: int
) -> None:
    straight = trainer_of(tmp_path / "straight", points, **settings)
    straight.run()
    assert (straight.model.config.layers, straight.model.config.width) == (4, 64)
    stopped = trainer_of(tmp_path / "stopped", points, **settings)
    batches = Stops(at)
    stopped.rows_ahead = RowsAhead(batches)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    # Another start: everything it ends with comes from the saved state.
    again = trainer_of(tmp_path / "stopped", points, seed=5, **settings)
    again.run()
    assert_identical(weights_of(straight.model), weights_of(again.model))
    assert_identical(straight.optimiser.state(), again.optimiser.state())
    assert again.rates.matrices == straight.rates.matrices


def test_the_loss_does_not_jump_where_the_function_is_kept(tmp_path: Path) -> None:
    plain = small_trainer(tmp_path / "plain", model=small_model())
    plain.run()
    grown = trainer_of(tmp_path / "grown")
    grown.run()
    rows = [
        [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "grown")
    ]
    # The first step after a growth still has the small model's loss.
    assert rows[1][3]["loss"] == pytest.approx(rows[0][3]["loss"], abs=1e-4)
    assert rows[1][4]["loss"] != pytest.approx(rows[0][4]["loss"], abs=1e-4)


def test_the_learning_rate_rises_again_over_the_warm_up(tmp_path: Path) -> None:
    trainer_of(tmp_path / "grown", learning_rate={"decay": "constant"}).run()
    rows = [row for row in read_metrics(tmp_path / "grown" / "metrics.jsonl") if "loss" in row]
    rates = [row["learning_rate"] / rows[0]["learning_rate"] for row in rows]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1 / 3, 2 / 3])


def test_only_new_layers_move_once_the_old_are_frozen(tmp_path: Path) -> None:
    frozen = trainer_of(tmp_path / "frozen", [GrowthPoint(at="step=4", layers=4, freeze=True)])
    frozen.run()
    moved = {name for name, _ in frozen.model.named_parameters() if name in frozen.named}
    assert {name.split(".")[1] for name in moved} == {"1", "3"}
    assert not any(name.startswith(("embedding", "head", "norm")) for name in moved)
    assert bool((frozen.model.get_parameter("layers.1.mlp.down.weight") != 0).all())


def test_a_growth_outside_the_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match="falls on step 9"):
        trainer_of(tmp_path, [GrowthPoint(at="step=9", layers=4)])
    with pytest.raises(ValueError, match="names no place"):
        GrowthPoint(at="half", layers=4)
    assert GrowthPoint(at="30%", layers=4).at == 0.3


def test_a_mask_rises_and_what_is_kept_on_the_way_is_the_masked_model(tmp_path: Path) -> None:
    masked = trainer_of(tmp_path / "masked", [MASKED])
    shares, differences = [], []

    def look(step: int, tokens: int) -> None:
        layers = masked.model.layers
        shares.append([float(layer.residual_scale) for layer in layers])
        folder = tmp_path / f"kept-{step}"
        save_model(masked.model, folder)
        texts = probe(masked.model.config.vocabulary, 32)
        differences.append(largest_difference(masked.model, load_model(folder), texts))

    masked.hooks = Hooks(keep=look)
    masked.kept_places = [("step", step) for step in range(2, 7)]
    masked.run()
    rising = [[1, share, 1, share] for share in (1 / 3, 2 / 3, 1, 1)]
    assert shares == [[1, 1], *map(pytest.approx, rising)]
    assert max(differences) < 1e-5
    plain = small_trainer(tmp_path / "plain", model=small_model())
    plain.run()
    rows = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "masked")
    ]
    assert rows[1][:2] == rows[0][:2]
    # A third of what two copied layers add is heard in the first step after.
    assert rows[1][2] != rows[0][2]
    with pytest.raises(TriviumError, match="takes 6 steps, and the stage ends after 8"):
        trainer_of(tmp_path / "late", [MASKED.model_copy(update={"steps": 6})])


def test_how_layers_are_made_is_learned_first_and_kept_as_plain_weights(tmp_path: Path) -> None:
    learned = trainer_of(tmp_path / "learned", [LEARNED])
    trained: list[set[str]] = []
    differences, sums = [], []

    def look(step: int, tokens: int) -> None:
        trained.append({name for name in learned.named if name.startswith("layers.")})
        save_model(learned.model, tmp_path / f"kept-{step}")
        texts = probe(learned.model.config.vocabulary, 32)
        differences.append(largest_difference(learned.model, load_model(tmp_path / f"kept-{step}"), texts))
        sums.append(learned.model.layers[0].attention.query.weight.detach().clone())

    learned.hooks = Hooks(keep=look)
    learned.kept_places = [("step", step) for step in (2, 3, 4, 5)]
    learned.run()
    assert max(differences) < 1e-5
    assert all(name.endswith(".original") for names in trained[1:3] for name in names)
    assert not any("parametrizations" in name for name in trained[3])
    assert len(trained[1]) == len(trained[3]) == 2 * len(trained[0])
    # While shares are learned, a layer is a sum of the small model's two.
    small = [
        load_model(tmp_path / "kept-2").layers[layer].attention.query.weight.detach() for layer in (0, 1)
    ]
    basis = torch.stack(small).flatten(1).T
    for weight in sums[1:3]:
        fit = torch.linalg.lstsq(basis, weight.flatten()[:, None])
        assert float((basis @ fit.solution - weight.flatten()[:, None]).abs().max()) < 1e-5
    assert not torch.equal(sums[1], small[0])
