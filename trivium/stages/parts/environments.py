"""Completions in several turns: the model acts, an environment or a tool replies, the acts are learned."""

import ast
import json
import operator
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.grade.rewards import reward_from_file
from trivium.grade.sandbox.client import Fault, Limits, sandbox
from trivium.grade.sandbox.script import run_script
from trivium.grade.sql import open_read_only
from trivium.kit.errors import TriviumError
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_engine import RolloutEngine
from trivium.stages.parts.rollout_worker import Rollout
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S)
_LONGEST_REPLY = 2000
_ROWS, _STEPS = 50, 2_000_000


class Environment(Protocol):
    """Replies to the model's actions; made for every completion, from the columns of its prompt."""

    def step(self, action: str) -> tuple[str, float, bool]:
        """The observation, the reward of the action, and whether the episode is over."""
        ...


Maker = Callable[..., Environment]


@dataclass
class Episode:
    """A completion under way."""

    prompt: Prompt
    environment: Environment
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    earned: float = 0.0
    over: bool = False
    truncated: bool = False

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], learned: bool) -> None:
        """Append tokens exactly as they were sampled or given: nothing is ever tokenised twice."""
        self.tokens += tokens
        self.logprobs += logprobs
        self.learned += [learned] * len(tokens)


class EnvironmentWorker:
    """Samples every completion in turns with an environment of its own, until it is over or too long."""

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        tokenizer: Tokenizer,
        make: Maker,
        *,
        turns: int,
        earns: bool,
    ) -> None:
        self.engine, self.sampling, self.tokenizer = engine, sampling, tokenizer
        self.make, self.turns, self.earns = make, turns, earns

    def generate(self, prompts: Sequence[Prompt], count: int, seeds: Sequence[int]) -> list[list[Rollout]]:
        self.engine.refresh()
        episodes = [
            [Episode(prompt, self.make(**prompt.columns), seed_of_sample(seed, i)) for i in range(count)]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        together = [episode for group in episodes for episode in group]
        for turn in range(self.turns):
            unfinished = [episode for episode in together if not episode.over]
            if not unfinished:
                break
            self._take_turn(unfinished, turn)
        for episode in together:
            episode.truncated |= not episode.over
        return [[self._rollout(episode) for episode in group] for group in episodes]

    def _take_turn(self, episodes: Sequence[Episode], turn: int) -> None:
        room = self.sampling.max_new_tokens
        requests = [
            Request(
                episode.prompt.ids + episode.tokens,
                replace(
                    self.sampling,
                    seed=seed_of_sample(episode.seed, 1000 + turn),
                    logprobs=True,
                    max_new_tokens=room - len(episode.tokens),
                    min_new_tokens=0,
                ),
            )
            for episode in episodes
        ]
        for episode, (action,) in zip(episodes, self.engine.generate(requests), strict=True):
            episode.add(action.tokens, action.logprobs, True)
            episode.messages.append({"role": "assistant", "content": action.text})
            if action.finish_reason != "stop":
                episode.over = episode.truncated = True
                continue
            observation, reward, episode.over = episode.environment.step(action.text)
            episode.earned += reward
            if episode.over:
                continue
            role = getattr(episode.environment, "role", "user")
            words = self._reply(episode.prompt, role, observation)
            if len(episode.tokens) + len(words) >= room:
                episode.over = episode.truncated = True
                continue
            episode.add(words, [0.0] * len(words), False)
            episode.messages.append({"role": role, "content": observation})

    def _reply(self, prompt: Prompt, role: str, text: str) -> list[int]:
        """An observation as the template writes it between two turns of the assistant."""
        if not prompt.is_chat:
            return self.tokenizer.encode(text)
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        short = self.tokenizer.encode_chat(before)
        end = len(short.learned) - short.learned[::-1].index(True)
        whole = self.tokenizer.encode_chat(
            [*before, {"role": role, "content": text}], add_generation_prompt=True
        ).ids
        if whole[:end] != short.ids[:end]:
            raise TriviumError("The chat template rewrites earlier turns, so it cannot be sampled in turns.")
        return whole[end:]

    def _rollout(self, episode: Episode) -> Rollout:
        text = "".join(message["content"] for message in episode.messages)
        return Rollout(
            episode.tokens, episode.logprobs, episode.learned, episode.truncated,
            completion=episode.messages if episode.prompt.is_chat else text,
            environment_reward=episode.earned if self.earns else None,
        )  # fmt: skip


_MODELS_FAULTS = (
    ValueError, TypeError, KeyError, SyntaxError, ArithmeticError, RecursionError, MemoryError,
    sqlite3.Error, sqlite3.Warning,
)  # fmt: skip
"""What a call that a model wrote can raise: none of it ends a training."""


class ToolUse:
    """Runs the tools that a turn calls; a turn without a call is the last."""

    role = "tool"

    def __init__(self, tools: Mapping[str, Callable[..., str]], columns: Mapping[str, Any]) -> None:
        self.tools, self.columns = tools, columns

    def step(self, action: str) -> tuple[str, float, bool]:
        """What the called tools said; a call that cannot be read or run is told so."""
        calls = _CALL.findall(action)
        if not calls:
            return "", 0.0, True
        return "\n".join(self._run(call)[:_LONGEST_REPLY] for call in calls), 0.0, False

    def _run(self, call: str) -> str:
        try:
            asked = json.loads(call)
            name, arguments = asked["name"], asked["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            tool = self.tools.get(name)
            if tool is None:
                return f"error: there is no tool {name!r}; there is {', '.join(self.tools)}"
            return tool(self.columns, **arguments)
        except _MODELS_FAULTS as error:
            return f"error: {type(error).__name__}: {error}"


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(columns: Mapping[str, Any], expression: str) -> str:
    """The value of an arithmetic expression; nothing else is ever evaluated."""

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("only numbers, + - * / // % and brackets")

    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    result = value(ast.parse(expression, mode="eval").body)
    return str(int(result) if isinstance(result, float) and result.is_integer() else result)


def query(columns: Mapping[str, Any], sql: str) -> str:
    """The rows a query finds in the prompt's data base, which can only be read."""
    with closing(open_read_only(str(columns.get("database")))) as connection:
        looks = iter(range(_STEPS // 1000))
        # A query without end is stopped after so many steps of the data base's own machine.
        connection.set_progress_handler(lambda: next(looks, None) is None, 1000)
        return json.dumps(connection.execute(sql).fetchmany(_ROWS), default=str)


_TELLING = """
try:
    exec(compile({source!r}, "program.py", "exec"), {{"__name__": "__main__"}})
except Exception as error:
    print(type(error).__name__ + ": " + str(error))
"""
_LIMITS = Limits(seconds=5.0, cpu=5, memory=256 << 20, output=1 << 16)


def run_python(columns: Mapping[str, Any], program: str) -> str:
    """What a program prints in the sandbox, which neither files nor the network are in."""
    try:
        printed, how = run_script(sandbox(), _TELLING.format(source=program), "", _LIMITS)
    except Fault as error:
        raise TriviumError(f"tools: python: the sandbox failed: {error}.") from error
    if how["ended"] == "overtime":
        return f"error: the program took more than {_LIMITS.seconds:g} seconds"
    if how["ended"] == "endless":
        return "error: the program prints without end"
    if how["code"] != 0:
        return f"error: the program failed (status {how['code']})"
    return printed.decode(errors="replace").strip() or "the program printed nothing"


TOOLS: dict[str, Callable[..., str]] = {"calculator": calculate, "python": run_python, "sql": query}
_ASKS = {
    "calculator": ("Work out an arithmetic expression.", "expression"),
    "python": ("Run a Python program and read what it prints.", "program"),
    "sql": ("Run a query on the data base.", "sql"),
}


def described(names: Sequence[str]) -> list[dict[str, Any]]:
    """The tools as a chat template takes them."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": _ASKS[name][0],
                "parameters": {
                    "type": "object",
                    "properties": {_ASKS[name][1]: {"type": "string"}},
                    "required": [_ASKS[name][1]],
                },
            },
        }
        for name in names
    ]


def with_tools(names: Sequence[str]) -> Maker:
    """An environment that offers these tools."""
    return lambda **columns: ToolUse({name: TOOLS[name] for name in names}, columns)


def maker_of(work: Work, tools: Sequence[str], environment: str | None) -> Maker:
    """What makes the environment of a prompt: the tools, or a class in a file."""
    if environment is None:
        return with_tools(tools)
    if tools:
        raise TriviumError(f"{work.stage}: give it `tools` or an `environment`, not both.")
    return cast(Maker, reward_from_file(environment, work.base).function)
