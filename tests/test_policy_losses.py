"""Policy-gradient losses against loops written from the papers, and the traps of the field, one test each."""

import math

import numpy as np
import pytest
import torch

from trivium.learn.objectives.advantages import (
    GROUP_STABILITY,
    combined,
    group_advantages,
    overlong_penalty,
    without_variance,
)
from trivium.learn.objectives.policy_losses import (
    ALGORITHMS,
    Algorithm,
    PolicyNumbers,
    Sampled,
    clipped,
    kl_estimate,
    loss_weights,
)

LENGTHS = [3, 7, 5, 1]
LONGEST = 8


def drawn(seed: int = 0) -> dict[str, list[list[float]]]:
    random = np.random.default_rng(seed)
    logprobs = [list(-random.uniform(0.1, 3, length)) for length in LENGTHS]
    old = [[value + random.normal(0, 0.4) for value in answer] for answer in logprobs]
    advantages = [[float(value)] * length for value, length in zip([1.2, -0.7, 0.4, -1.5], LENGTHS)]
    mask = [[1.0] * length for length in LENGTHS]
    mask[1][2] = mask[1][3] = 0.0
    return {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages, "mask": mask}


def sampled_of(values: dict[str, list[list[float]]], requires_grad: bool = False) -> Sampled:
    flat = {
        name: torch.tensor([x for answer in answers for x in answer], dtype=torch.double)
        for name, answers in values.items()
    }
    flat["logprobs"].requires_grad_(requires_grad)
    answer = torch.tensor([i for i, answer in enumerate(values["mask"]) for _ in answer])
    return Sampled(**flat, completion=answer, completions=len(values["mask"]))


def loss_of(algorithm: Algorithm, sampled: Sampled) -> torch.Tensor:
    tokens = algorithm.loss(sampled, algorithm.ratio(sampled), algorithm.numbers)
    parts = [loss_weights(int(n), algorithm.aggregation, LONGEST) for n in sampled.lengths]
    weights = torch.tensor([weight for weight, _ in parts], dtype=torch.double)[sampled.completion]
    return (tokens * weights * sampled.mask).sum() / sum(divisor for _, divisor in parts)


