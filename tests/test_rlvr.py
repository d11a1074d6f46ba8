"""Reinforcement learning with verifiable rewards: rollouts, resume within one, the engine's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import ends_identical_when_killed, ends_identical_when_killed_while_sampling
from small import small_trainer, weights_of
from tuning import own, save, small_model

import trivium
from trivium.data.rows import collate
from trivium.generate.engine import Engine
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, FunctionReward
from trivium.kit.files import save_tensors
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.learn.objective import accumulate
from trivium.learn.objectives.advantages import KlController
from trivium.learn.objectives.policy import PolicyGradient, token_outputs
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.model.attention import Documents
from trivium.stages.parts.prompts import Curriculum, Prompt
from trivium.stages.parts.rollout_stage import from_to
from trivium.stages.parts.rollout_worker import EngineWorker, Rollout
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings
from trivium.stages.rlvr import Clip, Rlvr

REWARD = """
def lengths(prompts, completions, **columns):
    return [len(completion) % 3 / 2 for completion in completions]
"""


def even(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(len(completion) % 2) for completion in completions]


def rollouts(
    model: Any,
    *,
    function: Any = even,
    algorithm: str = "dapo",
    sampling: Sampling | None = None,
    reference: Any = None,
    controller: KlController | None = None,
    weights: Sequence[float] = (1.0,),
    **changes: Any,
) -> RolloutBatches:
    tokenizer = own()
    sampling = sampling or Sampling(max_new_tokens=12)
    asked = ["the river", "and the miller counts", "12 or 345", "in the hills the"]
    prompts = [Prompt(tokenizer.encode(text), text, {}, text) for text in asked]
    settings = RolloutSettings(**{"steps": 8, "prompts_per_step": 3, "num_generations": 4, **changes})
    worker = EngineWorker(Engine(model, tokenizer, max_rows=12), sampling)
    reward = Combined([FunctionReward("even", function)], list(weights))
    return RolloutBatches(
        model, worker, prompts, reward, ALGORITHMS[algorithm], settings,
        sampling=sampling, seed=3, reference=reference, controller=controller,
    )  # fmt: skip


def trainer_of(folder: Path, model: Any, steps: int = 8) -> Any:
    feed = rollouts(model, steps=steps, minibatches=2, epochs_per_rollout=2)
    algorithm = ALGORITHMS["dapo"]
    return small_trainer(
        folder, model=model, batches=feed, objective=PolicyGradient(algorithm, algorithm.numbers),
        checkpoint={"every_steps": 1}, optimiser="adamw",
    )  # fmt: skip


def test_a_stage_runs_from_a_recipe_and_logs_under_trls_names(tmp_path):
    save(tmp_path / "base", small_model(own()), own())
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "rl.yaml").write_text(
        "name: rl\nstages:\n  rl: {kind: rlvr, from: ./base, data: {'world:sums?form=prompt': {limit: 9}}, "
        "reward: ['mine.py:lengths', {name: math, weight: 0}], epochs: 0.6, parts: 2, prompts: 3, group: 4, "
        "max_new_tokens: 12, kl: {coefficient: 0.1}}\n"
    )
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    rows = [row for row in run["rl"].metrics if "step" in row]
    # 0.6 epochs of 9 prompts are 2 rollouts of 3 prompts, each learnt from in 2 parts.
    assert len(rows) == 4
    assert run["rl"].summary["rollouts"] == 2
    assert {
        "reward", "reward_std", "rewards/lengths/mean", "rewards/math/mean", "frac_reward_zero_std", "kl",
        "completions/mean_length", "completions/clipped_ratio", "entropy", "clip_ratio/region_mean",
        "clip_ratio/low_min", "clip_ratio/high_max", "policy_loss", "pass@1", "pass@4",
        "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    } <= set(rows[0])  # fmt: skip
    assert [row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows[::2]] == [True, True]
    assert len(read_metrics(run["rl"].folder / "completions.jsonl")) == 8


def test_the_summary_compares_the_first_tenth_of_all_rollouts_with_the_last(tmp_path):
    """Thirty rollouts of four steps each, of which the first logs what the rollout was."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(120):
        rollout = step // 4 + 1
        log.write({"step": step + 1, "loss": 0.0} | ({} if step % 4 else {"reward": float(rollout**2)}))
    found = from_to(log, ("reward", "pass@1"))
    assert found == {"reward": [pytest.approx(14 / 3), pytest.approx((28**2 + 29**2 + 30**2) / 3)]}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12),
        Sampling(max_new_tokens=12, temperature=0.6),
        Sampling(max_new_tokens=12, top_p=0.9),
        Sampling(max_new_tokens=12, temperature=0.6, top_p=0.9, top_k=20),
        Sampling(max_new_tokens=12, temperature=1.3, min_p=0.02),
    ],
)
@pytest.mark.parametrize("share", [True, False])
def test_the_trainers_numbers_are_the_engines_under_the_same_filters(sampling, share):
    """L7, pitfall K: the ratio of the first step is one."""
    feed = rollouts(small_model(own()), sampling=sampling, share_prompts=share)
    rows = feed.rows(0)
    batch = collate(rows)
    logprobs = token_outputs(
        feed.model, batch, temperature=sampling.temperature, filtered=feed.filtered
    ).logprobs
    sampled = batch.columns["sampled_logprob"][batch.weights > 0]
    assert len(sampled) > 12
    torch.testing.assert_close(logprobs, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_the_extremes_are_those_of_all_answers_however_a_step_is_divided(advantage):
    model = small_model(own())
    rows = rollouts(model, prompts_per_step=4).rows(0)
    for row in rows:
        row.columns["advantage"][:] = advantage
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    algorithm = ALGORITHMS["dapo"]
    objective = PolicyGradient(algorithm, algorithm.numbers)
    found: dict[str, Any] = {}
    for row in rows:
        accumulate(found, objective.loss(model, collate([row])).metrics)
    shares, apart = [], []
    for row in rows:
        batch = collate([row])
        learned = batch.weights > 0
        logprobs = token_outputs(model, batch).logprobs
        moved = (logprobs - batch.columns["old_logprob"][learned]).tolist()
        owners = np.repeat(np.arange(len(row.lengths)), row.lengths)[learned.numpy()]
        apart += [abs(one) for one in moved]
        for owner in set(owners):
            ratios = [np.exp(one) for one, whose in zip(moved, owners) if whose == owner]
            shares.append(np.mean([one < 0.8 if advantage < 0 else one > 1.28 for one in ratios]))
    cut = found["clip_ratio/low_min" if advantage < 0 else "clip_ratio/high_max"]
    expected = min(shares) if advantage < 0 else max(shares)
    assert float(cut.value) / cut.weight == pytest.approx(expected, abs=1e-6)
    assert min(shares) < max(shares)
    assert expected > 0
    assert float(found["sampling/sampling_logp_difference/max"].value) == pytest.approx(max(apart), abs=1e-5)


def test_a_rollout_uses_the_weights_of_its_own_step(tmp_path):
    trainer = trainer_of(tmp_path, small_model(own()))
    trainer.run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    fresh = [row["sampling/sampling_logp_difference/mean"] for row in rows[::4]]
    assert len(fresh) == 2
    assert max(fresh) < 1e-5
    assert rows[-1]["policy/approxkl_avg"] > 1e-6


def until_the_end(folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    trainer = trainer_of(Path(folder), small_model(own(), seed))
    trainer.run()
    save_tensors(Path(folder) / "end.safetensors", weights_of(trainer.model))


def test_killed_in_the_middle_of_a_rollout_it_ends_bit_identical(tmp_path):
    """L1, pitfall W: weights, log and what is sampled after the resume."""
    ends_identical_when_killed(until_the_end, tmp_path)


def test_killed_while_answers_are_drawn_it_ends_bit_identical(tmp_path):
    ends_identical_when_killed_while_sampling(until_the_end, tmp_path)


def test_restored_in_the_middle_of_a_rollout_the_rows_are_the_same():
    feed = rollouts(small_model(own()), minibatches=2, epochs_per_rollout=2)
    feed.rows(0)
    again = rollouts(small_model(own(), 5), minibatches=2, epochs_per_rollout=2)
    again.restore(*feed.state())
    for step in (1, 2, 3):
        for one, other in zip(feed.rows(step), again.rows(step), strict=True):
            assert one.ids == other.ids
            assert one.facts == other.facts
            for name in ("advantage", "old_logprob", "correction"):
                assert np.array_equal(one.columns[name], other.columns[name])
            assert np.array_equal(one.tokens, other.tokens)
            assert np.array_equal(one.weights, other.weights)


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("share", [True, False])
def test_groups_without_variance_are_left_out_and_nothing_changes(algorithm, share, monkeypatch):
    """The gradient with and without the answers that teach nothing, shared prompts or not."""
    model = small_model(own())

    def some(prompts, completions, **columns):
        return [
            float(len(one) % 2) if "river" not in prompt else 1.0 for prompt, one in zip(prompts, completions)
        ]

    def gradient(share: bool) -> tuple[list[torch.Tensor], int]:
        feed = rollouts(model, function=some, algorithm=algorithm, share_prompts=share, prompts_per_step=4)
        rows = feed.rows(0)
        objective = PolicyGradient(ALGORITHMS[algorithm], ALGORITHMS[algorithm].numbers)
        model.zero_grad()
        (objective.loss(model, collate(rows)).sum / objective.weight(rows)).backward()
        return [p.grad.clone() for p in model.parameters()], sum(len(row) for row in rows)

    skipped, fewer = gradient(share)
    monkeypatch.setattr(RolloutBatches, "_teaches", lambda self, group, index: True)
    everything, more = gradient(False)
    if algorithm not in ("reinforce",):
        assert fewer < more
    for one, other in zip(skipped, everything, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert max(float(one.abs().max()) for one in skipped) > 1e-4


def test_the_log_says_what_a_rollouts_time_went_to():
    feed = rollouts(small_model(own()))
    feed.rows(0)
    log = feed.metrics(0)
    parts = [log["generation_seconds"], log["scoring_seconds"]]
    assert min(parts) > 0
    assert sum(parts) <= log["rollout_seconds"]


def test_the_baseline_of_reinforce_is_a_running_mean_of_rewards():
    feed = rollouts(small_model(own()), algorithm="reinforce", steps=3)
    expected = 0.0
    for step in range(3):
        feed.rows(step)
        expected = 0.9 * expected + 0.1 * feed.metrics(step)["reward"]
        assert feed.baseline == pytest.approx(expected)
    assert expected > 0


def test_expert_iteration_divides_by_the_tokens_it_learns():
    """Rejected answers are not there at all: the loss is that of fine-tuning on the accepted ones."""
    feed = rollouts(small_model(own()), algorithm="expert_iteration")
    rows = feed.rows(0)
    objective = PolicyGradient(ALGORITHMS["expert_iteration"], ALGORITHMS["expert_iteration"].numbers)
    learned = sum(int((row.weights > 0).sum()) for row in rows)
    assert objective.weight(rows) == learned
    batch = collate(rows)
    logprobs = token_outputs(feed.model, batch).logprobs
    loss = objective.loss(feed.model, batch).sum / objective.weight(rows)
    assert loss.item() == pytest.approx(-logprobs.mean().item(), abs=1e-6)


def test_an_all_equal_rollout_moves_nothing():
    """Pitfall P: zero variance everywhere is exactly no gradient, and the step is still a step."""
    model = small_model(own())
    feed = rollouts(model, function=lambda prompts, completions, **columns: [1.0] * len(completions))
    rows = feed.rows(0)
    objective = PolicyGradient(ALGORITHMS["grpo"], ALGORITHMS["grpo"].numbers)
    (objective.loss(model, collate(rows)).sum / objective.weight(rows)).backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters() if p.grad is not None)
    assert feed.metrics(0)["frac_reward_zero_std"] == 1.0


def test_groups_without_variance_are_replaced():
    calls: list[int] = []

    def now_and_then(prompts, completions, **columns):
        calls.append(len(completions))
        return [float(index % 2) if "river" in prompt else 0.0 for index, prompt in enumerate(prompts)]

    feed = rollouts(small_model(own()), function=now_and_then, dynamic_sampling_retries=3, prompts_per_step=2)
    rows = feed.rows(0)
    assert calls[0] == 8
    assert len(calls) > 1
    assert all(identity.startswith("the river") for row in rows for identity in row.ids)


@pytest.mark.parametrize("truncated", ["keep", "mask", "penalise"])
def test_truncated_answers_are_kept_left_out_or_worth_nothing(truncated):
    ends = tuple(range(0, own().vocabulary_size, 12))
    sampling = Sampling(max_new_tokens=12, stop_ids=ends)
    feed = rollouts(small_model(own()), sampling=sampling, truncated=truncated)
    groups = feed._groups(0, 0, 3)
    cut = [(group, i) for group in groups for i, one in enumerate(group.rollouts) if one.truncated]
    assert 0 < len(cut) < 12
    rows = feed._rows(groups)
    named = {identity for row in rows for identity in row.ids}
    for group, index in cut:
        if truncated == "mask":
            assert f"{feed.prompts[group.prompt_index].id}/{index}" not in named
        if truncated == "penalise":
            assert group.rewards[index] == 0.0
    if truncated == "keep":
        assert any(group.rewards[index] == 1.0 for group, index in cut)


def test_what_no_grader_could_judge_is_nowhere():
    def some(prompts, completions, **columns):
        return [None if index % 2 else float(len(one) % 2) for index, one in enumerate(completions)]

    feed = rollouts(small_model(own()), function=some)
    for row in feed.rows(0):
        judged = [identity for identity in row.ids if "/" in identity]
        assert all(int(identity.rpartition("/")[2]) % 2 == 0 for identity in judged)


def test_the_engines_rounding_is_weighed_out_and_capped(monkeypatch):
    """The trainer's probability over the engine's, or a whole answer's product of them (pitfall L)."""
    feed = rollouts(small_model(own()), correction="token", correction_cap=1.5)
    generated = feed.worker.generate

    def off(*arguments):
        found = generated(*arguments)
        for answers in found:
            for answer in answers:
                answer.logprobs = [value - (0.1 if i else 3.0) for i, value in enumerate(answer.logprobs)]
        return found

    monkeypatch.setattr(feed.worker, "generate", off)
    row = feed.rows(0)[0]
    weights = row.columns["correction"][row.weights > 0]
    assert {round(float(weight), 3) for weight in weights} == {1.5, round(float(np.exp(0.1)), 3)}
    feed = rollouts(small_model(own()), correction="sequence", correction_cap=1e9)
    monkeypatch.setattr(feed.worker, "generate", off)
    row = feed.rows(0)[0]
    length = int((row.weights > 0)[-row.lengths[-1] :].sum())
    assert row.columns["correction"][-2] == pytest.approx(np.exp(3.0 + 0.1 * (length - 1)), rel=1e-3)


def test_problems_that_are_too_easy_rest():
    curriculum = Curriculum(4, 1, low=0.1, high=0.9, rest=2)
    first = curriculum.next(4)
    assert sorted(first) == [0, 1, 2, 3]
    for index in first:
        curriculum.note(index, {0: 1.0, 1: 0.5, 2: 0.0, 3: 0.5}[index])
    again = Curriculum(4, 1, low=0.1, high=0.9, rest=2)
    again.restore(curriculum.state())
    assert set(curriculum.next(4)) == {1, 3}
    assert set(again.next(4)) == {1, 3}
    assert {0, 2} <= set(curriculum.next(4))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_laid_before_the_engine_is_made(tmp_path, kind):
    """L7 with an adapter: in every rollout, and once it has moved: the engine and the trainer agree."""
    save(tmp_path / "base", small_model(own()), own())
    (tmp_path / "mine.py").write_text(
        "def lengths(completion_ids, **columns):\n    return [float(ids[0] % 2) for ids in completion_ids]\n"
    )
    (tmp_path / "rl.yaml").write_text(
        "name: rl\nstages:\n  rl: {kind: rlvr, from: ./base, data: {'world:sums?form=prompt': {limit: 9}}, "
        "reward: ['mine.py:lengths'], steps: 4, prompts: 3, group: 4, max_new_tokens: 12, "
        f"learning_rate: 0.01, adapter: {{rank: 4, kind: {kind}}}, kl: {{coefficient: 0.01}}}}\n"
    )
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    rows = [row for row in run["rl"].metrics if "step" in row]
    assert [row["sampling/sampling_logp_difference/mean"] < 1e-4 for row in rows] == [True] * 4
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-5, "the reference moves along with the adapter"
    assert (run["rl"].folder / "model" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("truncated", ["keep", "mask"])
def test_the_divergence_in_the_reward_is_taken_off_it(truncated):
    """The score less the coefficient times the summed log-ratio of what was sampled."""
    model, reference = small_model(own()), small_model(own(), 1).requires_grad_(False)
    sampling = Sampling(max_new_tokens=12, stop_ids=tuple(range(0, own().vocabulary_size, 12)))
    feed = rollouts(
        model, reference=reference, controller=KlController(0.5), sampling=sampling, truncated=truncated
    )
    groups = feed._groups(0, 0, 3)
    assert {answer.truncated for group in groups for answer in group.rollouts} == {True, False}
    for group in groups:
        prompt = feed.prompts[group.prompt_index].ids
        scores = even([""] * 4, [answer.completion for answer in group.rollouts])
        for answer, score, reward in zip(group.rollouts, scores, group.rewards, strict=True):
            tokens = torch.tensor([*prompt, *answer.tokens])
            with torch.no_grad():
                mine, theirs = (
                    one.logits(one(tokens, Documents([len(tokens)])))
                    .log_softmax(-1)[len(prompt) - 1 : -1]
                    .gather(1, torch.tensor(answer.tokens)[:, None])
                    .sum()
                    for one in (model, reference)
                )
            assert abs(mine - theirs) > 0.1
            taken_off = 0.0 if answer.truncated and truncated == "mask" else 0.5 * float(mine - theirs)
            assert reward == pytest.approx(score - taken_off, abs=1e-4)
    assert feed._rows(groups)


def test_every_rollout_draws_other_answers_to_the_same_problem_and_the_same_again():
    """What is sampled is a function of (seed, rollout, attempt, place) and repeats nowhere."""

    def answers(rollout: int, attempt: int) -> list[list[int]]:
        feed = rollouts(small_model(own()))
        feed.prompts = feed.prompts[:1]
        feed.curriculum = Curriculum(1, 3)
        (group,) = feed._groups(rollout, attempt, 1)
        return [answer.tokens for answer in group.rollouts]

    places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    found = [answers(*place) for place in places]
    assert len({tuple(tokens) for group in found for tokens in group}) == len(places) * 4
    assert [answers(*place) for place in places] == found


@pytest.mark.parametrize(
    "changed",
    [
        {"sampling": Sampling(max_new_tokens=12, temperature=0.9)},
        {"num_generations": 5},
        {"overlong_buffer": 3},
        {"algorithm": "grpo"},
        {"weights": [2.0]},
    ],
)
def test_the_fingerprint_of_rollouts_counts_all_that_makes_them(changed):
    model = small_model(own())
    assert rollouts(model, **changed).fingerprint != rollouts(model).fingerprint
    assert rollouts(model).fingerprint == rollouts(model).fingerprint


class Elsewhere:
    """A worker without an engine of ours: token ids with log-probabilities from anywhere."""

    def generate(self, prompts: list, count: int, seeds: list) -> list[list[Rollout]]:
        random = np.random.default_rng(seeds[0])
        drawn = [
            [random.integers(0, own().vocabulary_size, 5).tolist() for _ in range(count)] for _ in prompts
        ]
        return [
            [Rollout(tokens, [-3.0] * 5, [True] * 5, False, str(tokens)) for tokens in some] for some in drawn
        ]


def test_any_worker_that_returns_tokens_and_log_probabilities_will_do():
    """With a correction the old log-probabilities are the trainer's, and advantages lie on their tokens."""
    feed = rollouts(small_model(own()), correction="token", share_prompts=False)
    feed.worker = Elsewhere()
    groups = feed._groups(0, 0, 3)
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            rollout.advantages = np.arange(1.0, 6.0) + 10 * place
    for row in feed._rows(groups):
        batch = collate([row])
        learned = batch.weights > 0
        logprobs = token_outputs(feed.model, batch).logprobs
        torch.testing.assert_close(logprobs, batch.columns["old_logprob"][learned], atol=1e-5, rtol=0)
        assert set(batch.columns["sampled_logprob"][learned].tolist()) == {-3.0}
        places = [int(identity.rpartition("/")[2]) for identity in row.ids]
        expected = [step + 10 * place for place in places for step in range(1, 6)]
        assert batch.columns["advantage"][learned].tolist() == expected


@pytest.mark.parametrize(
    ("algorithm", "clip"),
    [("sapo", {"low": 0.1}), ("vespo", {"high": 0.1}), ("reinforce", {"dual": 3}), ("cispo", {"low": 0.1})],
)
def test_a_clip_that_the_algorithm_does_not_read_is_refused(algorithm, clip):
    common = {"kind": "rlvr", "from": "base", "data": "world:sums", "reward": ["math"], "steps": 1}
    with pytest.raises(ValueError, match=f"{algorithm} does not read `clip_ratio.{next(iter(clip))}`"):
        Rlvr.model_validate({**common, "algorithm": algorithm, "clip_ratio": clip})
    Rlvr.model_validate({**common, "algorithm": "cispo", "clip_ratio": {"high": 3}})


@pytest.mark.parametrize(("name", "nothing"), [("low", 0), ("high", 0), ("dual", 1)])
def test_a_clip_that_leaves_no_room_is_refused(name, nothing):
    with pytest.raises(ValueError, match=f"{name}\n.*greater than {nothing}"):
        Clip.model_validate({name: nothing})
    assert getattr(Clip.model_validate({name: nothing + 0.01}), name) == nothing + 0.01
