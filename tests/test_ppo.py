"""RLHF: token by token worth against loops written from the papers, and the gradient that follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from answers import answers_of, near, rows_of_answers
from tuning import own, small_model

from trivium.data.rows import PackedSequence, collate
from trivium.generate.engine import Engine
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, FunctionReward
from trivium.learn.objective import accumulate
from trivium.learn.objectives.advantages import (
    AdvantageSettings,
    KlController,
    RunningScale,
    discounted,
    gae,
    group_advantages,
    token_rewards,
    whitened,
)
from trivium.learn.objectives.policy import PPO_NAMES, PolicyGradient
from trivium.learn.objectives.policy_losses import (
    PPO_ALGORITHMS,
    PolicyNumbers,
    Sampled,
    clipped,
    kl_estimate,
    token_ratio,
    value_losses,
)
from trivium.model.scalar_head import ScalarHead
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_worker import EngineWorker
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings

random = np.random.default_rng(0)


def lengths_of(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [len(completion) / 10 - 1 for completion in completions]


def rollouts(
    model: Any, *, advantages: AdvantageSettings | None = None, estimator: str = "gae", kl: float = 0.1,
    target: float | None = None,
    reward: Any = lengths_of, temperature: float = 1.0, longest: int = 12, **changes: Any,
) -> RolloutBatches:  # fmt: skip
    tokenizer = own()
    sampling = Sampling(max_new_tokens=longest, temperature=temperature)
    asked = ["the river", "and the miller counts", "12 or 345", "in the hills the"]
    prompts = [Prompt(tokenizer.encode(text), text, {}, text) for text in asked]
    settings = RolloutSettings(
        **{"steps": 8, "prompts_per_step": 4, "num_generations": 2, "threshold": None, **changes}
    )
    worker = EngineWorker(Engine(model, tokenizer, max_rows=12), sampling)
    return RolloutBatches(
        model, worker, prompts, Combined([FunctionReward("lengths", reward)], [1.0]),
        PPO_ALGORITHMS[estimator],
        settings, sampling=sampling, seed=3, advantages=advantages,
        critic=ScalarHead(model.config.width, seed=5) if estimator == "gae" else None,
        reference=small_model(tokenizer, seed=1).requires_grad_(False), controller=KlController(kl, target),
    )  # fmt: skip


def by_hand(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """Equation 16 of the paper, term by term."""
    found = []
    for start in range(len(rewards)):
        total = 0.0
        for ahead in range(start, len(rewards)):
            later = values[ahead + 1] if ahead + 1 < len(values) else 0.0
            total += (discount * decay) ** (ahead - start) * (
                rewards[ahead] + discount * later - values[ahead]
            )
        found.append(total)
    return found


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_gae_is_the_sum_of_discounted_td_errors(discount, decay, length):
    rewards, values = random.normal(size=length), random.normal(size=length)
    expected = by_hand(rewards.tolist(), values.tolist(), discount, decay)
    np.testing.assert_allclose(gae(rewards, values, discount, decay), expected, rtol=1e-12)


def test_gae_that_looks_to_the_end_is_what_is_to_come_less_the_value():
    rewards, values = random.normal(size=7), random.normal(size=7)
    np.testing.assert_allclose(gae(rewards, values, 0.9, 1.0) + values, discounted(rewards, 0.9), rtol=1e-12)
    to_come = [sum(0.9 ** (b - a) * rewards[b] for b in range(a, 7)) for a in range(7)]
    np.testing.assert_allclose(discounted(rewards, 0.9), to_come, rtol=1e-12)


def surrogate(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> tuple:
    """The loss of every token, each a completion of its own, and how many the clip has cut."""
    count, numbers = len(new), PolicyNumbers(clip_low=clip, clip_high=clip)
    sampled = Sampled(new, old, advantages, torch.ones_like(new), torch.arange(count), count)
    ratio = token_ratio(sampled)
    objective = PolicyGradient(PPO_ALGORITHMS["gae"], numbers)
    cut = objective._clipped_shares(sampled, ratio, torch.tensor(1.0))["clip_ratio/region_mean"][0]
    return clipped(sampled, ratio, numbers), int(cut)


def test_the_losses_are_those_of_a_loop():
    count, clip = 50, 0.2
    new, old, advantages = (torch.randn(count, dtype=torch.double) * scale for scale in (0.3, 0.3, 1.0))
    values, before, returns = (torch.randn(count, dtype=torch.double) for _ in range(3))
    losses, cut = surrogate(new, old, advantages, clip)
    errors, held = value_losses(values, before, returns, clip)
    for i in range(count):
        ratio = float(torch.exp(new[i] - old[i]))
        plain = float(advantages[i]) * ratio
        held_back = float(advantages[i]) * min(max(ratio, 1 - clip), 1 + clip)
        assert float(losses[i]) == pytest.approx(-min(plain, held_back))
        cut -= held_back < plain
        near = min(max(float(values[i]), float(before[i]) - clip), float(before[i]) + clip)
        both = (float(values[i]) - float(returns[i])) ** 2, (near - float(returns[i])) ** 2
        assert float(errors[i]) == pytest.approx(max(both) / 2)
        assert bool(held[i]) == (both[1] > both[0])
    assert cut == 0
    torch.testing.assert_close(value_losses(values, before, returns, None)[0], (values - returns) ** 2 / 2)


def test_pitfall_n_the_estimators_of_the_divergence():
    """By enumeration of six actions: k1 and k3 are unbiased, k2 is not; k1 alone may be negative."""
    policy, reference = (np.exp(one) / np.exp(one).sum() for one in random.normal(size=(2, 6)))
    exact = float((policy * np.log(policy / reference)).sum())
    logprobs = [torch.tensor(np.log(one)) for one in (policy, reference)]
    found = {kind: kl_estimate(*logprobs, kind).numpy() for kind in ("k1", "k2", "k3")}
    assert float((policy * found["k1"]).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((policy * found["k3"]).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((policy * found["k2"]).sum()) != pytest.approx(exact, abs=1e-3)
    assert found["k1"].min() < 0 <= min(found["k2"].min(), found["k3"].min())


def test_pitfall_n_the_penalty_in_the_reward_has_the_gradient_of_the_reverse_divergence():
    """k1 in the reward of a sampled action, enumerated: the policy gradient is exactly that of KL."""
    scores = torch.tensor(random.normal(size=6), requires_grad=True)
    reference = torch.tensor(random.normal(size=6)).log_softmax(0)
    logprobs = scores.log_softmax(0)
    (logprobs.exp() * (logprobs - reference)).sum().backward()
    exact = scores.grad.clone()
    scores.grad = None
    logprobs = scores.log_softmax(0)
    penalty = kl_estimate(logprobs.detach(), reference, "k1")
    # Every action as often as the policy draws it; its advantage is minus its penalty.
    losses, _ = surrogate(logprobs, logprobs.detach(), -penalty, 0.2)
    (losses * logprobs.detach().exp()).sum().backward()
    np.testing.assert_allclose(scores.grad.numpy(), exact.numpy(), atol=1e-12)


def test_penalties_on_every_token_and_the_score_on_the_last():
    found = token_rewards(np.array([0.1, -0.2, 0.3]), 2.0)
    np.testing.assert_allclose(found, [-0.1, 0.2, 1.7])


def test_whitening_scaling_comparing_and_steering():
    values = random.normal(3.0, 2.0, 100)
    white = np.concatenate(whitened(np.split(values, [40])))
    assert white.mean() == pytest.approx(0, abs=1e-9)
    assert white.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert whitened([values], centre=False)[0].mean() == pytest.approx(values.mean())
    scale = RunningScale()
    for part in np.split(values, [10, 11, 60]):
        scale.accumulate(part)
    np.testing.assert_allclose(scale.apply(values), (values - values.mean()) / values.std(ddof=1), rtol=1e-6)
    totals = np.array([1.0, 2.0, 6.0])
    found = group_advantages(totals.tolist(), "leave_one_out")
    np.testing.assert_allclose(found, [1 - 4, 2 - 3.5, 6 - 1.5])
    controller = KlController(0.1, target=6.0, horizon=1000)
    controller.update(60.0, 100)
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    controller.update(5.4, 100)
    assert controller.coefficient == pytest.approx(0.102 * (1 - 0.1 * 0.1))
    fixed = KlController(0.1)
    fixed.update(100.0, 100)
    assert fixed.coefficient == 0.1


def recomputed(feed: RolloutBatches, row: PackedSequence) -> list[dict[str, Any]]:
    """Every answer of a row by itself: its prompt and tokens as one document under both models."""
    found = []
    for answer in answers_of(row):
        with torch.no_grad():
            policy, reference = answer.logprobs(feed.model), answer.logprobs(feed.reference)
            values = feed.critic(answer.states(feed.model)).tolist() if feed.critic else []
        ended = int(answer.drawn[-1]) in own().stop_ids
        score = len(own().decode(answer.drawn.tolist())) / 10 - 1 - (0 if ended else 1.5)
        apart = (policy - reference).tolist()
        rewards = [-0.1 * one for one in apart]
        rewards[-1] += score
        found.append({
            "rewards": rewards, "values": values, "columns": answer.columns, "kl": sum(apart), "score": score,
            "prompt": tuple(answer.tokens[: answer.asked[0] + 1].tolist()),
        })  # fmt: skip
    return found


@pytest.mark.parametrize("estimator", ["gae", "rloo", "reinforce++"])
def test_a_rollout_is_worth_what_a_loop_says(estimator):
    """Scores, penalties, values, advantages and returns of every token, recomputed answer by answer."""
    advantages = AdvantageSettings(missing_eos_penalty=1.5, decay=0.9, discount=0.98)
    feed = rollouts(small_model(own()), advantages=advantages, estimator=estimator, longest=8)
    rows, measures = feed.roll_out(0)
    found = [one for row in rows for one in recomputed(feed, row)]
    assert len(found) == 8
    expected: list[list[float]] = []
    for place, one in enumerate(found):
        rewards = one["rewards"]
        if estimator == "gae":
            expected.append(by_hand(rewards, one["values"], 0.98, 0.9))
            returns = [a + v for a, v in zip(expected[-1], one["values"], strict=True)]
            np.testing.assert_allclose(one["columns"]["return"], returns, atol=2e-4)
            np.testing.assert_allclose(one["columns"]["value"], one["values"], atol=1e-5)
        elif estimator == "reinforce++":
            count = len(rewards)
            later = [sum(0.98 ** (b - a) * rewards[b] for b in range(a, count)) for a in range(count)]
            expected.append(later)
        else:
            (other,) = [
                sum(two["rewards"])
                for index, two in enumerate(found)
                if index != place and two["prompt"] == one["prompt"]
            ]
            expected.append([sum(rewards) - other] * len(rewards))
    flat = np.concatenate(expected)
    if estimator != "rloo":
        flat = (flat - flat.mean()) / flat.std(ddof=1)
    mine = np.concatenate([one["columns"]["advantage"] for one in found])
    np.testing.assert_allclose(mine, flat, atol=5e-4)
    assert measures["objective/kl"] == pytest.approx(np.mean([one["kl"] for one in found]), abs=1e-4)
    assert measures["objective/scores"] == pytest.approx(np.mean([one["score"] for one in found]), abs=1e-6)


def test_pitfall_v_the_reward_of_rlhf_is_the_score_and_the_penalty():
    feed = rollouts(small_model(own()), target=1.0)
    for rollout in range(3):
        _, measures = feed.roll_out(rollout)
        parts = measures["objective/scores"] + measures["objective/non_score_reward"]
        assert measures["objective/rlhf_reward"] == pytest.approx(parts, abs=1e-9)
        expected = -measures["kl_coefficient"] * measures["objective/kl"]
        assert measures["objective/non_score_reward"] == pytest.approx(expected, abs=1e-6)
    assert feed.controller.coefficient > 0.1


def test_what_no_judge_could_score_teaches_nothing():
    def some(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        return [None if place % 2 else 1.0 for place in range(len(completions))]

    feed = rollouts(small_model(own()), reward=some)
    rows, measures = feed.roll_out(0)
    assert sum(len([one for one in row.ids if "/" in one]) for row in rows) == 4
    assert measures["objective/scores"] == 1.0


def test_the_first_update_has_a_ratio_of_one_and_the_engines_numbers():
    """L7, pitfall K."""
    model = small_model(own())
    feed = rollouts(model, temperature=0.7)
    algorithm = PPO_ALGORITHMS["gae"]
    objective = PolicyGradient(algorithm, algorithm.numbers, temperature=0.7, extra=feed.critic, prune=True)
    loss = objective.loss(model, collate(feed.rows(0)))
    total, weight = loss.metrics["val/ratio"]
    assert float(total) / weight == pytest.approx(1, abs=1e-5)
    total, weight = loss.metrics["sampling/sampling_logp_difference/mean"]
    assert float(total) / weight < 1e-5


def loss_by_hand(
    model: Any, critic: ScalarHead, rows: list[PackedSequence], value_clip: float | None, temperature: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Surrogate, value error and entropy of every token in plain torch, and their sums for the log."""
    total = torch.zeros(())
    sums = dict.fromkeys(
        ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "policy/approxkl_avg", "val/ratio"), 0.0
    )
    for answer in (answer for row in rows for answer in answers_of(row)):
        logprobs, scores = answer.logprobs(model, temperature), answer.scores(model, temperature)
        old, advantages = answer.columns["old_logprob"], answer.columns["advantage"]
        before, returns = answer.columns["value"], answer.columns["return"]
        ratio = torch.exp(logprobs - old)
        policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        policy = policy * answer.columns["correction"]
        values = critic(answer.states(model))
        errors = (values - returns) ** 2
        if value_clip is not None:
            near_old = before + (values - before).clamp(-value_clip, value_clip)
            errors = torch.maximum(errors, (near_old - returns) ** 2)
        entropy = torch.distributions.Categorical(logits=scores).entropy()
        total = total + (policy + 0.3 * errors / 2 - 0.4 * entropy).sum()
        found = (policy, errors / 2, entropy, (logprobs - old) ** 2 / 2, ratio)
        sums = {name: sums[name] + value.sum().item() for name, value in zip(sums, found, strict=True)}
    return total, sums


