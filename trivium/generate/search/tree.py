"""The tree of a search: a node is a step, its path from the root is a partial solution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Node:
    """One step, drawn after those above it."""

    number: int
    parent: Node | None
    tokens: list[int]
    """Its own tokens, the separator's among them."""
    text: str
    """All that was said up to its end."""
    logprob: float = 0.0
    """The sum of the log-probabilities of its own tokens, as they were drawn."""
    finished: bool = False
    """Whether the solution ends here, or has no room left."""
    ended: bool = False
    """Whether the model itself ended it."""
    score: float = 0.0
    drawn: int = 1
    """How often it was drawn among its siblings."""
    visits: int = 0
    total: float = 0.0
    """The sum of the values that were backed up through it."""
    children: list[Node] = field(default_factory=list)
    subtree: int = 0
    """Which of the independent subtrees of `dvts` it belongs to."""

    @property
    def depth(self) -> int:
        """How many steps lead here; 0 is the root."""
        return 0 if self.parent is None else 1 + self.parent.depth

    @property
    def path(self) -> list[Node]:
        """The nodes from the first step to this one."""
        above = [] if self.parent is None else self.parent.path
        return [] if self.parent is None else [*above, self]

    @property
    def all_tokens(self) -> list[int]:
        """The tokens of the whole path."""
        return [token for node in self.path for token in node.tokens]

    @property
    def value(self) -> float:
        """The mean of what was backed up, or its own score before any visit."""
        return self.total / self.visits if self.visits else self.score

    @property
    def step(self) -> str:
        """What it says beyond its parent."""
        return self.text[len(self.parent.text) :] if self.parent is not None else ""

    def mean_logprob(self) -> float:
        """The mean log-probability per token of the whole path."""
        tokens = sum(len(node.tokens) for node in self.path)
        return sum(node.logprob for node in self.path) / max(1, tokens)


@dataclass
class Tree:
    """All nodes of one search, in the order in which they were drawn."""

    nodes: list[Node] = field(default_factory=lambda: [Node(0, None, [], "")])

    @property
    def root(self) -> Node:
        """The prompt, before any step."""
        return self.nodes[0]

    @property
    def solutions(self) -> list[Node]:
        """The nodes at which a solution ends."""
        return [node for node in self.nodes if node.finished]

    def add(self, parent: Node, tokens: list[int], text: str, logprob: float, **more: Any) -> Node:
        """Hang a step below a node."""
        node = Node(len(self.nodes), parent, tokens, text, logprob, subtree=parent.subtree, **more)
        self.nodes.append(node)
        parent.children.append(node)
        return node

    def as_json(self, chosen: Node | None = None) -> list[dict[str, Any]]:
        """The nodes as JSON; those on the path to the answer are marked."""
        on_the_way = set() if chosen is None else {node.number for node in chosen.path}
        return [_as_json(node, node.number in on_the_way) for node in self._below_root()]

    def _below_root(self) -> Iterator[Node]:
        return iter(self.nodes[1:])


def finite(score: float) -> float | None:
    """A score for JSON, which has no infinity; None is what could not be judged."""
    return round(score, 6) if math.isfinite(score) else None


def _as_json(node: Node, chosen: bool) -> dict[str, Any]:
    assert node.parent is not None
    return {
        "id": node.number, "parent": node.parent.number, "text": node.step, "score": finite(node.score),
        "logprob": round(node.logprob, 4), "tokens": len(node.tokens), "drawn": node.drawn,
        "visits": node.visits, "value": finite(node.value), "finished": node.finished, "chosen": chosen,
    }  # fmt: skip
