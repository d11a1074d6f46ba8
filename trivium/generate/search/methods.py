"""The methods of search, each a walk over the tree that an explorer grows.

Written after search-and-learn (beam search, DVTS), AlphaZero's PUCT over sampled actions (1712.01815,
2104.06303) and Snell et al. (2408.03314). All of them end with solutions in the tree; which one is handed
over is the read-out's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trivium.generate.search.explore import Explorer, Rounds
from trivium.generate.search.settings import Method
from trivium.generate.search.tree import Node


def best_of(explorer: Explorer) -> Rounds[None]:
    """`n` independent solutions; within a budget, so many at a time as a node has next steps."""
    settings, drawn = explorer.settings, 0
    while drawn < settings.n and not explorer.spent:
        count = settings.n if settings.token_budget is None else min(settings.width, settings.n - drawn)
        yield from explorer.expand([explorer.tree.root], count, whole=True)
        drawn += count


def beam(explorer: Explorer) -> Rounds[None]:
    """Beam search over steps: of all next steps the n / width best live on, and each has `width` next ones.

    A solution that ends leaves the beam; the search is over when `n` have, or nothing lives.
    """
    settings, tree = explorer.settings, explorer.tree
    grown = yield from explorer.expand([tree.root], settings.n)
    while not explorer.spent and _solutions(tree.nodes) < settings.n:
        alive = [node for some in grown for node in some if not node.finished]
        if not alive:
            break
        grown = yield from explorer.expand(_best(alive, settings.kept), settings.width)


def dvts(explorer: Explorer) -> Rounds[None]:
    """Diverse verifier tree search: n / width subtrees, each of which goes on from its own best step."""
    settings, tree = explorer.settings, explorer.tree
    [first] = yield from explorer.expand([tree.root], settings.n)
    subtrees: list[list[Node]] = [first[place :: settings.kept] for place in range(settings.kept)]
    for number, some in enumerate(subtrees):
        for node in some:
            node.subtree = number
    while not explorer.spent:
        leading = [_best(some, 1)[0] for some in subtrees if some]
        # A subtree whose best step ends a solution is done.
        alive = [node for node in leading if not node.finished]
        if not alive:
            break
        subtrees = yield from explorer.expand(alive, settings.width)


def mcts(explorer: Explorer) -> Rounds[None]:
    """Monte-Carlo tree search with PUCT and the scorer as the value: `n` simulations.

    From a node s the child a with the largest Q(s, a) + c P(a) sqrt(N(s)) / (1 + N(a)) is taken. Q is the
    mean of the values backed up through it and, before the first, its own score; the prior P is how often it
    was drawn among its siblings. At the end of the walk a node is expanded and its score is backed up.
    """
    settings, tree = explorer.settings, explorer.tree
    for _ in range(settings.n):
        node = tree.root
        while node.children and not _exhausted(node):
            node = _most_promising(node, settings.exploration)
        if not node.finished:
            yield from explorer.expand([node], settings.width)
        # A step that cannot be judged is backed up as the lowest score so far, not as minus infinity.
        value = node.score if math.isfinite(node.score) else _lowest(tree.nodes)
        for one in (tree.root, *node.path):
            one.visits += 1
            one.total += value
        if explorer.spent or _exhausted(tree.root):
            break
    if not tree.solutions:
        node = tree.root
        while node.children:
            node = max(node.children, key=lambda child: (child.visits, child.value))
        yield from explorer.finish(node)


def backtrack(explorer: Explorer) -> Rounds[None]:
    """Depth first: a step that scores below the threshold is drawn again, up to `width` times.

    Then the search goes back a step. It ends with `n` steps drawn, or with the first solution whose steps
    all passed; if none did, the best of what was left is finished.
    """
    settings, tree = explorer.settings, explorer.tree
    node = tree.root
    for _ in range(settings.n):
        if explorer.spent:
            break
        [[child, *_]] = yield from explorer.expand([node], 1)
        if child.score >= settings.threshold:
            if child.finished:
                return
            node = child
            continue
        while node.parent is not None and sum(one.drawn for one in node.children) >= settings.width:
            node = node.parent
    if not any(one.score >= settings.threshold for one in tree.solutions):
        open_nodes = [one for one in tree.nodes[1:] if not one.finished]
        if open_nodes:
            yield from explorer.finish(max(open_nodes, key=lambda one: (one.depth, one.score)))


METHODS: dict[Method, Callable[[Explorer], Rounds[None]]] = {
    "best_of": best_of,
    "majority": best_of,
    "weighted": best_of,
    "beam": beam,
    "dvts": dvts,
    "mcts": mcts,
    "backtrack": backtrack,
}


def _best(nodes: Sequence[Node], count: int) -> list[Node]:
    """The highest scores; of equal ones those drawn first."""
    return sorted(nodes, key=lambda node: -node.score)[:count]


def _lowest(nodes: Sequence[Node]) -> float:
    return min((node.score for node in nodes if math.isfinite(node.score)), default=0.0)


def _solutions(nodes: Sequence[Node]) -> int:
    return sum(node.drawn for node in nodes if node.finished)


def _exhausted(node: Node) -> bool:
    """Whether everything below a node has been drawn and visited, so that it teaches nothing new."""
    if node.finished:
        return node.visits > 0
    return bool(node.children) and all(_exhausted(child) for child in node.children)


def _most_promising(node: Node, exploration: float) -> Node:
    """PUCT's choice among the children that are not exhausted."""
    drawn = sum(child.drawn for child in node.children)

    def promise(child: Node) -> float:
        prior = child.drawn / drawn
        return child.value + exploration * prior * math.sqrt(node.visits) / (1 + child.visits)

    return max((child for child in node.children if not _exhausted(child)), key=promise)
