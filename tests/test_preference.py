"""The stage preference: every loss starts, references agree, a killed run goes on, adapters learn."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from judging import PAIRS, batches_of, in_order, model_and_reference, objective_of, pairs
from small import assert_identical
from tuning import save, small_model, tokenizer_of, write_rows

from trivium.data.counted import CountedSource
from trivium.data.rows import collate
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.progress import Progress
from trivium.learn.objective import Loss
from trivium.learn.objectives.preference import UNPAIRED, Preference
from trivium.learn.objectives.preference_losses import PAIR_LOSSES, PreferenceNumbers
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.stages.parts import references
from trivium.stages.parts.stage import Work
from trivium.stages.preference import PreferenceStage

CHATS = [
    {
        "prompt": [{"role": "user", "content": f"the miller counts {n} sacks"}],
        "chosen": [{"role": "assistant", "content": f"{n} sacks"}],
        "rejected": [{"role": "assistant", "content": "in the hills, and the river rises"}],
    }
    for n in range(40)
]


def prepared(folder: Path) -> tuple[Path, Path]:
    tokenizer, parent = tokenizer_of("own"), folder / "parent"
    if not parent.exists():
        save(parent, small_model(tokenizer), tokenizer)
    return parent, write_rows(folder / "pairs.jsonl", CHATS)


def stage_of(**settings) -> PreferenceStage:
    given = {"kind": "preference", "from": "parent", "data": "pairs", "pairs": 4, "sycophancy": 0, "seed": 1}
    return PreferenceStage.model_validate({**given, **settings})


def run(folder: Path, **settings) -> tuple[dict, Work]:
    parent, rows = prepared(folder)
    (folder / "stage").mkdir(exist_ok=True)
    work = Work(
        "dpo", folder / "stage", {"parent": parent, "pairs": rows}, 1,
        MetricsLog(folder / "stage" / "metrics.jsonl"), Progress("test"),
    )  # fmt: skip
    return stage_of(**settings).run(work), work


def measured(path: Path) -> list[dict]:
    return [row for row in read_metrics(path) if "loss" in row]


@pytest.mark.parametrize("beside", ["parent", "stored", "adapter off"])
def test_dpo_begins_at_log_2(tmp_path, beside: str) -> None:
    adapter = {"adapter": {"rank": 4}} if beside == "adapter off" else {}
    _, work = run(tmp_path, reference=beside, steps=1, **adapter)
    (row,) = measured(work.log.path)
    # A stored number was computed in other company, and its last bit may round another way.
    exact = pytest.approx(math.log(2), abs=1e-6) if beside == "stored" else math.log(2)
    assert torch.tensor(row["loss"], dtype=torch.float32).item() == (
        exact if beside == "stored" else torch.tensor(exact, dtype=torch.float32).item()
    )
    assert abs(row["rewards/margins"]) < 1e-6


def test_it_learns_what_was_chosen_and_says_how_far_it_went(tmp_path) -> None:
    summary, work = run(tmp_path, epochs=3, learning_rate=3e-3, data={"pairs": {"validation": 0.3}})
    rows = measured(work.log.path)
    assert rows[-1]["loss"] < 0.3 < rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > 1
    assert summary["unseen"]["rewards/accuracies"]["value"] > 0.9
    assert summary["unseen"]["rewards/accuracies"]["low"] > 0.5
    assert summary["kl"]["value"] > 0.1
    assert summary["data"]["pairs"]["held_out"] + summary["data"]["pairs"]["learned_from"] == len(CHATS)
    assert not (work.folder / "reference").exists()
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected",
            "logits/chosen", "logits/rejected"} <= rows[0].keys()  # fmt: skip


def test_references_stored_and_frozen_teach_the_same(tmp_path) -> None:
    logs = []
    for beside in ("stored", "parent"):
        (tmp_path / beside).mkdir()
        _, work = run(tmp_path / beside, reference=beside, steps=6, learning_rate=1e-3)
        logs.append([(row["loss"], row["grad_norm"]) for row in measured(work.log.path)])
    for stored, frozen in zip(*logs, strict=True):
        assert stored == pytest.approx(frozen, rel=1e-4)


@pytest.mark.parametrize("loss", [*PAIR_LOSSES, *sorted(UNPAIRED)])
def test_every_loss_starts_and_moves_the_right_way(loss: str) -> None:
    """A step along the gradient lowers the loss, and raises what was chosen over what was rejected."""
    model, reference = model_and_reference()
    numbers = PreferenceNumbers(beta=0.1, label_smoothing=0.01, gamma=0.5)
    objective = objective_of({loss: 1.0}, reference, numbers)
    rows = in_order(batches_of(pairs(), {loss: 1.0}))
    before = objective.loss(model, collate(rows))
    (before.sum / objective.weight(rows)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    after = objective.loss(model, collate(rows))
    assert math.isfinite(after.sum.item())
    assert after.sum.item() < before.sum.item()
    # DiscoPOP rises where winners and losers meet: the sign of its slope says nothing at a margin near zero.
    if loss != "discopop":
        assert _likelier(after) > _likelier(before) + 1e-4


def _likelier(loss: Loss) -> float:
    """The mean reward that the loss implies for chosen answers, less that for rejected ones."""
    chosen, rejected = (loss.metrics[f"rewards/{name}"] for name in ("chosen", "rejected"))
    return float(chosen[0] / chosen[1]) - float(rejected[0] / rejected[1])


def test_a_prompt_shared_or_repeated_teaches_the_same() -> None:
    found = []
    for share in (True, False):
        model, reference = model_and_reference()
        objective = objective_of({"sigmoid": 1.0, "sft": 0.5}, reference, PreferenceNumbers())
        rows = in_order(batches_of(pairs(), objective.losses, share=share))
        loss = objective.loss(model, collate(rows))
        loss.sum.backward()
        found.append((loss.sum.item(), {name: one.grad for name, one in model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], atol=2e-5, rtol=1e-4)


def test_beta_moves_over_the_stage() -> None:
    model, reference = model_and_reference()
    losses = {"sigmoid": 1.0}
    batches = batches_of(pairs(), losses, batch=2, steps=3)
    moving = objective_of(losses, reference, PreferenceNumbers(), betas=((0.0, 0.1), (1.0, 0.5)))
    for step, beta in enumerate((0.1, 0.3, 0.5)):
        batch = collate(batches.rows(step))
        fixed = objective_of(losses, reference, PreferenceNumbers(beta=beta))
        assert moving.loss(model, batch).sum.item() == pytest.approx(fixed.loss(model, batch).sum.item())


def test_the_adapter_switched_off_is_the_reference() -> None:
    model, _ = model_and_reference()
    alone, _ = model_and_reference()
    add_adapter(model, AdapterSettings(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    batch = collate(in_order(batches_of(pairs(), {"sigmoid": 1.0})))
    off = Preference({"sigmoid": 1.0}, beside="adapter off").loss(model, batch)
    beside = Preference({"sigmoid": 1.0}, beside="parent", reference=alone).loss(model, batch)
    assert off.sum.item() == pytest.approx(beside.sum.item(), rel=1e-6)
    assert abs(off.sum.item() - len(PAIRS) * math.log(2)) > 1e-3


def test_an_adapter_learns_and_leaves_the_parent_as_it_was(tmp_path) -> None:
    summary, work = run(tmp_path, adapter={"rank": 4}, epochs=2, learning_rate=1e-2)
    assert summary["loss"] < 0.6
    assert (work.output("model") / "adapter" / "adapter_model.safetensors").is_file()


def test_kto_takes_single_answers_and_dpo_refuses_them(tmp_path) -> None:
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in CHATS
        for side in ("chosen", "rejected")
    ]
    parent, _ = prepared(tmp_path)
    rows = write_rows(tmp_path / "single.jsonl", single)
    for loss in ("kto", "dpo"):
        folder = tmp_path / loss
        folder.mkdir()
        work = Work(
            "it", folder, {"parent": parent, "pairs": rows}, 1, MetricsLog(folder / "metrics.jsonl"),
            Progress("test"),
        )  # fmt: skip
        stage = stage_of(loss=loss, steps=8, pairs=16, learning_rate=3e-3)
        if loss == "kto":
            stage.run(work)
            last = measured(work.log.path)[-1]
            assert last["rewards/chosen"] > last["rewards/rejected"]
            assert "kl" in last
        else:
            with pytest.raises(TriviumError, match="holds single answers"):
                stage.run(work)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"loss": "dpoo"}, "there is no loss `dpoo`; write one of dpo"),
        ({"loss": ["kto", "sigmoid"]}, "do not mix"),
        ({"reference": "adapter off"}, "needs an `adapter`"),
        ({"reference": "adapter off", "adapter": {"rank": 2, "train": ["head"]}}, "no part trained whole"),
        ({"loss": "apo", "divergence": "forward_kl"}, "has a meaning for"),
        ({"batch": "4k"}, "counted in `pairs`"),
        ({"tokens": "4k"}, "`steps` or `epochs`"),
        ({"steps": 3, "epochs": 1}, "one of `steps` and `epochs`"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        stage_of(**settings)


def test_papers_numbers_are_the_defaults() -> None:
    batches = batches_of(pairs(), {"simpo": 1.0})
    simpo = stage_of(loss="simpo").losses("none", batches, None)
    assert (simpo.numbers.beta, simpo.numbers.gamma) == (2.5, 1.375)
    assert stage_of(loss="orpo").loss == {"orpo": 1.0, "sft": 1.0}
    assert stage_of(loss="dpo").loss == {"sigmoid": 1.0}
    assert stage_of(loss={"dpo": 1, "sft": 0.1}).loss == {"sigmoid": 1.0, "sft": 0.1}


def _whole_stage(folder: str) -> None:
    """What the process that gets killed does."""
    torch.set_num_threads(1)
    references.PART = 4
    run(Path(folder), epochs=3, loss="bco", checkpoint={"every_steps": 1}, learning_rate=1e-3)


@pytest.mark.slow
def test_a_killed_stage_ends_as_one_left_alone(tmp_path) -> None:
    """L1, killed while the reference is being stored and while it trains, with what BCO remembers."""
    ends = []
    for name, kills in (("whole", 0), ("killed", 4)):
        folder = tmp_path / name
        folder.mkdir()
        prepared(folder)
        for kill in range(kills + 1):
            process = multiprocessing.get_context("fork").Process(target=_whole_stage, args=(str(folder),))
            process.start()
            if kill < kills:
                _wait_for_work(folder / "stage", kill, process)
                os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        assert process.exitcode == 0
        log = [
            {key: value for key, value in row.items() if "second" not in key and key != "data_wait"}
            for row in measured(folder / "stage" / "metrics.jsonl")
        ]
        ends.append((load_tensors(folder / "stage" / "model" / "model.safetensors"), log))
    assert_identical(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def _wait_for_work(stage: Path, kill: int, process: multiprocessing.process.BaseProcess) -> None:
    """Until some of the reference is stored, or until more steps are logged than before."""
    log = stage / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        if kill == 0 and list(stage.glob("reference/*/*.safetensors")):
            return
        if kill and log.is_file() and len(measured(log)) >= 5 * kill:
            return
        time.sleep(0.005)


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "kto", "bco", "ipo"])
def test_a_loss_that_looks_at_all_pairs_of_a_step_has_them_in_one_row(loss):
    config = small_model(tokenizer_of("own")).config
    opened = SimpleNamespace(config=config, work=SimpleNamespace(seed=0))
    found = stage_of(loss=[loss])._batches(opened, [CountedSource("pairs", pairs())], 1)
    assert found.together == (loss in ("aot", "kto", "bco"))
