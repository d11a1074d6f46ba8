"""What preference stages learn from: each source of pairs read, reported, and divided by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.data.mixture import weights_over
from trivium.data.preferences import PreferenceData, PreferencePair, PreferenceSource, unpaired
from trivium.data.sources import Reading, read_documents
from trivium.kit.errors import TriviumError
from trivium.stages.parts.mixtures import Portion, all_weighted_or_none
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer

UNUSED_WITH_PAIRS = {
    "batch": "a batch is counted in `pairs` here, not in tokens: write `pairs: {value}` in place of it",
    "tokens": "say how long to train in `steps` or `epochs`, not in tokens",
    "z_loss": "`z_loss` belongs to next-token prediction; leave it out",
    "validation": "what a source holds out is measured once, at the end: leave `validation` out, and say the "
    "share in `data`",
}
"""Settings of other trainings that preference stages have no use for."""


@dataclass(frozen=True)
class Judged:
    """The pairs of all sources: what is learned from, what is held out, and what became of each row."""

    training: list[PreferenceSource]
    held_out: list[PreferenceSource]
    facts: dict[str, dict[str, Any]]


def read_preferences(
    work: Work, mixture: Mapping[str, Portion], tokenizer: Tokenizer, context: int, *, single: bool = False
) -> Judged:
    """Read every source; where `single`, pairs count as two answers, else every row has to be a pair."""
    all_weighted_or_none(work.stage, mixture)
    training, held_out, facts = [], [], {}
    for name, portion in mixture.items():
        reading = Reading()
        reader = PreferenceData(tokenizer, context)
        documents = read_documents(portion.source(str(work.path(name))), reading)
        found = list(reader.read(documents, skip=portion.on_bad == "skip"))
        tally = {**reader.tally.facts(), "bad": reading.bad, "empty": reading.empty}
        tally["named"] = [*reading.named, *tally["named"]]
        if not found:
            because = f"; {tally['named'][0]}" if tally["named"] else ""
            raise TriviumError(f"{name}: none of its {tally['rows']} rows can be learned from{because}.")
        if not single and not all(one.is_pair for one in found):
            raise TriviumError(
                f"{name}: holds single answers with a `label`, and this loss compares two; use `loss: kto`, "
                "apo_zero_unpaired or bco, or give it `chosen` and `rejected`."
            )
        found = unpaired(found) if single else found
        validation = [one for one in found if _share(one.prompt) < portion.validation]
        seen = [one for one in found if _share(one.prompt) >= portion.validation] or found
        weights = None if portion.weight is None else weights_over(portion.weight)
        training.append(PreferenceSource(name, seen, weights, portion.max_repeats))
        held_out.append(PreferenceSource(name, validation))
        tally |= {"learned_from": len(seen), "held_out": len(validation)}
        for line in told(name, tally):
            work.say(line)
        facts[name] = tally
    return Judged(training, held_out, facts)


def told(name: str, facts: Mapping[str, Any]) -> list[str]:
    """What became of the rows and tokens of a source, in sentences."""
    lines = [
        f"{name}: recognised as {facts['shape']}",
        f"  rows: {facts['rows'] + facts['bad'] + facts['empty']:,} read, {facts['kept']:,} kept "
        f"({facts['cut']:,} without their oldest turns), {facts['dropped']:,} dropped, "
        f"{facts['unfit'] + facts['bad']:,} unreadable, {facts['empty']:,} empty; "
        f"{facts['held_out']:,} held out",
        f"  tokens: {facts['tokens_in']:,} read = {facts['tokens_kept']:,} kept + "
        f"{facts['tokens_cut']:,} cut + {facts['tokens_dropped']:,} dropped; "
        f"{facts['tokens_learned']:,} in answers",
    ]
    return lines + [f"  {line}" for line in facts["named"][:5]]


def _share(prompt: np.ndarray) -> float:
    """A number in [0, 1) that a prompt has for ever, so that none is on both sides."""
    digest = hashlib.blake2b(np.ascontiguousarray(prompt, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def prompts_of(held_out: list[PreferenceSource], most: int) -> list[PreferencePair]:
    """Up to `most` validation pairs with different prompts, some of every source."""
    found: dict[bytes, PreferencePair] = {}
    queues = [list(source.pairs) for source in held_out]
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and len(found) < most:
                found.setdefault(queue[place].prompt.tobytes(), queue[place])
    return list(found.values())