def reference(name: str, v: dict[str, list[list[float]]]) -> float:
    """The loss once more, answer by answer and token by token."""
    numbers = ALGORITHMS[name].numbers
    per_answer, learned = [], []
    for logprobs, old, advantages, mask in zip(v["logprobs"], v["old_logprobs"], v["advantages"], v["mask"]):
        kept = [t for t in range(len(mask)) if mask[t]]
        moved = sum(logprobs[t] - old[t] for t in kept)
        one_ratio = math.exp(moved if name == "rloo" else moved / len(kept))
        power, decay = (2, 3) if advantages[0] >= 0 else (3, 2)
        fading = math.exp(decay) * math.exp(moved) ** power * math.exp(-decay * math.exp(moved))
        total = 0.0
        for t in kept:
            ratio = one_ratio if name in ("gspo", "luspo", "rloo") else math.exp(logprobs[t] - old[t])
            a = advantages[t]
            held = min(max(ratio, 1 - numbers.clip_low), 1 + numbers.clip_high)
            temperature = 1.0 if a > 0 else 1.05
            total += {
                "cispo": -min(ratio, numbers.clip_high) * a * logprobs[t],
                "sapo": -4 / temperature / (1 + math.exp(-temperature * (ratio - 1))) * a,
                "vespo": -fading * a * logprobs[t],
                "reinforce": -a * logprobs[t],
                "expert_iteration": -logprobs[t] if a > 0 else 0.0,
            }.get(name, -min(ratio * a, held * a))
        per_answer.append(total)
        learned.append(len(kept))
    if name in ("grpo", "gspo", "sapo", "rloo"):
        return sum(total / count for total, count in zip(per_answer, learned)) / len(learned)
    if name == "luspo":
        return sum(per_answer) / len(per_answer)
    if name == "dr_grpo":
        return sum(per_answer) / (len(per_answer) * LONGEST)
    return sum(per_answer) / sum(learned)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_equals_its_loop(name: str) -> None:
    values = drawn()
    assert float(loss_of(ALGORITHMS[name], sampled_of(values))) == pytest.approx(
        reference(name, values), abs=1e-12
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_masked_tokens_get_no_gradient(name: str) -> None:
    """Pitfall M: what a tool wrote is never trained."""
    sampled = sampled_of(drawn(), requires_grad=True)
    loss_of(ALGORITHMS[name], sampled).backward()
    gradient = sampled.logprobs.grad
    assert torch.all(gradient[sampled.mask == 0] == 0)
    assert torch.any(gradient[sampled.mask == 1] != 0)


@pytest.mark.parametrize(("name", "ratio"), [("dapo", 1.0), ("dr_grpo", 1.0), ("cispo", 1.0), ("grpo", 10.0)])
def test_how_much_a_token_counts_in_a_short_and_a_long_answer(name: str, ratio: float) -> None:
    """Pitfall O: under grpo a token of an answer a tenth as long weighs ten times as much."""
    lengths = [10, 100]
    values = {
        "logprobs": [[-1.0] * n for n in lengths],
        "old_logprobs": [[-1.0] * n for n in lengths],
        "advantages": [[1.0] * n for n in lengths],
        "mask": [[1.0] * n for n in lengths],
    }
    sampled = sampled_of(values, requires_grad=True)
    loss_of(ALGORITHMS[name], sampled).backward()
    gradient = sampled.logprobs.grad
    assert float(gradient[0] / gradient[-1]) == pytest.approx(ratio)


def test_the_edges_of_groups() -> None:
    """Pitfall P: a group of one, of equals, with answers that were not graded: by hand."""
    assert group_advantages([1.0], "group").tolist() == [0.0]
    assert group_advantages([0.5, 0.5, 0.5], "group").tolist() == [0.0] * 3
    assert group_advantages([None, None], "group").tolist() == [0.0, 0.0]
    assert group_advantages([None, 3.0], "group").tolist() == [0.0, 0.0]
    mixed = group_advantages([1.0, None, 0.0], "group")
    spread = math.sqrt(0.5) + GROUP_STABILITY
    np.testing.assert_allclose(mixed, [0.5 / spread, 0.0, -0.5 / spread])
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.0], "centred"), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(group_advantages([3.0, 0.0, 0.0], "leave_one_out"), [3.0, -1.5, -1.5])
    np.testing.assert_allclose(group_advantages([1.0, 0.0], "baseline", baseline=0.25), [0.75, -0.25])
    np.testing.assert_allclose(group_advantages([1.0, 0.4, None], "accept"), [1.0, 0.0, 0.0])
    assert without_variance([1.0, 1.0, None])
    assert not without_variance([1.0, 0.0])


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = [0.3, 1.0, 0.0, 0.7]
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    np.testing.assert_allclose(group_advantages(rewards, "leave_one_out"), expected)


def test_no_scorer_dominates_by_its_scale_when_normalised_first() -> None:
    """Pitfall Q: one scorer scaled by 100 changes nothing under GDPO and everything under the sum."""
    rewards = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    scaled = rewards * np.array([1.0, 100.0])
    before = combined(rewards, [1.0, 1.0], normalise_first=True)
    after = combined(scaled, [1.0, 1.0], normalise_first=True)
    np.testing.assert_allclose(before, after, atol=1e-3)
    assert not np.allclose(combined(rewards, [1, 1]), combined(scaled, [1, 1]))


def test_gdpo_divides_by_the_standard_deviation_of_a_sample() -> None:
    """As torch's `std`, and so TRL's, has it; what a scorer left out does not count in its column."""
    rewards = np.array([[1.0, 0.2], [0.0, 0.9], [4.0, math.nan], [2.0, 0.4], [0.5, math.nan]])
    columns = [rewards[:, 0], rewards[[0, 1, 3], 1]]
    first, second = ((one - one.mean()) / (one.std(ddof=1) + GROUP_STABILITY) for one in columns)
    expected = 2.0 * first
    expected[[0, 1, 3]] += 0.5 * second
    np.testing.assert_allclose(combined(rewards, [2.0, 0.5], normalise_first=True), expected, rtol=1e-12)


