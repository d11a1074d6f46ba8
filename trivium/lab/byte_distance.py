"""How far models lie apart that cut text into different tokens: the divergence of whole texts, per byte.

For texts x that a model p writes, the mean of (log p(x) - log q(x)) / bytes(x) estimates KL(p || q) per byte,
whatever tokens each of them reads x in. Both directions need texts of either model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trivium.evals.results import as_json
from trivium.evals.statistics import bootstrap
from trivium.lab.behaviour import LONGEST, Passage, continued, encode
from trivium.lab.gather import Member
from trivium.model.attention import Documents

WRITTEN = 48
"""How many tokens a model writes after each beginning."""


def per_byte(member: Member, first: Member, texts: Sequence[Passage], seed: int = 0) -> list[dict[str, Any]]:
    """For every kind of text the divergence both ways in nats per byte, with intervals over texts."""
    found = []
    for kind in dict.fromkeys(text.kind for text in texts):
        prompts = [text.before for text in texts if text.kind == kind]
        ways = {"kl": (member, first), "reverse": (first, member)}
        row: dict[str, Any] = {"kind": kind}
        for name, (writer, other) in ways.items():
            most = min(WRITTEN, writer.model.config.context // 2)
            room = writer.model.config.context - most - 1
            short = [text for text in prompts if len(writer.tokenizer.encode(text)) <= room]
            written = [one for one in continued(writer, short, most, seed) if one.text]
            found_or_not = [_per_byte(writer, other, one) for one in written]
            values = [value for value in found_or_not if value is not None]
            row[name] = as_json(bootstrap(values)) if values else None
        if row["kl"] is not None and row["reverse"] is not None:
            found.append(row)
    return found


def _per_byte(writer: Member, other: Member, passage: Passage) -> float | None:
    """How much likelier the writer finds its own text than the other does, in nats per byte."""
    plain = replace(passage, messages=())
    scores = [_log_probability(one, plain) for one in (writer, other)]
    size = len(passage.text.encode())
    return None if None in scores or not size else float(scores[0] - scores[1]) / size  # type: ignore[operator]


@torch.inference_mode()
def _log_probability(member: Member, passage: Passage) -> float | None:
    """The log-probability of a text after what stands before it; None where it does not fit."""
    ids, before = encode(passage, member.tokenizer, LONGEST * 2)
    if len(ids) > member.model.config.context or len(ids) == LONGEST * 2:
        return None
    if not before:
        return None
    device = member.model.device
    tokens = torch.tensor(ids, device=device)
    hidden = member.model(tokens, Documents([len(ids)], device))[torch.tensor(before, device=device)]
    scores = torch.log_softmax(member.model.logits(hidden).float(), dim=-1).double()
    chosen = tokens[[place + 1 for place in before]]
    return float(scores.gather(1, chosen[:, None]).sum())
