"""Answers in several turns: trained ids are the sampled ids, and what tools say is read but never learned."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tuning import own, save, small_model

import trivium
from trivium.data.rows import collate
from trivium.generate.engine import Engine
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, FunctionReward
from trivium.learn.objectives.policy import PolicyGradient, token_outputs
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.stages.parts.environments import EnvironmentWorker, ToolUse, calculate, with_tools
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings

ENVIRONMENT = """
class Echo:
    role = "user"

    def __init__(self, **columns):
        self.left = 2

    def step(self, action):
        self.left -= 1
        return f"12 or {self.left}", 0.5, self.left == 0
"""


class Talker:
    role = "user"

    def __init__(self, **columns: Any) -> None:
        self.seen: list[str] = []

    def step(self, action: str) -> tuple[str, float, bool]:
        self.seen.append(action)
        return "the miller counts 12", 0.25 * len(action), len(self.seen) == 3


def in_turns(made: list[Talker] | None = None) -> RolloutBatches:
    tokenizer, model = own(), small_model(own())
    asked = [{"role": "user", "content": "12 or 345?"}]
    ids = tokenizer.encode_chat(asked, add_generation_prompt=True).ids
    prompts = [Prompt(ids, asked, {}, "one")]
    # Half of all tokens end a turn, so that there are turns to speak of.
    sampling = Sampling(max_new_tokens=90, stop_ids=tuple(range(0, tokenizer.vocabulary_size, 2)))

    def make(**columns: Any) -> Talker:
        talker = Talker()
        if made is not None:
            made.append(talker)
        return talker

    worker = EnvironmentWorker(
        Engine(model, tokenizer, max_rows=4), sampling, tokenizer, make, turns=4, earns=True
    )
    reward = Combined([FunctionReward("even", lambda **columns: [0.0] * len(columns["completions"]))], [1.0])
    return RolloutBatches(
        model, worker, prompts, reward, ALGORITHMS["dapo"],
        RolloutSettings(steps=2, prompts_per_step=1, num_generations=4),
        sampling=sampling, seed=3,
    )  # fmt: skip


def test_what_the_environment_says_is_masked_and_the_rest_is_what_was_drawn():
    """Pitfall M: learned tokens carry the engine's numbers; the trainer's agree over all turns (L7)."""
    made: list[Talker] = []
    feed = in_turns(made)
    batch = collate(feed.rows(0))
    assert len(made) == 4
    learned = batch.weights > 0
    logprobs = token_outputs(feed.model, batch).logprobs
    torch.testing.assert_close(logprobs, batch.columns["sampled_logprob"][learned], atol=1e-4, rtol=0)
    tokenizer = own()
    ends = np.cumsum(batch.lengths)
    answers = [index for index, back in enumerate(batch.facts["back"]) if back]
    for talker, index in zip(made, answers, strict=True):
        piece = slice(ends[index] - batch.lengths[index], ends[index])
        tokens, mine = batch.tokens[piece], learned[piece]
        drawn, said, run = [], [], []
        for token, chosen in zip(tokens[1:].tolist(), mine[:-1].tolist(), strict=True):
            (drawn if chosen else said).append(token)
            run.append(chosen)
        assert sum(before and not after for before, after in pairwise(run)) == 2
        assert "the miller counts 12" in tokenizer.decode(said)
        assert "miller counts 12" not in "".join(talker.seen)
        assert len(talker.seen) == 3
        assert len(drawn) >= 3


def test_what_the_environment_says_has_no_gradient():
    feed = in_turns()
    rows = feed.rows(0)
    objective = PolicyGradient(ALGORITHMS["dapo"], ALGORITHMS["dapo"].numbers)
    batch = collate(rows)
    masked = (batch.weights == 0) & (batch.targets >= 0)
    batch.columns["advantage"][masked] = 1e6
    batch.columns["old_logprob"][masked] = -50.0
    with_noise = objective.loss(feed.model, batch).sum
    without = objective.loss(feed.model, collate(rows)).sum
    assert masked.any()
    assert torch.equal(with_noise, without)


def test_rewards_of_the_environment_are_summed():
    made: list[Talker] = []
    feed = in_turns(made)
    groups = feed._groups(0, 0, 1)
    assert groups[0].rewards == pytest.approx(
        [sum(0.25 * len(act) for act in talker.seen) for talker in made[-4:]]
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "2 * (3 + 4)"}}</tool_call>', "14"),
        (
            '<tool_call>{"name": "calculator", "arguments": "{\\"expression\\": \\"7/2\\"}"}</tool_call>',
            "3.5",
        ),
        ('<tool_call>{"name": "oven", "arguments": {}}</tool_call>', "error: there is no tool 'oven'"),
        ("<tool_call>{2 + 3}</tool_call>", "error: JSONDecodeError"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "1/0"}}</tool_call>', "error: Zero"),
        ('<tool_call>["calculator"]</tool_call>', "error: TypeError"),
        (
            '<tool_call>{"name": "calculator", "arguments": {"expression": "2 +"}}</tool_call>',
            "error: Syntax",
        ),
    ],
)
def test_tools_answer_and_faults_are_told(call, said):
    observation, worth, over = with_tools(["calculator"])().step(f"Let me see. {call}")
    assert observation.startswith(said)
    assert (worth, over) == (0.0, False)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print(sum(range(10)))", "45"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("print('a' +", "SyntaxError"),
        ("x = 3", "the program printed nothing"),
        ("print(open('/etc/passwd').read())", "FileNotFoundError"),
        ("import socket; socket.socket(); print('out')", "PermissionError"),
        ("while True: print('x' * 1000)", "error: the program prints without end"),
    ],
)
def test_python_runs_in_the_sandbox_and_nowhere_else(program, said):
    """L14: what a model calls as a tool has the walls that graded programs have."""
    observation = with_tools(["python"])().step(
        "<tool_call>" + json.dumps({"name": "python", "arguments": {"program": program}}) + "</tool_call>"
    )[0]
    assert observation.startswith(said), observation


def test_a_turn_without_a_call_is_the_last():
    assert ToolUse({}, {}).step("The answer is 14.") == ("", 0.0, True)


@pytest.mark.parametrize("text", ["__import__('os')", "2 ** 99", "'a' * 9", "(1).real", "True + 1"])
def test_the_calculator_calculates_and_nothing_else(text):
    with pytest.raises(ValueError, match="only numbers"):
        calculate({}, text)


def test_tools_and_environments_from_a_recipe(tmp_path):
    save(tmp_path / "base", small_model(own(), context=2048), own())
    (tmp_path / "echo.py").write_text(ENVIRONMENT)
    (tmp_path / "rl.yaml").write_text(
        "name: rl\nstages:\n"
        "  tools: {kind: rlvr, from: ./base, data: {'world:sums?form=prompt': {limit: 4}}, "
        "reward: [math], steps: 1, prompts: 2, group: 2, max_new_tokens: 12, tools: [calculator]}\n"
        "  echo: {kind: rlvr, from: ./base, data: {'world:sums?form=prompt': {limit: 4}}, "
        "reward: [math], steps: 1, prompts: 2, group: 2, max_new_tokens: 12, environment: 'echo.py:Echo'}\n"
    )
    run = trivium.run(tmp_path / "rl.yaml", runs=tmp_path / "runs")
    assert run["tools"].metrics[-1]["step"] == run["echo"].metrics[-1]["step"] == 1
