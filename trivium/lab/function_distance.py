"""How close behaviours are: the inner product of what training changed in next-token distributions.

Models A, B, ... come from a base 0. On contexts c of a probe set, with equal weight for each domain,

    D_A(v|c) = log p_A(v|c) - log p_0(v|c) - E_{v ~ p_0}[log p_A / p_0]

is A's behaviour shift; the mean is taken off, as a softmax does not see it. The inner product weighs tokens
by the base's probabilities, <A, B> = E_c sum_v p_0(v|c) D_A D_B. From it follow the distance |D_A - D_B| and
the angle <A, B> / (|D_A| |D_B|), a cosine. Half of |D_A|^2 is KL(p_0 || p_A) to second order; for a small
change t of the weights, <A, B> is t_A' F t_B with the base's Fisher matrix F. KL and Jensen-Shannon stand
beside it; standard errors are the jackknife's over probes.

Models of different vocabularies are compared on the next byte: where a token ends in every model's reading of
a text, the probability of a byte is the sum over the tokens that begin with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.lab.behaviour import Passage, encode
from trivium.lab.gather import Member
from trivium.model.attention import Documents

LONGEST = 256
MATRICES = ("inner", "kl", "js")


@dataclass
class Probed:
    """Sums over the contexts of each probe: for every pair of models one number a context."""

    kinds: list[str]
    """The domain of every probe."""
    counts: np.ndarray
    """[probes]: contexts."""
    sums: dict[str, np.ndarray]
    """By measure [probes, models, models]."""
    unit: str
    """What is predicted: `token` or `byte`."""

    def weights(self) -> np.ndarray:
        """[probes]: what each counts; domains count alike, and contexts of a domain."""
        found = np.zeros(len(self.kinds))
        for kind in dict.fromkeys(self.kinds):
            mine = np.array([one == kind for one in self.kinds])
            total = self.counts[mine].sum()
            if total:
                found[mine] = self.counts[mine] / total
        return found / max(found.sum(), 1e-12)

    def mean(self, name: str, weights: np.ndarray | None = None) -> np.ndarray:
        """[models, models]: the mean over contexts."""
        weights = self.weights() if weights is None else weights
        means = self.sums[name] / np.maximum(self.counts, 1)[:, None, None]
        return np.einsum("p,pij->ij", weights, means)


@torch.no_grad()
def shifts(log_probabilities: Sequence[Tensor], base: Tensor) -> tuple[Tensor, Tensor]:
    """Centred shifts [models, contexts, vocabulary] and the base's probabilities [contexts, vocabulary]."""
    p = base.exp()
    moved = torch.stack([one - base for one in log_probabilities])
    # Where the base gives a token no probability at all, it has no weight either.
    moved = torch.where(p > 0, moved, 0.0)
    return moved - (p * moved).sum(-1, keepdim=True), p


def pairwise(log_probabilities: Sequence[Tensor], base: Tensor) -> dict[str, Tensor]:
    """By measure [models, models]: sums over the contexts; KL of row from column."""
    moved, p = shifts(log_probabilities, base)
    weighted = moved * p
    inner = torch.einsum("icv,jcv->ij", weighted, moved)
    count = len(log_probabilities)
    kl, js = torch.zeros(count, count, dtype=base.dtype), torch.zeros(count, count, dtype=base.dtype)
    probabilities = [one.exp() for one in log_probabilities]
    for i in range(count):
        for j in range(count):
            if i == j:
                continue
            kl[i, j] = _divergence(probabilities[i], log_probabilities[i], log_probabilities[j])
            if i < j:
                middle = torch.logaddexp(log_probabilities[i], log_probabilities[j]) - np.log(2.0)
                both = [_divergence(probabilities[k], log_probabilities[k], middle) for k in (i, j)]
                js[i, j] = js[j, i] = sum(both) / 2
    return {"inner": inner, "kl": kl, "js": js}


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_min(0).sum()


@torch.no_grad()
def probe(members: Sequence[Member], base: Member, texts: Sequence[Passage]) -> Probed:
    """Read every probe with every model; models of other vocabularies than the base's are read on bytes."""
    everyone = [*members, base]
    same = len({one.tokenizer.fingerprint for one in everyone}) == 1
    kinds, counts = [], []
    sums: dict[str, list[np.ndarray]] = {name: [] for name in MATRICES}
    longest = min(LONGEST, *(one.model.config.context for one in everyone))
    for text in texts:
        read = (
            [_by_token(one, text, longest) for one in everyone] if same else aligned(everyone, text, longest)
        )
        if not len(read[0]):
            continue
        found = pairwise(read[:-1], read[-1])
        kinds.append(text.kind)
        counts.append(len(read[0]))
        for name in MATRICES:
            sums[name].append(found[name].numpy())
    shape = (0, len(members), len(members))
    return Probed(
        kinds, np.array(counts), {name: np.array(some or np.zeros(shape)) for name, some in sums.items()},
        "token" if same else "byte",
    )  # fmt: skip


