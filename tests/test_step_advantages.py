"""Process rewards and forks in reinforcement learning: formulas recomputed, unbiased gradients, a stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tuning import own, save, small_model, write_rows

import trivium
from trivium.data.steps import step_ends
from trivium.generate.engine import Engine
from trivium.generate.requests import Completion
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.learn.objectives.advantages import GROUP_STABILITY, group_advantages
from trivium.learn.objectives.step_advantages import over_tokens, potential, summed, tree_advantages
from trivium.stages.parts.forks import ForkingWorker, Forks
from trivium.stages.parts.process_rewards import ProcessRewards, running
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_worker import EngineWorker, Rollout

SCORES = [np.array([0.9, 0.8, 0.1]), np.array([0.6, 0.7])]


def test_process_supervision_is_deepseekmaths_formula():
    everything = np.concatenate(SCORES)
    mean, std = everything.mean(), everything.std(ddof=1) + GROUP_STABILITY
    found = summed(SCORES, scale=True)
    for scores, mine in zip(SCORES, found, strict=True):
        normalised = [(score - mean) / std for score in scores]
        assert mine == pytest.approx([sum(normalised[place:]) for place in range(len(scores))])
    assert summed(SCORES, scale=False)[1] == pytest.approx([1.3 - 2 * mean, 0.7 - mean])
    assert over_tokens(np.array([3.0, 5.0]), [1, 2], 5).tolist() == [3, 3, 5, 0, 0]


def test_potentials_add_up_and_cannot_be_farmed_by_more_steps():
    values = [running(one, "min") for one in SCORES]
    assert values[0].tolist() == [0.9, 0.8, 0.1]
    gains = potential(values, scale=False)
    start = (0.1 + 0.6) / 2
    assert gains[0] == pytest.approx([0.1 - start, 0.1 - 0.9, 0.1 - 0.8])
    assert gains[1] == pytest.approx([0.6 - start, 0.0])
    # A hundred further steps of the same score change nothing for the steps before, where sums rise.
    long = [np.concatenate((SCORES[1], np.full(100, 0.7))), SCORES[1]]
    same = potential([running(one, "min") for one in long], scale=False)
    assert same[0][:2] == pytest.approx(same[1])
    assert same[0][2:] == pytest.approx(np.zeros(100))
    others = [SCORES[0], np.array([0.1, 0.1])]
    honest, farmed = (summed([one, *others], scale=False)[0][0] for one in (SCORES[1], long[0]))
    assert farmed > 2 * honest > 0


def test_trunks_alone_have_the_groups_advantages():
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    for scale, estimator in ((True, "group"), (False, "centred")):
        found = tree_advantages(rewards, range(4), [0] * 4, [2, 3, 1, 2], scale=scale)
        expected = group_advantages(rewards.tolist(), estimator)
        assert [one.tolist() for one in found] == [
            pytest.approx([value] * length) for value, length in zip(expected, [2, 3, 1, 2], strict=True)
        ]


def test_branches_are_compared_with_each_other_after_the_fork():
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    found = tree_advantages(rewards, [0, 0, 1, 2], [2, 2, 0, 0], [3, 4, 2, 2], scale=False)
    mean = (0.5 + 0 + 0) / 3
    assert found[0] == pytest.approx([1 - mean, 1 - mean, 1.0])
    assert found[1] == pytest.approx([0 - mean, 0 - mean, -1.0, -1.0])
    assert found[2] == pytest.approx([-mean, -mean])


def test_the_gradient_of_forked_rollouts_is_that_of_independent_ones():
    """Two coins: heads has p = 0.6, then q = 0.3; the reward is 1 for heads twice, 0.2 for tails twice."""
    p, q = 0.6, 0.3
    random = np.random.default_rng(0)
    reward = {(1, 1): 1.0, (0, 0): 0.2}
    # The exact gradient with respect to the log-odds of both coins.
    exact = np.zeros(2)
    for first in (0, 1):
        for second in (0, 1):
            chance = (p if first else 1 - p) * (q if second else 1 - q)
            exact += chance * reward.get((first, second), 0.0) * np.array([first - p, second - q])
    found = []
    for _ in range(20000):
        firsts = random.random(2) < p
        rewards, trunks, forks, drawn = [], [], [], []
        for trunk, first in enumerate(firsts):
            # Only a trunk that begins with heads forks, which is known before the second coin.
            for _ in range(2 if first else 1):
                second = random.random() < q
                drawn.append((int(first), int(second)))
                rewards.append(reward.get(drawn[-1], 0.0))
                trunks.append(trunk)
                forks.append(1 if first else 0)
        advantages = tree_advantages(np.array(rewards), trunks, forks, [2] * len(drawn), scale=False)
        gradient = np.zeros(2)
        for (first, second), trunk, mine in zip(drawn, trunks, advantages, strict=True):
            weight = 1 / trunks.count(trunk)
            gradient += weight * mine * np.array([first - p, second - q])
        found.append(gradient / 2)
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    # A mean over the group of two trunks, itself included, shrinks what is compared with it by one half: the
    # first coin, and the second where it is tossed alone.
    alone = (1 - p) * 0.2 * (1 - q) * (0 - q) / 2
    forked = p * 1.0 * q * (1 - q)
    assert abs(mean[0] - exact[0] / 2) < 4 * error[0]
    assert abs(mean[1] - (alone + forked)) < 4 * error[1]
    assert exact[1] == pytest.approx(2 * alone + forked)


def test_steps_are_found_among_the_tokens():
    tokenizer = own()
    text = "the river\n12 sacks\n345"
    tokens = [*tokenizer.encode(text), tokenizer.end_of_text_id]
    rollout = Rollout(tokens, [0.0] * len(tokens), [True] * len(tokens), False, text)
    steps = ProcessRewards([], [], "sum", tokenizer)
    ends = steps._last_tokens(rollout, [end for _, end in step_ends(text)])
    assert [tokenizer.decode(tokens[: end + 1]) for end in ends[:-1]] == [
        "the river\n",
        "the river\n12 sacks\n",
    ]
    assert ends[-1] == len(tokens) - 1
    # With a tool the steps are those of the last message, which begins after what the tool said.
    before, said = tokenizer.encode("the long way\nround"), tokenizer.encode("the hills and the river\n")
    whole = [*before, *said, *tokens]
    learned = [True] * len(before) + [False] * len(said) + [True] * len(tokens)
    messages = [
        {"role": "assistant", "content": "the long way\nround"},
        {"role": "tool", "content": "the hills and the river\n"},
        {"role": "assistant", "content": text},
    ]
    turns = Rollout(whole, [0.0] * len(whole), learned, False, messages)
    shifted = steps._last_tokens(turns, [end for _, end in step_ends(text)])
    assert shifted == [end + len(before) + len(said) for end in ends]


class Constant:
    """A process reward model that scores the first step 0.9 and the others 0.2."""

    how = "min"

    def __init__(self, separator: str) -> None:
        self.separator = separator

    def step_scores(self, prompts: list, solutions: list) -> list:
        return [[0.9, *[0.2] * (len(steps) - 1)] for steps in solutions]


def test_two_process_reward_models_may_divide_at_separators_of_their_own():
    tokenizer = own()
    prompt = Prompt(tokenizer.encode("so"), "so", {}, "one")
    rollouts = []
    for text in ("the river\n12 sacks and\n345", "the hills"):
        tokens = tokenizer.encode(text)
        rollouts.append(Rollout(tokens, [0.0] * len(tokens), [True] * len(tokens), False, text))

    def earned(separators: str) -> list[np.ndarray]:
        scorers = [Constant(one) for one in separators]
        rewards = ProcessRewards(scorers, [1.0] * len(scorers), "sum", tokenizer)  # type: ignore[arg-type]
        rewards.grade([(prompt, one) for one in rollouts])
        return rewards.advantages(rollouts, scale=True)

    both = earned("\n ")
    assert [len(ends) for ends in rollouts[0].step_ends] == [3, 4]
    for whole, lines, words in zip(both, earned("\n"), earned(" "), strict=True):
        assert whole == pytest.approx(lines + words)


@pytest.mark.parametrize("at", ["token", "step"])
def test_branches_share_their_beginning_and_are_drawn_from_the_model(at):
    model, tokenizer = small_model(own()), own()
    sampling = Sampling(max_new_tokens=24, temperature=1.0, logprobs=True)
    forks = Forks(branches=3, at=at, below=0.05 if at == "token" else 0.7, separator=" ", within=2)
    engine = Engine(model, tokenizer, max_rows=16)
    prompts = [Prompt(tokenizer.encode(text), text, {}, text) for text in ("the river", "the miller and")]
    found = ForkingWorker(engine, sampling, forks).generate(prompts, 6, [3, 4])
    assert [len(group) for group in found] == [6, 6]
    assert any(one.fork for group in found for one in group)
    for prompt, group in zip(prompts, found, strict=True):
        # Every prompt weighs as much as `num_generations` completions, however many of its trunks fork.
        assert sum(one.weight for one in group) == pytest.approx(6)
        alone = [one.weight for one in group if not one.fork]
        assert all(one.weight == pytest.approx(alone[0] / 3) for one in group if one.fork and alone)
        for one in group:
            siblings = [other for other in group if other.trunk == one.trunk]
            assert len(siblings) in (1, 3)
            assert {tuple(other.tokens[: one.fork]) for other in siblings} == {tuple(one.tokens[: one.fork])}
            assert one.drawn == len(one.tokens) - (0 if one is siblings[0] else one.fork)
            if at == "step" and one.fork:
                assert tokenizer.decode(one.tokens[: one.fork]).count(" ") in (1, 2)
            scored = engine.score([prompt.ids], [one.tokens])[0].logprobs
            assert one.logprobs == pytest.approx(scored, abs=1e-4)
    plain = EngineWorker(engine, sampling).generate(prompts, 6, [3, 4])
    assert all(one.trunk is None and one.weight == 1.0 for group in plain for one in group)


def test_branches_part_at_the_first_uncertain_token_after_the_first():
    worker = ForkingWorker(None, Sampling(), Forks(below=0.5))
    for likeliest, fork in (((0.1, 0.9, 0.3, 0.2), 2), ((0.9, 0.4, 0.9), 1), ((0.1, 0.9, 0.5), None)):
        told = [{7: math.log(share), 8: -9.0} for share in likeliest]
        trunk = Completion("", [7] * len(told), [], "stop", 3, told)
        assert worker._fork(trunk, 0, 0) == fork


def test_a_stage_learns_from_process_rewards_and_forks(tmp_path):
    save(tmp_path / "base", small_model(own()), own())
    rows = [{"prompt": f"{n} and {n} make", "answer": str(2 * n)} for n in range(6)]
    write_rows(tmp_path / "problems.jsonl", rows)
    steps = [
        {"prompt": f"{n} and", "completions": ["the river", "345"], "labels": [True, n % 2 == 0]}
        for n in range(6)
    ]
    write_rows(tmp_path / "steps.jsonl", steps)
    common = (
        "from: ./base, data: ./problems.jsonl, steps: 2, prompts_per_step: 2, max_new_tokens: 16, "
        "learning_rate: 1e-3"
    )
    both = "reward: [math, {model: prm, weight: 0.3}]"
    (tmp_path / "rl.yaml").write_text(
        "name: rl\nstages:\n"
        "  prm: {kind: reward, steps: true, from: ./base, data: ./steps.jsonl, pairs: 2, epochs: 1, "
        "separator: ' '}\n"
        f"  potential: {{kind: rlvr, {common}, {both}, num_generations: 4}}\n"
        f"  sums: {{kind: rlvr, {common}, {both}, num_generations: 4, process_rewards: sum}}\n"
        f"  whole: {{kind: rlvr, {common}, {both}, num_generations: 4, process_rewards: outcome}}\n"
        f"  alone: {{kind: rlvr, {common}, reward: [{{model: prm}}], num_generations: 4}}\n"
        f"  forked: {{kind: rlvr, {common}, reward: [random], num_generations: 4, "
        "forks: {below: 0.9}, held_out_reward: math}\n"
    )
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    logs = {name: run[name].metrics for name in ("potential", "sums", "whole", "alone", "forked")}
    for name, rows in logs.items():
        assert rows[0]["completions/drawn_tokens"] > 0, name
    # No answer is right: the reward of the whole is 0 for all, and the steps alone teach.
    for name in ("potential", "sums", "alone"):
        assert logs[name][0]["reward"] == 0.0
        assert logs[name][0]["grad_norm"] > 0
        assert "rewards/prm/mean" in logs[name][0]
    assert logs["whole"][0]["reward"] > 0
    assert logs["potential"][0]["grad_norm"] != logs["sums"][0]["grad_norm"]
    for wrong, words in (
        ("num_generations: 3, forks: {branches: 2}", "no multiple"),
        ("forks: {}, tools: [calculator]", "within one text"),
        ("forks: {}, algorithm: rloo", "compared within a group"),
    ):
        (tmp_path / "bad.yaml").write_text(
            f"name: bad\nstages:\n  rl: {{kind: rlvr, {common}, reward: [math], {wrong}}}\n"
        )
        with pytest.raises(TriviumError, match=words):
            trivium.run(tmp_path / "bad.yaml", runs=tmp_path / "runs")