@pytest.mark.parametrize("value_clip", [0.2, None])
@pytest.mark.parametrize("share", [True, False])
def test_pitfall_a_the_gradient_is_that_of_plain_torch_however_the_step_is_divided(share, value_clip):
    """Every term with its sign and its coefficient, over the tokens of the whole step."""
    model = small_model(own())
    critic = ScalarHead(model.config.width, seed=5)
    rows = rows_of_answers(model.config.vocabulary, [[6, 3], [1, 4, 7], [5]], share=share)
    near(model, rows, 0.3, 0.7)
    expected, sums = loss_by_hand(model, critic, rows, value_clip, 0.7)
    named = {**dict(model.named_parameters()), "critic": critic.score.weight}
    gradients = torch.autograd.grad(expected / (6 + 3 + 1 + 4 + 7 + 5), list(named.values()))
    algorithm = PPO_ALGORITHMS["gae"]
    objective = PolicyGradient(
        algorithm, algorithm.numbers, temperature=0.7, extra=critic, value_clip=value_clip,
        value_coefficient=0.3, entropy_bonus=0.4, prune=True, names=PPO_NAMES,
    )  # fmt: skip
    for division in ([rows], [[row] for row in rows]):
        for parameter in named.values():
            parameter.grad = None
        measures: dict[str, Any] = {}
        for some in division:
            loss = objective.loss(model, collate(some))
            (loss.sum / objective.weight(rows)).backward()
            accumulate(measures, {"total": (loss.sum.detach(), 1.0), **loss.metrics})
        assert float(measures["total"][0]) == pytest.approx(expected.item(), rel=1e-5)
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3, msg=name)
        for name, value in sums.items():
            assert float(measures[name][0]) == pytest.approx(value, rel=1e-4)
            assert float(measures[name][1]) == 26
