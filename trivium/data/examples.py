"""What became of every row and token of the sources that fine-tuning learns from."""

from collections.abc import Mapping
from typing import Any

from trivium.data.door import Place, is_corpus, located
from trivium.data.packed import PackedBatches
from trivium.data.settings import MixtureSource
from trivium.data.shapes import recognised
from trivium.data.shards import Shards
from trivium.data.sources import read_documents
from trivium.kit.errors import TriviumError


def any_conversation(work: Place, mixture: Mapping[str, MixtureSource]) -> bool:
    """Whether the first row of some source needs a chat template."""
    for source in mixture.values():
        if is_corpus(work, source):
            continue
        for document in read_documents(located(work, source).model_copy(update={"on_bad": "skip"})):
            try:
                if recognised(document.fields).read(document.fields).messages:
                    return True
            except TriviumError:
                continue
            break
    return False


def report(batches: PackedBatches, held_out: Mapping[str, Shards]) -> dict[str, dict[str, Any]]:
    """What became of every row and token of every source, from the file to the packed row."""
    found = {}
    planned = batches.report()
    for one, packed in zip(batches.ingredients, batches.packed, strict=True):
        facts, validation, packing = one.shards.manifest["facts"], held_out[one.name], packed.packing
        found[one.name] = {
            **(facts if "tokens_kept" in facts else _corpus_facts(one.shards, validation)),
            "held_out_rows": len(validation),
            "held_out_tokens": validation.tokens,
            "packed_rows": len(packing),
            "packed_tokens": packing.tokens,
            "packing_dropped_tokens": packing.dropped_tokens,
            "filled": packing.report()["filled"],
            "share": planned[one.name]["share"],
        }
    return found


def _corpus_facts(shards: Shards, held_out: Shards) -> dict[str, Any]:
    rows, tokens = len(shards) + len(held_out), shards.tokens + held_out.tokens
    return {
        "shape": "a tokenised corpus", "rows": rows, "kept": rows, "cut": 0, "dropped": 0, "unfit": 0,
        "bad": 0, "empty": 0, "tokens_in": tokens, "tokens_kept": tokens, "tokens_cut": 0,
        "tokens_dropped": 0, "tokens_learned": shards.learned_tokens + held_out.learned_tokens, "named": [],
    }  # fmt: skip


def described(
    name: str, facts: Mapping[str, Any], *, held_out: int, cut: str = "of them cut", learned: str = "learned"
) -> list[str]:
    """The report of one source in sentences."""
    read = facts["rows"] + facts["bad"] + facts["empty"]
    lines = [
        f"{name}: recognised as {facts['shape']}",
        f"  rows: {read:,} read, {facts['kept']:,} kept ({facts['cut']:,} {cut}), "
        f"{facts['dropped']:,} dropped, {facts['unfit'] + facts['bad']:,} unreadable, "
        f"{facts['empty']:,} empty; {held_out:,} held out",
        f"  tokens: {facts['tokens_in']:,} read = {facts['tokens_kept']:,} kept + "
        f"{facts['tokens_cut']:,} cut + {facts['tokens_dropped']:,} dropped; "
        f"{facts['tokens_learned']:,} {learned}",
    ]
    if "packed_rows" in facts:
        lines.append(
            f"  packed: {facts['packed_tokens']:,} tokens in {facts['packed_rows']:,} rows, "
            f"{facts['filled']:.1%} full"
        )
    return lines + [f"  {line}" for line in facts["named"][:5]]
