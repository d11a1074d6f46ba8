"""Every objective with a model and one batch of rows, for laws that hold for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from judging import batches_of, in_order, model_and_reference, objective_of, pairs
from small import SmallBatches, small_model
from torch import Tensor

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.data.steps import StepSolution, row_of_steps
from trivium.learn.objectives.distillation import Distillation
from trivium.learn.objectives.distillation_losses import DistillationNumbers
from trivium.learn.objectives.draft_heads import DraftsAhead
from trivium.learn.objectives.near_parent import NearPredictions, NearWeights
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS, PPO_ALGORITHMS, Aggregation, loss_weights
from trivium.learn.objectives.preference import UNPAIRED
from trivium.learn.objectives.preference_losses import PAIR_LOSSES, PreferenceNumbers
from trivium.learn.objectives.reward import BradleyTerry, StepCorrectness
from trivium.model.config import ExpertsConfig
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.scalar_head import ScalarHead, without_language_head
from trivium.model.transformer import Transformer


class Case(NamedTuple):
    """A model, what it learns, the rows of the one step that is repeated, and a learning rate."""

    model: Transformer
    objective: Any
    rows: list[PackedSequence]
    rate: float = 0.01
    optimiser: str = "muon"


class OneBatch:
    """The same rows at every step."""

    fingerprint = "one-batch"

    def __init__(self, rows: list[PackedSequence], steps: int) -> None:
        self.batch, self.steps = rows, steps

    def rows(self, step: int) -> list[PackedSequence]:
        return self.batch

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {}

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        assert json == {}


def _frozen(model: Transformer) -> Transformer:
    return copy.deepcopy(model).requires_grad_(False)


def _next_token(device: str, **settings: Any) -> Case:
    return Case(small_model().to(device), NextToken(**settings), SmallBatches().rows(0))


def _experts(device: str) -> Case:
    experts = ExpertsConfig(count=4, per_token=2, inner_width=16, balance=0.01)
    return Case(small_model(experts=experts).to(device), NextToken(), SmallBatches().rows(0))


def _near_weights(device: str) -> Case:
    model = small_model().to(device)
    return Case(model, NextToken(guards=[NearWeights(model, 0.01)]), SmallBatches().rows(0))


def _near_predictions(device: str) -> Case:
    model = small_model().to(device)
    guard = NearPredictions(0.3, _frozen(model))
    return Case(model, NextToken(guards=[guard]), SmallBatches().rows(0))


def _distillation(device: str, loss: str) -> Case:
    model, teacher = small_model().to(device), _frozen(small_model(seed=1)).to(device)
    hidden = loss == "mse_hidden"
    numbers = DistillationNumbers("forward_kl" if hidden else loss, label_weight=0.2)  # type: ignore[arg-type]
    return Case(model, Distillation(teacher, numbers, hidden_states=hidden), SmallBatches().rows(0))


def _adapter(device: str, *guards: Any) -> Case:
    model = small_model().to(device)
    add_adapter(model, AdapterSettings(rank=8), seed=1)
    return Case(model, NextToken(guards=guards), SmallBatches().rows(0), 0.03, "adamw")


def _drafts(device: str) -> Case:
    model = small_model().to(device)
    return Case(model, DraftsAhead.on(model, 2), SmallBatches().rows(0), 0.003, "adamw")


def _judged(device: str) -> tuple[Transformer, Transformer]:
    model, reference = model_and_reference()
    return model.to(device), reference.to(device)


def _preference(device: str, loss: str) -> Case:
    model, reference = _judged(device)
    losses = {loss: 1.0, "sft": 0.1} if loss in ("cpo", "orpo") else {loss: 1.0}
    # DiscoPOP's own temperature makes a step of its loss out of which any rounding leads another way.
    numbers = PreferenceNumbers(beta=0.1, label_smoothing=0.01, temperature=0.5)
    objective = objective_of(losses, reference, numbers)
    return Case(model, objective, in_order(batches_of(pairs(), losses)), 0.001, "adamw")


def _adapter_off(device: str) -> Case:
    model, _ = _judged(device)
    add_adapter(model, AdapterSettings(rank=8), seed=1)
    losses = {"sigmoid": 1.0}
    objective = objective_of(losses, model, PreferenceNumbers(), beside="adapter off")
    return Case(model, objective, in_order(batches_of(pairs(), losses)), 0.01, "adamw")


def _reward(device: str) -> Case:
    model, _ = _judged(device)
    model = without_language_head(model)
    objective = BradleyTerry(ScalarHead(model.config.width, seed=0).to(device), centring=0.01)
    return Case(model, objective, in_order(batches_of(pairs(), {"sigmoid": 1.0})), 0.003, "adamw")


def _steps(device: str) -> Case:
    model = without_language_head(small_model()).to(device)
    random = np.random.default_rng(4)
    solutions = [
        StepSolution(
            f"s{place}", random.integers(0, 61, 18), np.array([8, 12, 17]), np.array([1.0, place % 2, 0.0])
        )
        for place in range(6)
    ]
    objective = StepCorrectness(ScalarHead(model.config.width, seed=0, bias=True).to(device))
    return Case(model, objective, [row_of_steps([one]) for one in solutions], 0.003, "adamw")


def answers(
    vocabulary: int, *, share: bool = True, aggregation: Aggregation = "token"
) -> list[PackedSequence]:
    """Four sampled answers to a prompt of one row, with all that policies learn from."""
    random = np.random.default_rng(5)
    prompt = random.integers(0, vocabulary, 7)
    documents, learned = ([prompt[:-1]], [np.zeros(6)]) if share else ([], [])
    start = prompt[-1:] if share else prompt
    advantages, divisors = [1.0, -0.5, 0.5, -1.0], []
    for length in (5, 9, 12, 3):
        documents.append(np.concatenate((start, random.integers(0, vocabulary, length))))
        weight, divisor = loss_weights(length, aggregation, 12)
        learned.append((np.arange(len(documents[-1])) >= len(start)) * weight)
        divisors.append(divisor)
    count = len(documents)
    silent = count - len(advantages)

    def column(value: Callable[[int, int], np.ndarray]) -> list[np.ndarray]:
        made = [np.zeros(len(one), dtype=np.float32) for one in documents[:silent]]
        return made + [value(i, len(one)).astype(np.float32) for i, one in enumerate(documents[silent:])]

    def uneven(low: float, high: float) -> list[np.ndarray]:
        return column(lambda _, length: random.uniform(low, high, length))

    columns = {
        "advantage": column(lambda i, length: np.full(length, advantages[i])),
        "old_logprob": uneven(-4.2, -4.0),
        "sampled_logprob": uneven(-4.2, -4.0),
        "reference": uneven(-4.2, -4.0),
        "correction": column(lambda _, length: np.ones(length)),
        "value": uneven(-0.1, 0.1),
        "return": uneven(-1.0, 1.0),
    }
    facts: dict[str, list] = {
        "back": list(range(count)) if share else [0] * count,
        "divisor": [0.0] * silent + divisors,
        "fresh": [True] * count,
    }
    return [row_of_documents(documents, learned=learned, columns=columns, facts=facts)]


def _policy(device: str, name: str, **settings: Any) -> Case:
    model = small_model().to(device)
    algorithm = ALGORITHMS[name]
    objective = PolicyGradient(algorithm, algorithm.numbers, **settings)
    rows = answers(model.config.vocabulary, aggregation=algorithm.aggregation)
    return Case(model, objective, rows, 0.0005, "adamw")


def _ppo(device: str, critic: bool) -> Case:
    model = small_model().to(device)
    head = ScalarHead(model.config.width, seed=1).to(device) if critic else None
    algorithm = PPO_ALGORITHMS["gae" if critic else "rloo"]
    objective = PolicyGradient(
        algorithm, algorithm.numbers, extra=head, value_coefficient=1.0, entropy_bonus=0.001, prune=True
    )
    return Case(model, objective, answers(model.config.vocabulary, share=False), 0.002, "adamw")


CASES: dict[str, Callable[[str], Case]] = {
    "next-token": _next_token,
    "next-token-smoothed": partial(_next_token, z_loss=1e-3, label_smoothing=0.1, noise=0.1),
    "next-token-experts": _experts,
    "next-token-adapter": _adapter,
    "draft-heads": _drafts,
    "near-weights": _near_weights,
    "near-predictions": _near_predictions,
    "near-predictions-adapter-off": lambda device: _adapter(device, NearPredictions(0.3)),
    **{f"preference-{name}": partial(_preference, loss=name) for name in [*PAIR_LOSSES, *sorted(UNPAIRED)]},
    **{
        f"distillation-{loss}": partial(_distillation, loss=loss)
        for loss in ("forward_kl", "reverse_kl", "js", "mse_hidden")
    },
    "preference-adapter-off": _adapter_off,
    "reward": _reward,
    "process-reward": _steps,
    **{f"policy-{name}": partial(_policy, name=name) for name in ALGORITHMS},
    "policy-kl": partial(_policy, name="grpo", kl=0.1, entropy_bonus=0.01),
    "ppo": partial(_ppo, critic=False),
    "ppo-critic": partial(_ppo, critic=True),
}
"""Every loss there is, on a device; a test holds the names against the objectives of the package."""
FAMILIES = (
    "next-token", "near-predictions", "near-predictions-adapter-off", "preference-sigmoid",
    "preference-kto", "preference-adapter-off", "reward", "policy-grpo", "ppo-critic",
)  # fmt: skip
"""One of each way of computing."""
COMPILED = ("next-token", "ppo-critic")
"""What a compiler sees in different forms: all hidden states, or some of them."""
