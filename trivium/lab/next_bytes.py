"""Models of different vocabularies on common ground: the distribution of the next byte at common borders.

Where a token ends in every model's reading of a text, each says which token comes next, and so which byte:
the probability of a byte is the sum over the tokens that begin with it. Control tokens share one more place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.lab.behaviour import Passage
from trivium.model.attention import Documents

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
