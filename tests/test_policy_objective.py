"""The policy gradient as an objective, against plain torch: every term of the loss, its sign, its weight."""

from __future__ import annotations

import pytest
import torch
from answers import answers_of, near, rows_of_answers
from small import VOCABULARY, small_model

from trivium.data.rows import PackedSequence, collate
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS, KlEstimator, Sampled
from trivium.model.transformer import Transformer

GROUPS = [[6, 3], [1, 4, 7]]
TEMPERATURE, KL, BONUS = 0.7, 0.3, 0.4


def by_hand(
    model: Transformer, rows: list[PackedSequence], mean: str, estimator: KlEstimator, unbiased: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """GRPO's loss with a divergence and a bonus for entropy, answer by answer."""
    total, terms = torch.zeros(()), {"entropy": 0.0, "kl": 0.0}
    answers = [answer for row in rows for answer in answers_of(row)]
    for answer in answers:
        scores, logprobs = answer.scores(model, TEMPERATURE), answer.logprobs(model, TEMPERATURE)
        advantages, reference = answer.columns["advantage"], answer.columns["reference"]
        ratio = torch.exp(logprobs - answer.columns["old_logprob"])
        cut = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        apart = {
            "k1": logprobs - reference,
            "k2": (logprobs - reference) ** 2 / 2,
            "k3": torch.exp(reference - logprobs) - (reference - logprobs) - 1,
        }[estimator]
        apart = apart * ratio if unbiased else apart
        entropy = torch.distributions.Categorical(logits=scores).entropy()
        losses = -cut * answer.columns["correction"] + KL * apart - BONUS * entropy
        total = total + (losses.mean() if mean == "answers" else losses.sum())
        terms["entropy"] += entropy.sum().item()
        terms["kl"] += apart.sum().item()
    return total, terms


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "mean", "estimator", "unbiased"),
    [("grpo", "answers", "k3", False), ("bnpo", "tokens", "k2", True), ("bnpo", "tokens", "k1", False)],
)
def test_loss_and_gradient_are_the_sum_of_their_terms(
    algorithm: str, mean: str, estimator: KlEstimator, unbiased: bool, share: bool
) -> None:
    """Surrogate against the old log-probabilities, plus the divergence, less the entropy."""
    model = small_model()
    rows = rows_of_answers(VOCABULARY, GROUPS, share=share, aggregation=ALGORITHMS[algorithm].aggregation)
    near(model, rows, 0.3, TEMPERATURE)
    expected, terms = by_hand(model, rows, mean, estimator, unbiased)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    objective = PolicyGradient(
        ALGORITHMS[algorithm], ALGORITHMS[algorithm].numbers, temperature=TEMPERATURE, kl=KL,
        estimator=estimator, unbiased=unbiased, entropy_bonus=BONUS,
    )  # fmt: skip
    loss = objective.loss(model, collate(rows))
    torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=1e-5)
    loss.sum.backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
    for name, value in terms.items():
        assert float(loss.metrics[name][0]) == pytest.approx(value, rel=1e-4)
        assert float(loss.metrics[name][1]) == sum(map(sum, GROUPS))


def test_the_weight_is_what_the_feed_counted() -> None:
    rows = rows_of_answers(VOCABULARY, GROUPS, share=True)
    objective = PolicyGradient(ALGORITHMS["dapo"], ALGORITHMS["dapo"].numbers)
    assert objective.weight(rows) == 6 + 3 + 1 + 4 + 7


@pytest.mark.parametrize(("algorithm", "cut", "total"), [("gspo", [1, 1, 2], 3), ("grpo", [1, 2, 3], 7)])
def test_what_the_clip_cuts_is_counted_by_completion_where_that_has_one_ratio(
    algorithm: str, cut: list[int], total: int
) -> None:
    """Completions of 1, 2 and 4 tokens: one made less likely, one likelier, one left alone."""
    lengths, moved = torch.tensor([1, 2, 4]), torch.tensor([-0.5, 0.5, 0.0])
    completion = torch.arange(3).repeat_interleave(lengths)
    old, advantages = torch.zeros(7), torch.tensor([-1.0, 1.0, 1.0])[completion]
    sampled = Sampled(moved[completion], old, advantages, torch.ones(7), completion, 3)
    objective = PolicyGradient(ALGORITHMS[algorithm], ALGORITHMS[algorithm].numbers)
    ratio = ALGORITHMS[algorithm].ratio(sampled)
    found = objective._clipped_shares(sampled, ratio, torch.tensor(7.0))
    shares = [found[f"clip_ratio/{part}_mean"] for part in ("low", "high", "region")]
    assert [float(part) for part, _ in shares] == pytest.approx(cut)
    assert {float(whole) for _, whole in shares} == {total}
