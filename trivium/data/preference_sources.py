"""What preference stages learn from: each source of pairs read, reported, and divided by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.data.door import Place, documents
from trivium.data.mixture import weights_over
from trivium.data.preferences import PreferenceData, PreferencePair, PreferenceSource, unpaired
from trivium.data.settings import MixtureSource, all_weighted_or_none
from trivium.data.sources import Reading
from trivium.data.split import in_validation, prompt_hash
from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Preferences:
    """The pairs of all sources: what is learned from, what is held out, and what became of each row."""

    training: list[PreferenceSource]
    validation: list[PreferenceSource]
    facts: dict[str, dict[str, Any]]


def read_preferences(
    work: Place,
    mixture: Mapping[str, MixtureSource],
    tokenizer: Tokenizer,
    context: int,
    *,
    single: bool = False,
) -> Preferences:
    """Read every source; where `single`, pairs count as two answers, else every row has to be a pair."""
    all_weighted_or_none(work.stage, mixture)
    training, validation, facts = [], [], {}
    for name, source in mixture.items():
        reading = Reading()
        reader = PreferenceData(tokenizer, context)
        pairs = list(reader.read(documents(work, [source], reading), skip=source.on_bad == "skip"))
        tally = {**reader.tally.facts(), "bad": reading.bad, "empty": reading.empty}
        tally["named"] = [*reading.named, *tally["named"]]
        if not pairs:
            because = f"; {tally['named'][0]}" if tally["named"] else ""
            raise TriviumError(f"{name}: none of its {tally['rows']} rows can be learned from{because}.")
        if not single and not all(one.is_pair for one in pairs):
            raise TriviumError(
                f"{name}: holds single answers with a `label`, and this loss compares two; use `loss: kto`, "
                "apo_zero_unpaired or bco, or give it `chosen` and `rejected`."
            )
        pairs = unpaired(pairs) if single else pairs
        held_out = [in_validation(prompt_hash(one.prompt), source.validation) for one in pairs]
        if all(held_out):
            raise TriviumError(
                f"{name}: `validation: {source.validation:g}` holds out all of its {len(pairs)} pairs, so "
                "nothing is left to learn from; lower it or give the source more prompts."
            )
        seen = [one for one, held in zip(pairs, held_out) if not held]
        weights = None if source.weight is None else weights_over(source.weight)
        training.append(PreferenceSource(name, seen, weights, source.max_repeats))
        validation.append(PreferenceSource(name, [one for one, held in zip(pairs, held_out) if held]))
        tally |= {"learned_from": len(seen), "held_out": sum(held_out)}
        for line in described(name, tally):
            work.say(line)
        facts[name] = tally
    return Preferences(training, validation, facts)


def described(name: str, facts: Mapping[str, Any]) -> list[str]:
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


def prompts_of(sources: list[PreferenceSource], most: int) -> list[PreferencePair]:
    """Up to `most` pairs with different prompts, some of every source."""
    found: dict[bytes, PreferencePair] = {}
    queues = [list(source.pairs) for source in sources]
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and len(found) < most:
                found.setdefault(queue[place].prompt.tobytes(), queue[place])
    return list(found.values())
