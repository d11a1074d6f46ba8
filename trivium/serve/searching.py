"""Answers that are searched for: within the server's bounds, and beside everybody else's answers.

A search is many rounds of short answers. Its bookkeeping runs on a thread of its own; what it draws goes
through the worker like any other request, at most half of the rows at a time for all searches together, and
reward models score on the thread that computes, a few texts between two steps.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

from trivium.evals.searching import OWN_PROBABILITY, answer_key, scorer_of, seeded
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import MAXIMUM_TEMPERATURE, MINIMUM_TEMPERATURE, seed_of_sample
from trivium.generate.search.explore import Explorer
from trivium.generate.search.run import SearchResult, drive, walk
from trivium.generate.search.settings import SAMPLES, SearchSettings
from trivium.generate.search.tree import Node
from trivium.grade.process import Aggregation, ProcessScorer
from trivium.grade.scorer import scorer
from trivium.serve.failures import RequestRefused
from trivium.serve.fitting import FromThread
from trivium.serve.limits import Limits
from trivium.serve.pieces import Piece
from trivium.serve.protocol import ChatBody
from trivium.serve.worker import READ_AT_ONCE, Adapted, Generation, Worker

RULES = ("steps",)
"""Scorers that need no model and no answer to compare with."""
SECONDS_UNTIL_ROOM = 0.1


class Searches:
    """The searches of one server: what they may ask for, who scores them, and how many there are."""

    def __init__(self, limits: Limits, judges: Mapping[str, Any]) -> None:
        """`judges` are open reward models by the name under which clients ask for them."""
        self.limits, self.judges = limits, dict(judges)
        self._running = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a client may ask for, for the card of a model."""
        return {
            "samples": self.limits.search_samples,
            "tokens": self.limits.search_tokens,
            "steps": self.limits.search_steps,
            "scorers": [OWN_PROBABILITY, *RULES, *self.judges],
        }

    def settings(self, body: ChatBody, length: int | None, room: int) -> SearchSettings:
        """The search that a request asks for, with its length; refused beyond the server's bounds.

        `length` is what the request says of an answer's length, `room` what the context leaves.
        """
        assert body.search is not None
        limits, asked = self.limits, body.search
        said = {"temperature": body.temperature, "top_p": body.top_p, "seed": body.seed}
        given = {name: value for name, value in said.items() if value is not None}
        given |= asked.model_dump(exclude={"tree"}, exclude_unset=True)
        if not MINIMUM_TEMPERATURE <= given.get("temperature", 1) <= MAXIMUM_TEMPERATURE:
            least = f"{MINIMUM_TEMPERATURE:g} to {MAXIMUM_TEMPERATURE:g}"
            raise _refused("temperature", f"is {given['temperature']:g}; a search draws with {least}")
        at_once = max(asked.n, 1 if asked.method in SAMPLES else asked.width)
        for name, value, most in (
            ("n", at_once, limits.search_samples),
            ("max_steps", asked.max_steps, limits.search_steps),
            ("lookahead", asked.lookahead, limits.search_steps),
            ("token_budget", asked.token_budget or 1, limits.search_tokens),
            ("max_new_tokens", asked.max_new_tokens or 1, limits.new_tokens),
            ("separator", len(asked.separator), limits.stop_characters),
        ):
            if value > most:
                raise _refused(name, f"asks for {value}, and this server serves at most {most}")
        given["max_new_tokens"] = length = (
            asked.max_new_tokens
            or length
            or max(1, min(room, limits.new_tokens, limits.search_tokens // at_once))
        )
        if at_once * length > limits.search_tokens:
            problem = f"asks for {at_once} answers of {length} tokens, and this server lets a search draw "
            raise _refused("n", f"{problem}{limits.search_tokens} tokens")
        if asked.method not in SAMPLES:
            given["token_budget"] = asked.token_budget or limits.search_tokens
        return SearchSettings.model_validate(given)

    def judge(self, named: str | Mapping[str, Any] | None) -> Any:
        """Who scores: the model itself, a rule, or a reward model that the server was started with."""
        options = {"model": named} if isinstance(named, str) else dict(named or {"model": OWN_PROBABILITY})
        name, how = options.pop("model", None), options.pop("aggregate", None)
        known = (OWN_PROBABILITY, *RULES, *self.judges)
        if options or name not in known:
            raise _refused("scorer", f"is none of {', '.join(known)}; `--scorer` names more to the server")
        if how is None:
            return scorer(name) if name in RULES else self.judges.get(name)
        judge = self.judges.get(name)
        if not isinstance(judge, ProcessScorer) or how not in get_args(Aggregation):
            raise _refused("scorer.aggregate", f"is one of {', '.join(get_args(Aggregation))}, for steps")
        judge = copy.copy(judge)
        judge.how = cast(Aggregation, how)
        return judge

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a search among those that run, or refuse it."""
        if self._running >= self.limits.searches:
            problem = f"{self._running} searches are running, at most {self.limits.searches} do"
            raise RequestRefused(problem, status=429, code="rate_limit_exceeded", retry_after=1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _refused(name: str, problem: str) -> RequestRefused:
    return RequestRefused(f"search.{name} {problem}", parameter=f"search.{name}", code="invalid_value")


class SearchOfClient(FromThread):
    """One client's search: a thread walks the tree, the worker draws and scores, until the client leaves."""

    def __init__(
        self,
        worker: Worker | Adapted,
        settings: SearchSettings,
        judge: Any,
        prompt: Sequence[Mapping[str, Any]],
        ids: list[int],
        stop: tuple[str, ...],
    ) -> None:
        super().__init__(worker)
        self._scorer = scorer_of(judge, [dict(message) for message in prompt])
        self._computes = hasattr(judge, "model")
        assert settings.max_new_tokens is not None
        longest = settings.max_new_tokens
        self._explorer = Explorer(ids, seeded(settings), self._score, worker.tokenizer, longest, stop)
        self._begun = False

    def run(self) -> SearchResult:
        """Search to the end; called from a thread that may wait."""
        (result,) = drive([walk(self._explorer, answer_key)], lambda asked: self._wait(self._drawn(asked)))
        return result

    def _score(self, nodes: Sequence[Node]) -> Sequence[float]:
        if not self._computes:
            return self._scorer(nodes)
        found: list[float] = []
        for start in range(0, len(nodes), READ_AT_ONCE):
            some = nodes[start : start + READ_AT_ONCE]
            found += self._wait(self._worker.call(partial(self._scorer, some)))
        return found

    async def _drawn(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Every sample is a request of its own, with the seed that it has among the samples of one."""
        alone = [
            replace(one, n=1, sampling=replace(one.sampling, seed=seed_of_sample(one.sampling.seed or 0, k)))
            for one in requests
            for k in range(one.n)
        ]
        tasks = [asyncio.ensure_future(self._sample(one)) for one in alone]
        try:
            found = iter(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        return [[next(found) for _ in range(one.n)] for one in requests]

    async def _sample(self, request: Request) -> Completion:
        async with self._worker.search_rows:
            generation = await self._submitted(request)
            try:
                async for _ in generation.pieces():
                    self._begun = True
                return generation.handles[0].completions[0]
            finally:
                generation.close()

    async def _submitted(self, request: Request) -> Generation:
        """Hand a sample to the worker; a search that has begun waits where there is no room."""
        while True:
            try:
                return await self._worker.submit([request])
            except RequestRefused as refusal:
                if refusal.status != 429 or not self._begun:
                    raise
            await asyncio.sleep(SECONDS_UNTIL_ROOM)


def told_of_search(found: SearchResult, *, tree: bool) -> dict[str, Any]:
    """What stands beside the answer: how it was found, and on request all that was drawn."""
    record = found.as_json()
    return {name: one for name, one in record.items() if name != "text" and (tree or name != "tree")}


async def in_one_piece(found: SearchResult) -> AsyncGenerator[list[Piece]]:
    """A search's answer as the pieces of one sample, of which it has one."""
    yield [Piece(0, found.text, found.tokens, (), "stop" if found.ended else "length")]