def test_a_row_no_scorer_applies_to_has_no_reward() -> None:
    rewards = np.array([[math.nan, math.nan], [1.0, math.nan]])
    total = combined(rewards, [1.0, 2.0])
    assert math.isnan(total[0])
    assert total[1] == 1.0


def test_divergence_estimators_by_exact_enumeration() -> None:
    """Pitfall N: over all six actions, k1 and k3 average to KL(p||q); k3's gradient is the forward KL's."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.double, requires_grad=True)
    q = torch.randn(6, dtype=torch.double).log_softmax(-1)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def p() -> torch.Tensor:
        return logits.log_softmax(-1)

    reverse = (p().exp() * (p() - q)).sum()
    forward = (q.exp() * (q - p())).sum()
    frozen = p().exp().detach()
    for estimator in ("k1", "k3"):
        value = (frozen * kl_estimate(p(), q, estimator)).sum()
        assert value.item() == pytest.approx(reverse.item(), abs=1e-12)
    zero = gradient((frozen * kl_estimate(p(), q, "k1")).sum())
    torch.testing.assert_close(zero, torch.zeros(6, dtype=torch.double), atol=1e-12, rtol=0)
    second = gradient((frozen * kl_estimate(p(), q, "k2")).sum())
    torch.testing.assert_close(second, gradient(reverse), atol=1e-12, rtol=0)
    third = gradient((frozen * kl_estimate(p(), q, "k3")).sum())
    torch.testing.assert_close(third, gradient(forward), atol=1e-12, rtol=0)
    behaviour = torch.randn(6, dtype=torch.double).softmax(-1)
    corrected = gradient((behaviour * (p().exp() / behaviour) * kl_estimate(p(), q, "k3")).sum())
    torch.testing.assert_close(corrected, gradient(reverse), atol=1e-12, rtol=0)


def test_clip_higher_lets_good_tokens_rise_further_than_bad_ones_fall() -> None:
    values = {
        "logprobs": [[math.log(1.25)], [math.log(0.75)]],
        "old_logprobs": [[0.0], [0.0]],
        "advantages": [[1.0], [-1.0]],
        "mask": [[1.0], [1.0]],
    }
    sampled = sampled_of(values, requires_grad=True)
    numbers = PolicyNumbers(clip_low=0.2, clip_high=0.28)
    clipped(sampled, torch.exp(sampled.logprobs), numbers).sum().backward()
    assert sampled.logprobs.grad[0] != 0, "1.25 is inside 1 + 0.28"
    assert sampled.logprobs.grad[1] == 0, "0.75 is outside 1 - 0.2"


@pytest.mark.parametrize(
    ("ratio", "advantage"), [(3.5, -1.0), (4.5, -1.0), (5.5, -1.0), (9.0, -2.0), (9.0, 2.0)]
)
def test_two_sided_clipping_bounds_what_a_bad_token_can_cost(ratio: float, advantage: float) -> None:
    """INTELLECT-2 (2505.07291): min(min(ratio, delta) A, clip(ratio) A), so at most delta |A|."""
    values = {
        "logprobs": [[math.log(ratio)]],
        "old_logprobs": [[0.0]],
        "advantages": [[advantage]],
        "mask": [[1.0]],
    }
    found = clipped(sampled_of(values), torch.tensor([ratio]), PolicyNumbers(dual_clip=4.0))
    expected = -min(min(ratio, 4.0) * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert float(found) == pytest.approx(expected)


def test_the_soft_punishment_of_length() -> None:
    assert overlong_penalty(90, 100, 10) == 0
    assert overlong_penalty(95, 100, 10) == -0.5
    assert overlong_penalty(100, 100, 10) == -1
    assert overlong_penalty(130, 100, 10) == -1
