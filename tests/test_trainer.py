"""The one loop: one gradient however rows are grouped, no harm from bad steps, nothing lost at a stop."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from small import RATES, SmallBatches, assert_identical, small_model, small_trainer, weights_of

from trivium.data.rows import collate
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import read_metrics
from trivium.learn.objective import Loss
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.trainer import Hooks
from trivium.learn.validation import ValidationLoss
from trivium.model.attention import Documents


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]


def test_the_loss_is_the_plain_mean_over_the_valid_tokens_of_the_step(tmp_path: Path) -> None:
    """Against torch's cross-entropy, document by document, over all learned tokens of the step."""
    batches, model = SmallBatches(steps=1), small_model()
    total = weight = 0.0
    with torch.no_grad():
        for row in batches.rows(0):
            start = 0
            for length in row.lengths:
                tokens = torch.tensor(row.tokens[start : start + length])
                logits = model.logits(model(tokens, Documents([length])))
                each = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
                learned = torch.tensor(row.weights[start : start + length - 1])
                total, weight = total + float((each * learned).sum()), weight + float(learned.sum())
                start += length
    small_trainer(tmp_path, model=model, batches=batches).run()
    assert losses(tmp_path)[0][0] == pytest.approx(total / weight, abs=1e-5)


@pytest.mark.parametrize("micro", [1, 40, 100])
def test_the_size_of_a_pass_changes_neither_loss_nor_gradient_nor_weights(tmp_path: Path, micro: int) -> None:
    """L3, and pitfall A: means of means would weigh short rows too much."""
    whole, pieces = small_model(), small_model()
    small_trainer(tmp_path / "whole", model=whole, micro_batch=10_000, optimiser="adamw").run()
    small_trainer(tmp_path / "pieces", model=pieces, micro_batch=micro, optimiser="adamw").run()
    for (loss, norm), (other, other_norm) in zip(losses(tmp_path / "whole"), losses(tmp_path / "pieces")):
        assert other == pytest.approx(loss, abs=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
    for (name, one), other in zip(whole.named_parameters(), pieces.parameters()):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0, msg=name)


@pytest.mark.parametrize("settings", [{"optimiser": "muon", "ema": 0.9}, {"optimiser": "adamw"}])
def test_a_run_that_stops_and_goes_on_ends_as_one_that_did_not(tmp_path: Path, settings: dict) -> None:
    """L1 inside one process; `test_kill` does it with SIGKILL."""
    straight, halved = small_model(), small_model()
    small_trainer(tmp_path / "straight", model=straight, **settings).run()

    class Stops(SmallBatches):
        def rows(self, step: int) -> list:
            if step == 5 and not stopped:
                stopped.append(step)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().rows(step)

    stopped: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path / "halved", model=halved, batches=Stops(), **settings).run()
    again = small_model(seed=5)
    small_trainer(tmp_path / "halved", model=again, batches=Stops(), **settings).run()
    assert stopped == [5]
    assert_identical(weights_of(straight), weights_of(again))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "halved")]
    for one, other in zip(*rows, strict=True):
        timed = ("tokens_per_second", "data_wait")
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


