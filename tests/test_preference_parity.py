"""Parity with TRL's DPO, KTO, CPO and ORPO trainers on identical batches: loss, gradient and measures."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from judging import PAIRS, batches_of, in_order, model_and_reference, objective_of, pairs
from tuning import save, tokenizer_of

from trivium.data.preferences import unpaired
from trivium.data.rows import collate
from trivium.learn.objectives.preference_losses import PreferenceNumbers
from trivium.model.folder import stored_form
from trivium.model.weights import stored_tensors

os.environ.setdefault("WANDB_DISABLED", "true")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")
pytestmark = pytest.mark.slow

BETA, SMOOTHING, GAMMA = 0.3, 0.1, 0.7
DPO = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
WITHOUT_SMOOTHING = ("sigmoid", "sigmoid_norm")
"""TRL's DPO trainer smooths the labels of the other losses only."""


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 5, "use_cpu": True, "bf16": False,
        "report_to": [], "gradient_checkpointing": False, "max_length": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the model and its reference, opened by transformers."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tokenizer_of("own")
    model, reference = model_and_reference()
    save(folder / "model", model, tokenizer)
    save(folder / "reference", reference, tokenizer)
    return folder


def opened(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("model", "reference")
    ]
    return *models, AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def dpo(saved):
    from trl import DPOConfig, DPOTrainer

    model, reference, tokenizer = opened(saved)
    arguments = DPOConfig(beta=BETA, label_smoothing=SMOOTHING, **common(saved))
    return DPOTrainer(
        model=model, ref_model=reference, args=arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(PAIRS),
    )  # fmt: skip


def gradients_agree(model, theirs) -> None:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    reference = dict(theirs.named_parameters())
    largest = max(1.0, *(float(parameter.grad.abs().max()) for parameter in reference.values()))
    for stored in stored_tensors(model.config):
        torch.testing.assert_close(
            stored_form(stored, found), reference[stored.name].grad, atol=1e-5 * largest, rtol=1e-4
        )


def ours(losses: dict[str, float], numbers: PreferenceNumbers, feed_options: Any = None, **options: Any):
    model, reference = model_and_reference()
    objective = objective_of(losses, reference, numbers, **options)
    rows = in_order(batches_of(pairs(), losses, **(feed_options or {})))
    found = objective.loss(model, collate(rows))
    (found.sum / objective.weight(rows)).backward()
    measures = {name: float(total) / float(weight) for name, (total, weight) in found.metrics.items()}
    return model, found.sum.item() / objective.weight(rows), measures


def test_texts_become_the_tokens_that_trl_makes(dpo) -> None:
    for mine, theirs in zip(pairs(), dpo.train_dataset, strict=True):
        assert mine.prompt.tolist() == theirs["prompt_ids"]
        assert mine.completions[0].tokens.tolist() == theirs["chosen_ids"]
        assert mine.completions[1].tokens.tolist() == theirs["rejected_ids"]


@pytest.mark.parametrize("name", [*DPO, "sigmoid + sft"])
def test_losses_of_the_dpo_trainer(dpo, name: str) -> None:
    shares = {"sigmoid": 1.0, "sft": 0.3} if "+" in name else {name: 1.0}
    smoothing = 0.0 if set(shares) & set(WITHOUT_SMOOTHING) else SMOOTHING
    model, loss, measures = ours(shares, PreferenceNumbers(beta=BETA, label_smoothing=smoothing))
    dpo.loss_types, dpo.loss_weights = list(shares), list(shares.values())
    dpo.model.zero_grad()
    dpo.model.train()
    dpo._metrics["train"].clear()
    batch = dpo.data_collator([dpo.train_dataset[n] for n in range(len(PAIRS))])
    expected = dpo.compute_loss(dpo.model, batch)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    gradients_agree(model, dpo.model)
    for metric, values in dpo._metrics["train"].items():
        if metric.startswith(("rewards/", "logps/", "logits/")) and name != "sft":
            assert measures[metric] == pytest.approx(values[0], abs=2e-5), metric