def _by_token(member: Member, text: Passage, longest: int) -> Tensor:
    """Log-probabilities [contexts, vocabulary] of the next token, in float64."""
    ids, before = encode(text, member.tokenizer, longest)
    device = member.model.device
    hidden = member.model(torch.tensor(ids, device=device), Documents([len(ids)], device))
    places = torch.tensor(before, dtype=torch.long, device=device)
    scores = member.model.logits(hidden[places])[:, : member.tokenizer.vocabulary_size].float().cpu()
    return torch.log_softmax(scores, -1).double()


def measures(found: Probed) -> dict[str, Any]:
    """The matrices of the contract, with their standard errors."""
    weights = found.weights()
    values = _matrices(found, weights)
    errors = _errors(found, weights, values)
    tidy = lambda table: [[None if np.isnan(one) else round(float(one), 6) for one in row] for row in table]
    return {
        **{name: tidy(table) for name, table in values.items()},
        "standard_error": {name: tidy(table) for name, table in errors.items()},
    }


def _matrices(found: Probed, weights: np.ndarray) -> dict[str, np.ndarray]:
    inner = found.mean("inner", weights)
    own = np.diag(inner)
    apart = np.sqrt(np.maximum(own[:, None] + own[None, :] - 2 * inner, 0))
    np.fill_diagonal(apart, 0.0)
    lengths = np.sqrt(own[:, None] * own[None, :])
    with np.errstate(invalid="ignore", divide="ignore"):
        angle = np.where(lengths > 1e-12, np.clip(inner / lengths, -1, 1), np.nan)
    return {
        "distance": apart, "angle": angle, "inner": inner, "kl": found.mean("kl", weights),
        "js": found.mean("js", weights),
    }  # fmt: skip


def _errors(found: Probed, weights: np.ndarray, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the jackknife over probes: each is left out once, and the others of its domain count for it."""
    count = len(found.kinds)
    if count < 2:
        return {name: np.full_like(table, np.nan) for name, table in values.items()}
    without = []
    for left in range(count):
        less = weights.copy()
        same = np.array([kind == found.kinds[left] for kind in found.kinds])
        same[left] = False
        if not same.any():
            continue
        less[same] *= 1 + weights[left] / weights[same].sum()
        less[left] = 0.0
        without.append(_matrices(found, less))
    many = len(without)
    return {
        name: np.sqrt((many - 1) / max(many, 1) * sum((one[name] - values[name]) ** 2 for one in without))
        if many
        else np.full_like(values[name], np.nan)
        for name in values
    }


BYTES = 256
OTHER = BYTES
"""The place of everything that begins with no byte: control tokens."""


def first_bytes(member: Any) -> Tensor:
    """[vocabulary]: the first byte of each token."""
    known = member.__dict__.get("_first_bytes")
    if known is None:
        tokenizer = member.tokenizer
        found = []
        for identity in range(tokenizer.vocabulary_size):
            text = (
                "" if identity in tokenizer.control_ids else tokenizer.decode([identity], skip_control=False)
            )
            raw = text.encode("utf-8", "surrogateescape")
            found.append(raw[0] if raw else OTHER)
        known = torch.tensor(found)
        member.__dict__["_first_bytes"] = known
    return known


def borders(member: Any, text: str, longest: int) -> tuple[list[int], list[int]]:
    """A text's tokens, and behind how many bytes of it each of them ends."""
    first = member.tokenizer.beginning_id is not None
    ids = member.tokenizer.encode(text)[: longest - first]
    lengths = member.tokenizer.byte_lengths()
    ends, place = [], 0
    for identity in ids:
        place += int(lengths[identity])
        ends.append(place)
    return ids, ends


@torch.no_grad()
def aligned(members: Sequence[Any], passage: Passage, longest: int) -> list[Tensor]:
    """For each model log-probabilities [contexts, 257] of the next byte, at the borders all of them share."""
    text = passage.before + passage.text
    start = len(passage.before.encode())
    read = [borders(one, text, longest) for one in members]
    shared = set.intersection(*(set(ends) for _, ends in read))
    common = sorted(place for place in shared if place >= max(start, 1) and place < len(text.encode()))
    found = []
    for member, (ids, ends) in zip(members, read, strict=True):
        begin = [] if member.tokenizer.beginning_id is None else [member.tokenizer.beginning_id]
        where = {place: number for number, place in enumerate(ends)}
        device = member.model.device
        tokens = torch.tensor([*begin, *ids], device=device)
        hidden = member.model(tokens, Documents([len(tokens)], device)) if len(tokens) else None
        if hidden is None or not common:
            found.append(torch.zeros(0, BYTES + 1, dtype=torch.float64))
            continue
        places = torch.tensor([len(begin) + where[place] for place in common], device=device)
        size = member.tokenizer.vocabulary_size
        scores = member.model.logits(hidden[places])[:, :size].float().cpu()
        p = torch.softmax(scores, -1).double()
        summed = torch.zeros(len(common), BYTES + 1, dtype=torch.float64).index_add_(
            1, first_bytes(member), p
        )
        found.append(summed.clamp_min(1e-12).log())
    return found
