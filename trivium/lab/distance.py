"""How far models lie from the first of them on some texts.

Models that cut text into different tokens are compared on whole texts: for texts x that a model p writes, the
mean of (log p(x) - log q(x)) / bytes(x) estimates KL(p || q) per byte, whatever tokens each of them reads x
in. Both directions need texts of either model.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trivium.evals.results import as_json
from trivium.evals.statistics import bootstrap
from trivium.kit.errors import TriviumError
from trivium.kit.files import write_text
from trivium.lab.behaviour import LONGEST, NO_KL, Passage, continued, divergence, encode, passages
from trivium.lab.compare_numbers import distances
from trivium.lab.formatting import compact, with_ci
from trivium.lab.gather import Member, find_all, stages_above, world_sources
from trivium.model.attention import Documents

LONGEST_ANSWER = 48


def distance(
    names: Sequence[str],
    *,
    runs: Path,
    prompts: Path | None = None,
    count: int = 24,
    seed: int = 0,
    to: Path | None = None,
) -> list[list[str]]:
    """A table of KL both ways and Jensen-Shannon; every other model against the first, by kind of text.

    Models that cut text into different tokens are compared on bytes.
    """
    if len(names) < 2:
        raise TriviumError("A distance takes two models; name a second one.")
    members = find_all(names, runs)
    first = members[0]
    if prompts is not None:
        texts = continued(first, _lines(prompts), LONGEST_ANSWER, seed)
    else:
        stages = stages_above(member.seen for member in members if member.seen)
        texts = passages(world_sources(stages), count, seed)
    found: list[dict[str, Any]] = []
    for member in members[1:]:
        pair = divergence(member, first, texts, runs / "store" / "answers")
        if pair["why_not"] == NO_KL:
            pair["per byte"] = per_byte(member, first, texts, seed)
        found.append(pair)
        member.forget()
    if to is not None:
        write_text(to, compact(found))
    rows = [["models", "texts", "KL", "reverse KL", "Jensen-Shannon", "n"]]
    for pair in found:
        between = f"{pair['model']} from {pair['before']}"
        for one in pair.get("per byte", []):
            ways = (with_ci(one[name]) for name in ("kl", "reverse"))
            rows.append([between, f"{one['kind']} (per byte)", *ways, "", str(one["kl"]["n"])])
        if pair["why_not"] and not pair.get("per byte"):
            rows.append([between, f"not measured: {pair['why_not']}", "", "", "", ""])
            continue
        for kind in dict.fromkeys(text["kind"] for text in pair["texts"]):
            one = distances([text for text in pair["texts"] if text["kind"] == kind])
            rows.append(
                [
                    between,
                    kind,
                    *(with_ci(one[name]) for name in ("kl", "reverse", "js")),
                    str(one["kl"]["n"]),
                ]
            )
    return rows


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise TriviumError(f"{path} is missing; name a text file with a prompt on each line.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise TriviumError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    if not lines:
        raise TriviumError(f"{path} holds no prompt; write one on each line.")
    return lines


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
