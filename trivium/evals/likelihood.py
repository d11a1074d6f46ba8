"""Log-likelihoods of continuations: texts that begin alike are computed once, as branches of one tree."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents, Group, padded_length
from trivium.model.transformer import Transformer

LARGEST_TREE = 768
TOKENS_AT_ONCE = 4096
SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a continuation: per token, and whether it would have written it itself."""

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass
class Tree:
    """Texts with a common beginning: every token once, each seeing its own ancestors."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, int]] = field(default_factory=list)
    """The node a branch grows from (-1: none), its first node and the one after its last."""
    wanted: list[tuple[int, list[int]]] = field(default_factory=list)
    """For each text, the nodes after which its scored tokens come."""

    def grow(self, text: Sequence[int], shared: int) -> None:
        """Add a text of which the first `shared` tokens are the last one's."""
        parent = self.path[shared - 1] if shared else -1
        first = len(self.tokens)
        self.tokens += text[shared:]
        self.depths += range(shared, len(text))
        self.path = [*self.path[:shared], *range(first, len(self.tokens))]
        if len(self.tokens) > first:
            self.branches.append((parent, first, len(self.tokens)))

    @property
    def forked(self) -> bool:
        """Whether it is more than one text after the other."""
        return any(parent != first - 1 for parent, first, _ in self.branches)

    def seen(self, length: int) -> Tensor:
        """True where a node (row) sees another (column), padded to `length`; padding sees itself."""
        mask = torch.eye(length, dtype=torch.bool)
        for parent, first, end in self.branches:
            if parent >= 0:
                mask[first:end] = mask[parent]
            mask[first:end, first:end] = torch.ones(end - first, end - first, dtype=torch.bool).tril()
        return mask


class Forest(Documents):
    """Trees as the model's context: nodes of one tree see their ancestors and nothing else."""

    def __init__(self, trees: Sequence[Tree], device: torch.device) -> None:
        depths = torch.tensor([depth for tree in trees for depth in tree.depths])
        super().__init__([len(tree.tokens) for tree in trees], device, depths)
        # No kernel knows trees.
        self.kernel = None
        self.trees = trees
        self.seen: dict[tuple[int, int | None], Tensor | None] = {}

    def seen_by(self, group: Group, window: int | None) -> Tensor | None:
        """The mask [B, 1, T, T] of the trees of one group, None where plain causal attention is the same."""
        key = (group.length, window)
        if key not in self.seen:
            members = [
                tree for tree in self.trees if self.uniform or padded_length(len(tree.tokens)) == group.length
            ]
            self.seen[key] = None
            if window is not None or any(tree.forked for tree in members):
                mask = torch.stack([tree.seen(group.length) for tree in members])
                if window is not None:
                    depths = torch.zeros(len(members), group.length, dtype=torch.long)
                    for row, tree in enumerate(members):
                        depths[row, : len(tree.depths)] = torch.tensor(tree.depths)
                    mask &= (depths[:, :, None] - depths[:, None, :]) < window
                self.seen[key] = mask[:, None].to(self.device)
        return self.seen[key]


def fits(model: Transformer, length: int) -> bool:
    """Whether a text of so many tokens can be read at once."""
    config = model.config
    endless = config.positions == "rope" and config.rope.get("rope_type") == "dynamic"
    return endless or length <= config.context


def log_likelihoods(
    model: Transformer, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its prompt, which has at least one token."""
    for prompt, continuation in zip(prompts, continuations, strict=True):
        assert prompt, "a prompt has at least one token"
        assert continuation, "a continuation has at least one token"
        length = len(prompt) + len(continuation) - 1
        if not fits(model, length):
            raise TriviumError(
                f"A question has {length} tokens and the model's window is {model.config.context}: "
                "ask with fewer shots or shorter questions."
            )
    found: list[Likelihood | None] = [None] * len(prompts)
    for trees in _at_once(_planted(model, prompts, continuations)):
        for index, likelihood in _read(model, trees, continuations):
            found[index] = likelihood
    return [one for one in found if one is not None]


def _planted(
    model: Transformer, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[Tree]:
    """The texts sorted, so that those that begin alike stand together, and grown into trees."""
    texts = [
        (tuple(prompt) + tuple(continuation))[:-1]
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    # Angles that depend on a text's length are not the same for two texts that begin alike.
    alone = any(one is not None and one.grows for one in (model.rotary, model.local_rotary))
    trees: list[Tree] = []
    before: tuple[int, ...] = ()
    for index in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[index]
        shared = _common(before, text)
        whole = text == before
        # A beginning that is a small part of a text is not worth a mask as large as both.
        related = bool(trees) and 2 * shared >= len(text) and (whole or not alone)
        if not related or len(trees[-1].tokens) + len(text) - shared > max(LARGEST_TREE, len(text)):
            trees.append(Tree())
            shared = 0
        trees[-1].grow(text, shared)
        trees[-1].wanted.append((index, trees[-1].path[len(prompts[index]) - 1 :]))
        before = text
    return trees


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    most = min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    return next(place for place in range(most) if left[place] != right[place])


def _at_once(trees: Sequence[Tree]) -> list[list[Tree]]:
    """Trees of about one size together, as many as a pass takes."""
    passes: list[list[Tree]] = []
    room = 0
    for tree in sorted(trees, key=lambda one: len(one.tokens)):
        if not passes or len(tree.tokens) > room:
            passes.append([])
            room = TOKENS_AT_ONCE
        passes[-1].append(tree)
        room -= len(tree.tokens)
    return passes


@torch.inference_mode()
def _read(
    model: Transformer, trees: Sequence[Tree], continuations: Sequence[Sequence[int]]
) -> list[tuple[int, Likelihood]]:
    tokens = torch.tensor([token for tree in trees for token in tree.tokens], device=model.device)
    hidden = model(tokens, Forest(trees, model.device))
    places: dict[int, int] = {}
    rows: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []
    start = 0
    for tree in trees:
        for index, nodes in tree.wanted:
            owners.append((index, len(nodes)))
            rows += [places.setdefault(start + node, len(places)) for node in nodes]
            targets += continuations[index]
        start += len(tree.tokens)
    # Only nodes after which something is scored meet the output matrix, and each of them once.
    chosen = hidden[torch.tensor(list(places), device=model.device)]
    row, target = (torch.tensor(part, device=model.device) for part in (rows, targets))
    logprobs = torch.empty(len(rows), dtype=torch.float32, device=model.device)
    best = torch.empty(len(rows), dtype=torch.bool, device=model.device)
    size = max(16, SCORES_AT_ONCE // model.config.vocabulary)
    for first in range(0, len(chosen), size):
        logits = model.logits(chosen[first : first + size])
        here = ((row >= first) & (row < first + size)).nonzero()[:, 0]
        lines, wanted = row[here] - first, target[here]
        logprobs[here] = logits[lines, wanted] - torch.logsumexp(logits, dim=-1)[lines]
        best[here] = logits.argmax(-1)[lines] == wanted
    found, values, own = [], logprobs.tolist(), best.tolist()
    start = 0
    for index, count in owners:
        end = start + count
        found.append((index, Likelihood(tuple(values[start:end]), all(own[start:end]))))
        start = end
    return found