class Draws(NextToken):
    """Notes what a random number would be at every step, as dropout would draw it."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def loss(self, model, batch) -> Loss:
        self.drawn.append(float(torch.rand(())))
        return super().loss(model, batch)


def test_what_a_step_draws_follows_from_the_seed_and_the_step_alone(tmp_path: Path) -> None:
    seen = []
    for name, seed in (("one", 4), ("same", 4), ("other", 5)):
        objective = Draws()
        torch.manual_seed(len(name))
        small_trainer(tmp_path / name, objective=objective, seed=seed, micro_batch=10_000).run()
        seen.append(objective.drawn)
    assert seen[0] == seen[1]
    assert len(set(seen[0] + seen[2])) == 16, "each of 8 steps of each of 2 seeds draws its own"


def test_bad_steps_in_a_row_are_counted_over_a_stop(tmp_path: Path) -> None:
    """Two before the stop and one after it are three in a row."""

    class Stops(SmallBatches):
        def rows(self, step: int) -> list:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().rows(step)

    options = {"batches": Stops(), "max_bad_steps": 3, "micro_batch": 10_000}
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path, objective=Poisoned({1, 2}, "loss"), **options).run()
    again = small_trainer(tmp_path, objective=Poisoned({0}, "loss"), **options)
    with pytest.raises(TriviumError, match="3 steps in a row"):
        again.run()
    assert again.skipped == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, capsys) -> None:
    """L10: one flipped bit in the newest state."""
    straight = small_model()
    small_trainer(tmp_path / "straight", model=straight).run()
    model = small_model()
    trainer = small_trainer(tmp_path / "cut", model=model, checkpoint={"every_steps": 2, "keep": 3})
    trainer.run()
    newest = trainer.checkpoints.path(trainer.checkpoints.steps()[-1]) / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = small_model(seed=3)
    small_trainer(tmp_path / "cut", model=again, checkpoint={"every_steps": 2, "keep": 3}).run()
    spoken = capsys.readouterr().err
    assert str(newest) in spoken
    assert "The state before it is used" in spoken
    assert_identical(weights_of(straight), weights_of(again))


def test_only_the_last_few_states_are_kept_and_a_part_left_by_a_crash_is_removed(tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / ".step-000000001.abcd.part"
    part.mkdir(parents=True)
    trainer = small_trainer(tmp_path, checkpoint={"every_steps": 1, "keep": 2})
    trainer.run()
    assert trainer.checkpoints.steps() == [6, 7], "the end itself is the stage's result, not a checkpoint"
    assert not part.exists()


def test_a_run_on_other_data_does_not_go_on(tmp_path: Path) -> None:
    small_trainer(tmp_path, checkpoint={"every_steps": 2}).run()
    with pytest.raises(TriviumError, match="was written by a run on other data"):
        small_trainer(tmp_path, batches=SmallBatches(rows=5)).run()


class Poisoned(NextToken):
    """A loss that is not finite at the steps it is told."""

    def __init__(self, bad: set[int], kind: str) -> None:
        super().__init__()
        self.bad, self.kind, self.calls = bad, kind, 0

    def loss(self, model, batch) -> Loss:
        result = super().loss(model, batch)
        self.calls += 1
        if self.calls - 1 in self.bad:
            poison = float("nan") if self.kind == "loss" else 0.0
            # A square root at zero has a finite value and an infinite slope.
            extra = (result.sum * 0).abs().sqrt() if self.kind == "gradient" else poison
            return Loss(result.sum + extra, result.metrics)
        return result


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(tmp_path: Path, kind: str) -> None:
    """L12: the step is skipped and counted, and the moments do not move either."""
    model = small_model()
    trainer = small_trainer(
        tmp_path,
        model=model,
        objective=Poisoned({2}, kind),
        batches=SmallBatches(steps=3),
        micro_batch=10_000,
    )
    result = trainer.run()
    expected = small_model()
    small_trainer(tmp_path / "two", model=expected, batches=SmallBatches(steps=3), micro_batch=10_000)
    two = small_trainer(tmp_path / "two", model=expected, batches=SmallBatches(steps=3), micro_batch=10_000)
    for _ in range(2):
        two._one_step()
    assert result["skipped_steps"] == 1
    assert_identical(weights_of(model), weights_of(expected))


def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_documents(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path, objective=Poisoned({1, 2, 3}, "loss"), max_bad_steps=3, micro_batch=10_000
    )
    with pytest.raises(TriviumError, match=r"3 steps in a row .* step3-row0-0"):
        trainer.run()


def test_out_of_memory_halves_the_pass_and_goes_on(tmp_path: Path, capsys) -> None:
    class Small(NextToken):
        def loss(self, model, batch) -> Loss:
            if len(batch.tokens) > 60:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(model, batch)

    roomy, tight = small_model(), small_model()
    small_trainer(tmp_path / "roomy", model=roomy, micro_batch=60).run()
    small_trainer(tmp_path / "tight", model=tight, objective=Small(), micro_batch=100_000).run()
    assert "Out of memory: going on with" in capsys.readouterr().err
    for (loss, norm), (other, other_norm) in zip(losses(tmp_path / "roomy"), losses(tmp_path / "tight")):
        assert (other, other_norm) == (pytest.approx(loss, abs=1e-4), pytest.approx(norm, rel=1e-3))


def test_a_single_row_that_does_not_fit_is_said(tmp_path: Path) -> None:
    class Never(NextToken):
        def loss(self, model, batch) -> Loss:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TriviumError, match="A single row of"):
        small_trainer(tmp_path, objective=Never()).run()


def test_other_errors_are_not_taken_for_want_of_memory(tmp_path: Path) -> None:
    class Broken(NextToken):
        def loss(self, model, batch) -> Loss:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        small_trainer(tmp_path, objective=Broken()).run()


def test_the_average_of_the_weights_becomes_the_model(tmp_path: Path) -> None:
    plain, averaged = small_model(), small_model()
    small_trainer(tmp_path / "plain", model=plain, batches=SmallBatches(steps=2)).run()
    trainer = small_trainer(tmp_path / "averaged", model=averaged, batches=SmallBatches(steps=2), ema=0.75)
    first = weights_of(averaged)
    trainer._one_step()
    second = weights_of(averaged)
    trainer._one_step()
    third = weights_of(averaged)
    trainer._take_average()
    for name, value in weights_of(averaged).items():
        step = 0.75 * first[name] + 0.25 * second[name]
        torch.testing.assert_close(value, 0.75 * step + 0.25 * third[name])
    assert_identical(third, weights_of(plain))


def test_what_is_measured_and_kept_is_the_average_that_is_saved(tmp_path: Path) -> None:
    seen: dict[str, list] = {"validate": [], "keep": []}
    model = small_model()

    def validate() -> dict[str, ValidationLoss]:
        seen["validate"].append(weights_of(model))
        return {"": ValidationLoss(2.0, 1.5, 10)}

    hooks = Hooks(validate, keep=lambda step, tokens: seen["keep"].append(weights_of(model)))
    options = {"ema": 0.75, "validation": {"times": 2}, "checkpoint": {"at": [2]}}
    trainer = small_trainer(
        tmp_path / "one", model=model, hooks=hooks, batches=SmallBatches(steps=4), **options
    )
    trainer.run()
    assert_identical(seen["validate"][-1], weights_of(model))
    assert_identical(seen["keep"][0], seen["validate"][0])
    # Looking at the average half way changes nothing of what is learnt.
    blind = small_model()
    small_trainer(tmp_path / "two", model=blind, batches=SmallBatches(steps=4), ema=0.75).run()
    assert_identical(weights_of(blind), weights_of(model))


def test_moments_of_a_parent_are_taken_over(tmp_path: Path) -> None:
    """L8: the first step with the parent's moments is the next step that torch's AdamW would make."""
    parent = small_trainer(tmp_path / "parent", optimiser="adamw")
    parent.run()
    moments = {name: tensor.clone() for name, tensor in parent.optimiser.state().items()}
    model, theirs = small_model(seed=2), small_model(seed=2)
    child = small_trainer(tmp_path / "child", model=model, parent_moments=moments, optimiser="adamw")
    rates = {"embedding.weight": RATES.embeddings, "head.weight": RATES.head}
    named = dict(theirs.named_parameters())
    groups = [
        {
            "params": [parameter],
            "lr": rates.get(name, RATES.matrices if parameter.dim() > 1 else RATES.scalars),
            "weight_decay": RATES.weight_decay if parameter.dim() > 1 and name != "embedding.weight" else 0.0,
        }
        for name, parameter in named.items()
    ]
    reference = torch.optim.AdamW(groups, betas=RATES.betas, eps=RATES.epsilon)
    for name, parameter in named.items():
        reference.state[parameter] = {
            "step": torch.tensor(8.0),
            "exp_avg": moments[f"first.{name}"].clone(),
            "exp_avg_sq": moments[f"second.{name}"].clone(),
        }
    rows = SmallBatches().rows(0)
    result = NextToken().loss(theirs, collate(rows))
    (result.sum / sum(float(row.weights.sum()) for row in rows)).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    reference.step()
    child._one_step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-5, msg=name)


def test_validation_samples_and_kept_places_come_when_they_are_due(tmp_path: Path) -> None:
    seen: dict[str, list] = {"validate": [], "sample": [], "keep": []}

    def validate() -> dict[str, ValidationLoss]:
        seen["validate"].append(trainer.step)
        return {"": ValidationLoss(2.0, 1.5, 10), "facts": ValidationLoss(3.0, 2.5, 10)}

    hooks = Hooks(validate, seen["sample"].append, lambda step, tokens: seen["keep"].append((step, tokens)))
    trainer = small_trainer(
        tmp_path, hooks=hooks, batches=SmallBatches(steps=10), validation={"times": 4}, samples={"times": 2},
        checkpoint={"at": [3, "tokens=300"]},
    )  # fmt: skip
    trainer.run()
    assert seen["validate"] == [3, 5, 8, 10]
    assert seen["sample"] == [5, 10]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    reached = next(row for row in rows if row["tokens"] >= 300)
    assert (reached["step"], reached["tokens"]) in seen["keep"]
    assert any(step == 3 for step, _ in seen["keep"])
    assert rows[-1]["bits_per_byte/facts"] == 2.5


def test_a_place_in_tokens_that_a_step_reaches_exactly_is_kept_then_and_only_then(tmp_path: Path) -> None:
    reached = [
        sum(len(row) for step in range(count) for row in SmallBatches().rows(step)) for count in range(9)
    ]
    kept: list[tuple[int, int]] = []
    hooks = Hooks(keep=lambda step, tokens: kept.append((step, tokens)))
    places = [f"tokens={reached[3]}", f"tokens={reached[5] + 1}"]
    small_trainer(tmp_path, hooks=hooks, checkpoint={"at": places}).run()
    assert kept == [(3, reached[3]), (6, reached[6])]


def test_a_place_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match="'epoch=2' names no place"):
        small_trainer(tmp_path, checkpoint={"at": ["epoch=2"]})


def test_losses_by_source_add_up_to_the_whole(tmp_path: Path) -> None:
    from dataclasses import replace

    class TwoSources(SmallBatches):
        def rows(self, step: int) -> list:
            rows = super().rows(step)
            return [replace(row, sources=(index % 2,) * len(row.lengths)) for index, row in enumerate(rows)]

    objective = NextToken(sources=("town", "river"))
    batches = TwoSources(steps=1)
    small_trainer(tmp_path, objective=objective, batches=batches, micro_batch=10_000).run()
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    weights = [sum(float(r.weights.sum()) for r in batches.rows(0)[index::2]) for index in (0, 1)]
    mixed = (row["loss/town"] * weights[0] + row["loss/river"] * weights[1]) / sum(weights)
    assert row["loss"] == pytest.approx(mixed, abs=1e-5)


def test_training_in_a_thread_does_not_touch_signals(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    results: list[dict] = []
    thread = threading.Thread(target=lambda: results.append(small_trainer(tmp_path).run()))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 8
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_model_learns(tmp_path: Path) -> None:
    model = small_model()
    small_trainer(tmp_path, model=model, batches=SmallBatches(steps=60)).run()
    values = [loss for loss, _ in losses(tmp_path)]
    assert values[-1] < values[0] - 1.0
    batch = collate(SmallBatches().rows(99))
    result = NextToken().loss(model, batch)
    held_out = float(result.sum.detach() / batch.weights.sum())
    assert held_out < values[0] - 1.0


def test_autocast_as_on_a_gpu_gives_the_gradient_of_float32_but_for_rounding() -> None:
    """The GPU's path, on the processor: autocast must reach every product, the hand-written ones too.

    Bfloat16 rounds by up to 2^-8 = 0.4 %, which over two layers made 0.6 to 2.7 % of each gradient.
    """
    factors: list[set[torch.dtype]] = [set(), set()]
    gradients, values = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if "mm" in str(function):
                factors[autocast] |= {one.dtype for one in arguments if isinstance(one, torch.Tensor)}
            return function(*arguments, **(keywords or {}))

    for autocast in (False, True):
        model = small_model()
        batch = collate(SmallBatches().rows(0))
        with Watch():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = NextToken().loss(model, batch).sum
            loss.backward()
        values.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert factors == [{torch.float32}, {torch.bfloat16}]
    assert values[1] == pytest.approx(values[0], rel=0.005)
    for name, exact in gradients[0].items():
        apart = torch.linalg.vector_norm(gradients[1][name] - exact)
        assert apart < 0.06 * torch.linalg.vector_norm(exact), name


def test_the_balance_of_experts_is_part_of_the_loss() -> None:
    from trivium.model.config import ExpertsConfig

    def loss_of(balance: float) -> Loss:
        experts = ExpertsConfig(count=4, per_token=2, inner_width=16, balance=balance)
        return NextToken().loss(small_model(experts=experts), batch)

    batch = collate(SmallBatches().rows(0))
    without, with_balance = loss_of(0.0), loss_of(0.1)
    auxiliary, weight = with_balance.metrics["aux_loss"]
    assert with_balance.sum.item() == pytest.approx(float(without.sum.detach() + 0.1 * auxiliary), rel=1e-5)
    assert float(auxiliary / weight) >= 0.99, "four experts in perfect balance have a loss of one"
