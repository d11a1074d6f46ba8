"""Drawing and scoring steps: what every method of search is made of.

A method is a generator: it yields requests and is sent their completions, so that the caller decides how they
are generated. `run` drives many searches at once in one engine, round by round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling
from trivium.generate.search.settings import SearchSettings
from trivium.generate.search.tree import Node, Tree
from trivium.kit.fingerprint import fingerprint
from trivium.tokens.tokenizer import Tokenizer

Requests = list[Request]
Completions = list[list[Completion]]
Result = TypeVar("Result")
Rounds = Generator[Requests, Completions, Result]
Scorer = Callable[[Sequence[Node]], Sequence[float]]
"""Scores partial or whole solutions, from 0 to 1, higher is better; -inf where one cannot be judged."""


def own_probability(nodes: Sequence[Node]) -> list[float]:
    """The model's own probability of a token, as a geometric mean over the path."""
    return [math.exp(node.mean_logprob()) for node in nodes]


def of_texts(score: Callable[[str], float]) -> Scorer:
    """A scorer from a function of a partial text."""
    return lambda nodes: [float(score(node.text)) for node in nodes]


def of_answers(
    scorer: Any, prompt: Any, columns: dict[str, Any] | None = None, *, logits: bool = False
) -> Scorer:
    """A scorer from one that scores completions to a prompt; `logits` become probabilities."""

    def score(value: float | None) -> float:
        # Below every score, so that what cannot be judged is preferred to nothing.
        if value is None:
            return -math.inf
        # The sigmoid in the form that no large value overflows.
        return 0.5 * (1 + math.tanh(value / 2)) if logits else float(value)

    def scored(nodes: Sequence[Node]) -> list[float]:
        texts = [node.text for node in nodes]
        many = getattr(scorer, "many", None)
        found = (
            many([prompt] * len(texts), texts)
            if many is not None
            else [scorer(text, prompt=prompt, **(columns or {})) for text in texts]
        )
        return [score(one.value) for one in found]

    return scored


@dataclass
class Explorer:
    """One search under way: its tree, its budget, and who scores."""

    prompt: list[int]
    settings: SearchSettings
    scorer: Scorer
    tokenizer: Tokenizer
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts that end a whole solution."""
    tree: Tree = field(default_factory=Tree)
    tokens: int = 0
    """How many tokens were drawn so far, those of a look-ahead included."""
    scored: int = 0

    @property
    def spent(self) -> bool:
        """Whether the budget allows no further round."""
        return self.settings.token_budget is not None and self.tokens >= self.settings.token_budget

    def expand(self, nodes: Sequence[Node], width: int, *, whole: bool = False) -> Rounds[list[list[Node]]]:
        """`width` next steps of each node, or whole solutions, scored; equal ones become one node."""
        open_nodes = [node for node in nodes if not node.finished]
        requests = [
            self._request(node, width, whole=whole, place=sum(child.drawn for child in node.children))
            for node in open_nodes
        ]
        found = (yield requests) if requests else []
        fresh: list[Node] = []
        grown: dict[Node, list[Node]] = {}
        for node, completions in zip(open_nodes, found, strict=True):
            grown[node] = self._hang(node, completions, whole=whole)
            fresh += grown[node]
        yield from self.score(fresh)
        return [grown.get(node, []) for node in nodes]

    def score(self, nodes: Sequence[Node]) -> Rounds[None]:
        """Score nodes, where settings say so by what lies some steps beyond them."""
        seen = list(nodes)
        if self.settings.lookahead and nodes:
            seen = yield from self._beyond(nodes)
        self.scored += len(nodes)
        if nodes:
            for node, score in zip(nodes, self.scorer(seen), strict=True):
                node.score = float(score)

    def finish(self, node: Node) -> Rounds[Node]:
        """Go on from a node to the end of a solution, greedily."""
        if node.finished:
            return node
        [completions] = yield [self._request(node, 1, whole=True, greedy=True)]
        (end,) = self._hang(node, completions, whole=True)
        yield from self.score([end])
        return end

    def _beyond(self, nodes: Sequence[Node]) -> Rounds[list[Node]]:
        """For each node one that lies up to `lookahead` greedy steps beyond it, and in no tree."""
        ahead = list(nodes)
        for _ in range(self.settings.lookahead):
            places = [place for place, node in enumerate(ahead) if not node.finished]
            if not places or self.spent:
                break
            found = yield [self._request(ahead[place], 1, greedy=True) for place in places]
            aside = Tree()
            for place, completions in zip(places, found, strict=True):
                node = ahead[place]
                below = Node(node.number, node.parent, node.tokens, node.text, node.logprob)
                (ahead[place],) = self._hang(below, completions, tree=aside)
        return ahead

    def _request(
        self, node: Node, width: int, *, whole: bool = False, greedy: bool = False, place: int = 0
    ) -> Request:
        settings, begun = self.settings, node.all_tokens
        room = self.max_new_tokens - len(begun)
        last = whole or node.depth + 1 >= settings.max_steps
        return Request(
            [*self.prompt, *begun],
            Sampling(
                temperature=0.0 if greedy else settings.temperature,
                top_p=1.0 if greedy else settings.top_p,
                max_new_tokens=max(1, room),
                stop=self.stop if last else (settings.separator, *self.stop),
                logprobs=True,
                seed=int(fingerprint([settings.seed, self.prompt, begun, place]), 16) % 2**63,
            ),
            n=width,
        )

    def _hang(
        self, node: Node, completions: Sequence[Completion], *, whole: bool = False, tree: Tree | None = None
    ) -> list[Node]:
        """Completions as children of a node; equal ones become one."""
        found: dict[tuple[int, ...], Node] = {}
        for one in completions:
            self.tokens += len(one.tokens)
            key = tuple(one.tokens)
            if key in found:
                found[key].drawn += 1
                continue
            tokens = [*node.all_tokens, *one.tokens]
            ends = bool(one.tokens) and one.tokens[-1] in self.tokenizer.stop_ids
            text = self.tokenizer.decode(tokens[:-1] if ends else tokens)
            stops = [place for stop in self.stop if (place := self._place(stop, text, node)) >= 0]
            text = text[: min(stops, default=len(text))]
            ended = ends or bool(stops)
            last = whole or node.depth + 1 >= self.settings.max_steps
            finished = ended or last or len(tokens) >= self.max_new_tokens
            found[key] = (tree or self.tree).add(
                node, list(one.tokens), text, float(sum(one.logprobs)), finished=finished, ended=ended
            )
        return list(found.values())

    def _place(self, stop: str, text: str, node: Node) -> int:
        """Where a stop text begins that ends beyond a node's text; -1 where there is none."""
        # It may begin in the steps before: a stop such as an empty line contains the separator.
        return text.find(stop, max(0, len(node.text) - len(stop) + 1))
