"""How close models are inside: hidden states by layer (CKA), and weights (task vectors, plain and by Fisher).

Linear CKA of states X, Y [contexts, width], columns centred, is |Y'X|^2 / (|X'X| |Y'Y|) (Kornblith et al.,
1905.00414). A task vector is what training added to the base's weights, t_A = w_A - w_0 (Ilharco et al.,
2212.04089); two are compared by their cosine, and by the cosine under the diagonal of the base's Fisher
matrix, which weighs a change by what it does to the base's predictions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.lab.behaviour import Passage, encode
from trivium.lab.gather import Member
from trivium.model.attention import Documents

LONGEST = 256
FISHER_PROBES = 24


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Of states [contexts, width] and [contexts, other width]."""
    x, y = (one - one.mean(0) for one in (x.double(), y.double()))
    cross = (y.T @ x).norm() ** 2
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / scale) if scale > 0 else float("nan")


def common_length(members: Sequence[Member]) -> int:
    """The tokens of a text that all models read, so that they are compared over the same places."""
    return min(LONGEST, *(one.model.config.context for one in members))


@torch.no_grad()
def states(member: Member, texts: Sequence[Passage], longest: int) -> list[Tensor]:
    """For each layer its output [contexts, width], over the looked-at places in `longest` tokens of each."""
    kept: list[list[Tensor]] = [[] for _ in member.model.layers]
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output, into=into: into.append(output.float().cpu()))
        for layer, into in zip(member.model.layers, kept, strict=True)
    ]
    picked = []
    try:
        for text in texts:
            ids, places = encode(text, member.tokenizer, longest)
            if not places:
                continue
            picked.append(torch.tensor(places))
            device = member.model.device
            member.model(torch.tensor(ids, device=device), Documents([len(ids)], device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat([one[places] for one, places in zip(some, picked, strict=True)]) for some in kept]


def cka(members: Sequence[Member], texts: Sequence[Passage]) -> list[list[list[float]]]:
    """[models, models, layers]; models of different depths are compared at the same share of it."""
    longest = common_length(members)
    found = [states(one, texts, longest) for one in members]
    table = []
    for mine in found:
        row = []
        for other in found:
            deep = max(len(mine), len(other))
            at = lambda some, layer, deep=deep: some[round((layer + 1) * len(some) / deep) - 1]
            row.append([round(linear_cka(at(mine, n), at(other, n)), 6) for n in range(deep)])
        table.append(row)
    return table


def fisher_diagonal(base: Member, texts: Sequence[Passage], seed: int = 0) -> dict[str, Tensor]:
    """By parameter the mean square of the gradient of log p(y|c), y drawn from the base itself."""
    generator = torch.Generator().manual_seed(seed)
    model = base.model
    total: dict[str, Tensor] = {}
    count = 0
    wanted = {name: one for name, one in model.named_parameters() if one.is_floating_point()}
    before = {name: one.requires_grad for name, one in wanted.items()}
    for one in wanted.values():
        one.requires_grad_(True)
    try:
        for text in texts[:FISHER_PROBES]:
            ids, places = encode(text, base.tokenizer, min(LONGEST, model.config.context))
            if not places:
                continue
            hidden = model(torch.tensor(ids, device=model.device), Documents([len(ids)], model.device))
            scores = model.logits(hidden[torch.tensor(places, device=model.device)])
            log_p = torch.log_softmax(scores.float(), -1)
            drawn = torch.multinomial(log_p.exp().cpu(), 1, generator=generator).to(log_p.device)
            # One gradient a text stands for its contexts: their cross terms vanish in the mean.
            gradients = torch.autograd.grad(
                log_p.gather(1, drawn).sum(), list(wanted.values()), allow_unused=True
            )
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    square = gradient.detach().cpu().double() ** 2
                    total[name] = total[name] + square if name in total else square
            count += len(places)
    finally:
        for name, one in wanted.items():
            one.requires_grad_(before[name])
    return {name: one / max(count, 1) for name, one in total.items()}


def task_vectors(members: Sequence[Member], base: Member) -> list[dict[str, Tensor]] | None:
    """What each added to the base's weights; None where the shapes differ."""
    start = {name: one.detach().cpu() for name, one in base.model.state_dict().items()}
    found = []
    for member in members:
        mine = member.model.state_dict()
        if {n: one.shape for n, one in mine.items()} != {n: one.shape for n, one in start.items()}:
            return None
        found.append({name: (mine[name].detach().cpu() - start[name]).double() for name in start})
    return found


def cosines(
    vectors: Sequence[dict[str, Tensor]], weights: dict[str, Tensor] | None = None
) -> list[list[float | None]]:
    """[models, models]: the cosine of the task vectors, weighted where weights are given."""
    weigh = lambda name, one: one if weights is None else one * weights.get(name, torch.zeros(()))
    inner = [[sum(float((weigh(n, a[n]) * b[n]).sum()) for n in a) for b in vectors] for a in vectors]
    size = [inner[n][n] ** 0.5 for n in range(len(vectors))]
    return [
        [round(inner[i][j] / (size[i] * size[j]), 6) if size[i] > 0 and size[j] > 0 else None
         for j in range(len(vectors))]
        for i in range(len(vectors))
    ]  # fmt: skip


def inside(
    members: Sequence[Member], base: Member, texts: Sequence[Passage], seed: int = 0
) -> dict[str, Any]:
    """CKA, and where the shapes allow it the cosines of the task vectors."""
    found: dict[str, Any] = {"cka": None, "task_vector": None, "task_vector_fisher": None}
    if len({one.tokenizer.fingerprint for one in [*members, base]}) > 1:
        return found
    found["cka"] = cka(members, texts)
    vectors = task_vectors(members, base)
    if vectors is not None:
        found["task_vector"] = cosines(vectors)
        found["task_vector_fisher"] = cosines(vectors, fisher_diagonal(base, texts, seed))
    return found