def test_lengths_weighed_down_as_in_ld_dpo(dpo) -> None:
    model, loss, _ = ours({"sigmoid": 1.0}, PreferenceNumbers(beta=BETA), ld_alpha=0.4)
    dpo.loss_types, dpo.loss_weights, dpo.ld_alpha = ["sigmoid"], [1.0], 0.4
    dpo.model.zero_grad()
    expected = dpo.compute_loss(
        dpo.model, dpo.data_collator([dpo.train_dataset[n] for n in range(len(PAIRS))])
    )
    dpo.ld_alpha = None
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    gradients_agree(model, dpo.model)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_divergences_of_the_dpo_trainer(dpo, name: str, divergence: str) -> None:
    model, loss, _ = ours({name: 1.0}, PreferenceNumbers(beta=BETA), divergence=divergence, bend=0.4)
    dpo.loss_types, dpo.loss_weights = [name], [1.0]
    dpo.f_divergence_type, dpo.f_alpha_divergence_coef = divergence, 0.4
    dpo.model.zero_grad()
    expected = dpo.compute_loss(
        dpo.model, dpo.data_collator([dpo.train_dataset[n] for n in range(len(PAIRS))])
    )
    dpo.f_divergence_type = "reverse_kl"
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    gradients_agree(model, dpo.model)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_losses_of_the_kto_trainer(saved, name: str) -> None:
    from trl import KTOConfig, KTOTrainer

    model, reference, tokenizer = opened(saved)
    rows = [
        {"prompt": row["prompt"], "completion": row[column], "label": column == "chosen"}
        for row in PAIRS
        for column in ("chosen", "rejected")
    ]
    arguments = KTOConfig(
        beta=BETA, loss_type=name, desirable_weight=1.2, undesirable_weight=0.8,
        **{**common(saved), "per_device_train_batch_size": len(rows)},
    )  # fmt: skip
    trainer = KTOTrainer(
        model=model, ref_model=reference, args=arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    mine = unpaired(pairs())
    batches = batches_of(pairs(), {name: 1.0})
    examples = []
    for number, one in enumerate(mine):
        example = {
            "prompt_ids": one.prompt.tolist(),
            "completion_ids": one.completions[0].tokens.tolist(),
            "label": bool(one.label),
        }
        if name == "kto":
            # TRL takes the row before, which here answers the same prompt half of the time.
            example["KL_completion_ids"] = mine[number - 1 - number % 2].completions[0].tokens.tolist()
        examples.append(example)
    model.train()
    expected = trainer.compute_loss(model, trainer.data_collator(examples))
    expected.backward()
    own, reference_own = model_and_reference()
    objective = objective_of(
        {name: 1.0}, reference_own, PreferenceNumbers(beta=BETA), desirable=1.2, undesirable=0.8
    )
    batch = in_order(batches)
    found = objective.loss(own, collate(batch))
    (found.sum / objective.weight(batch)).backward()
    assert found.sum.item() / objective.weight(batch) == pytest.approx(expected.item(), abs=1e-5)
    gradients_agree(own, model)
    logged = trainer._metrics["train"]
    for metric in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logits/chosen"):
        total, weight = found.metrics[metric]
        assert float(total) / float(weight) == pytest.approx(logged[metric][0], abs=2e-5), metric
    if name == "kto":
        assert float(found.metrics["kl"][0]) == pytest.approx(logged["kl"][0], abs=2e-5)


def padded_sides(masked_prompt: bool = True) -> dict[str, torch.Tensor]:
    """Both answers of every pair as the CPO and ORPO trainers take them."""
    batch: dict[str, torch.Tensor] = {}
    for side, name in enumerate(("chosen", "rejected")):
        wholes = [torch.tensor([*one.prompt, *one.completions[side].tokens]) for one in pairs()]
        labels = [whole.clone() for whole in wholes]
        for label, one in zip(labels, pairs(), strict=True):
            label[: len(one.prompt)] = -100
        for column, parts, padding in (
            ("input_ids", wholes, 0), ("labels", labels, -100),
            ("attention_mask", [torch.ones_like(whole) for whole in wholes], 0),
        ):  # fmt: skip
            batch[f"{name}_{column}"] = torch.nn.utils.rnn.pad_sequence(
                parts, batch_first=True, padding_value=padding
            )
    return batch


def experimental(kind: type, theirs, **facts: Any):
    """A trainer of TRL's experimental part without its data handling, which is not what is compared."""
    trainer = object.__new__(kind)
    gather = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    trainer.__dict__.update(
        model=theirs, accelerator=gather, beta=BETA, label_smoothing=0.0, is_encoder_decoder=False,
        aux_loss_enabled=False, **facts,
    )  # fmt: skip
    return trainer


@pytest.mark.parametrize(
    ("name", "theirs", "numbers", "settings"),
    [
        ("cpo", "sigmoid", {}, {"cpo_alpha": 1.0}),
        ("cpo", "sigmoid", {"label_smoothing": SMOOTHING}, {"cpo_alpha": 0.5}),
        ("slic", "hinge", {}, {"cpo_alpha": 0.0}),
        ("simpo", "simpo", {"gamma": GAMMA}, {"cpo_alpha": 0.0}),
        ("alphapo", "simpo", {"gamma": GAMMA, "alpha": 0.25}, {"cpo_alpha": 0.0, "alpha": 0.25}),
        ("ipo", "ipo", {}, {"cpo_alpha": 0.0}),
    ],
)
def test_losses_of_the_cpo_trainer(saved, name: str, theirs: str, numbers: dict, settings: dict) -> None:
    from trl.experimental.cpo import CPOTrainer

    model, _, _ = opened(saved)
    facts = {"loss_type": theirs, "simpo_gamma": GAMMA, "pad_token_id": 0, "alpha": 0.0, **settings}
    trainer = experimental(CPOTrainer, model, **facts)
    trainer.label_smoothing = numbers.get("label_smoothing", 0.0)
    expected, logged = trainer.get_batch_loss_metrics(model, padded_sides())
    expected.backward()
    shares = {name: 1.0} | ({"sft": settings["cpo_alpha"]} if settings["cpo_alpha"] else {})
    own, loss, measures = ours(shares, PreferenceNumbers(beta=BETA, **numbers), beside="none")
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    gradients_agree(own, model)
    if name not in ("alphapo", "ipo"):
        for metric in ("rewards/chosen", "rewards/accuracies", "rewards/margins"):
            assert measures[metric] == pytest.approx(logged[metric], abs=2e-5), metric


def test_loss_of_the_orpo_trainer(saved) -> None:
    from trl.experimental.orpo import ORPOTrainer

    model, _, _ = opened(saved)
    expected, logged = experimental(ORPOTrainer, model, padding_value=0).get_batch_loss_metrics(
        model, padded_sides()
    )
    expected.backward()
    own, loss, measures = ours(
        {"orpo": 1.0, "sft": 1.0}, PreferenceNumbers(beta=BETA), {"whole_chosen": True, "share": False},
        whole_chosen=True,
    )  # fmt: skip
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    gradients_agree(own, model)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "nll_loss"):
        assert measures[metric] == pytest.approx(logged[metric], abs=2e-5), metric
