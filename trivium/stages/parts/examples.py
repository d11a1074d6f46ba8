"""What fine-tuning learns from: each source recognised, tokenised once, reported before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.conversations import Encoder, Learned
from trivium.data.mixture import weights_over
from trivium.data.packed import Ingredient, PackedRows
from trivium.data.rows import NOTHING, PackedSequence
from trivium.data.shapes import recognised
from trivium.data.shards import Shards, write_encoded
from trivium.data.sources import Reading, read_documents
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.processes import barrier, world
from trivium.stages.midtrain import with_replay
from trivium.stages.parts.mixtures import Portion, all_weighted_or_none, tokenised
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Examples:
    """The tokenised sources of a stage: what is trained on, and what is held out."""

    training: Mapping[str, Shards]
    held_out: Mapping[str, Shards]

    @property
    def tokens(self) -> int:
        """How many tokens there are to train on."""
        return sum(shards.tokens for shards in self.training.values())


def is_corpus(work: Work, name: str) -> bool:
    """Whether a source is tokenised already, such as the corpus of an earlier stage to replay."""
    return (work.path(name) / "manifest.json").is_file()


def any_conversation(work: Work, mixture: Mapping[str, Portion]) -> bool:
    """Whether the first row of some source needs a chat template."""
    for name, portion in mixture.items():
        if is_corpus(work, name):
            continue
        source = portion.source(str(work.path(name))).model_copy(update={"on_bad": "skip"})
        for document in read_documents(source):
            try:
                if recognised(document.fields).read(document.fields).messages:
                    return True
            except TriviumError:
                continue
            break
    return False


def prepared(
    work: Work, mixture: Mapping[str, Portion], tokenizer: Tokenizer, context: int, learned: Learned
) -> Examples:
    """Tokenise what is not yet tokenised, into this stage's own folder, and open it all."""
    folders = {
        name: _tokenised(work, number, name, portion, tokenizer, context, learned)
        for number, (name, portion) in enumerate(mixture.items())
    }
    return Examples(
        {name: Shards(folder, "train", tokenizer=tokenizer) for name, folder in folders.items()},
        {name: Shards(folder, "validation", tokenizer=tokenizer) for name, folder in folders.items()},
    )


def _tokenised(
    work: Work,
    number: int,
    name: str,
    portion: Portion,
    tokenizer: Tokenizer,
    context: int,
    learned: Learned,
) -> Path:
    if is_corpus(work, name):
        return tokenised(work, name, portion, tokenizer)
    folder = work.folder / "tokenised" / str(number)
    if not folder.exists() and world().leads:
        work.say(f"reading {name}")
        reading = Reading()
        encoder = Encoder(tokenizer, context, learned)
        counted: dict[str, Any] = {}

        def found() -> Iterator[Any]:
            yield from encoder.encode(read_documents(portion.source(str(work.path(name))), reading))
            counted.update(encoder.tally.facts())
            counted["bad"], counted["empty"] = reading.bad, reading.empty
            counted["named"] = [*reading.named, *counted["named"]]

        skip = portion.on_bad == "skip"
        columns = ("weight", *((portion.easy_first,) if portion.easy_first else ()))
        write_encoded(
            found(), tokenizer, folder, validation=portion.validation, columns=columns, facts=counted,
            skip_refused=skip,
        )  # fmt: skip
    barrier()
    facts = read_json(folder / "manifest.json")["facts"]
    if facts["kept"] == 0:
        because = f"; {facts['named'][0]}" if facts["named"] else ""
        raise TriviumError(f"{name}: none of its {facts['rows']} rows can be learned from{because}.")
    return folder


def ingredients(examples: Examples, mixture: Mapping[str, Portion], stage: str) -> list[Ingredient]:
    """The sources as the batch source takes them."""
    all_weighted_or_none(stage, mixture)
    return [
        Ingredient(
            name,
            examples.training[name],
            weights=None if portion.weight is None else weights_over(portion.weight),
            max_repeats=portion.max_repeats,
            easy_first=portion.easy_first,
        )
        for name, portion in mixture.items()
    ]


def with_examples_replayed(new: list[Ingredient], old: list[Ingredient], share: float) -> list[Ingredient]:
    """Both lists as one mixture in which the old sources have `share` together; unweighted ones by tokens."""

    def weighed(some: list[Ingredient]) -> list[Ingredient]:
        return [
            one if one.weights is not None else replace(one, weights=weights_over(float(one.shards.tokens)))
            for one in some
        ]

    return with_replay(weighed(new), weighed(old), share)


def validation_rows(
    examples: Examples, tokenizer: Tokenizer, context: int, tokens: int
) -> dict[str, list[PackedSequence]]:
    """Held-out rows of every source, in which only what would be learned is predicted."""
    lengths = tokenizer.byte_lengths()
    found: dict[str, list[PackedSequence]] = {}
    for name, shards in examples.held_out.items():
        packed = PackedRows(shards, context)
        rows: list[PackedSequence] = []
        for index in range(len(packed)):
            if sum(map(len, rows)) < tokens / len(examples.held_out):
                rows.append(_measured(packed.row(index), lengths))
        if rows:
            found[name] = rows
    return found


def _measured(row: PackedSequence, lengths: np.ndarray) -> PackedSequence:
    targets = np.where(row.weights > 0, row.targets, NOTHING)
    spelled = np.where(targets >= 0, lengths[targets], 0).astype(np.float32)
    return PackedSequence(**{**vars(row), "targets": targets, "columns": {"bytes": spelled}})


def report(examples: Examples, packed: Mapping[str, PackedRows]) -> dict[str, dict[str, Any]]:
    """What became of every row and token of every source, from the file to the packed row."""
    found = {}
    for name, shards in examples.training.items():
        facts = shards.manifest["facts"]
        held_out, packing = examples.held_out[name], packed[name].packing
        found[name] = {
            **(facts if "tokens_kept" in facts else _corpus_facts(shards, held_out)),
            "held_out_rows": len(held_out),
            "held_out_tokens": held_out.tokens,
            "packed_rows": len(packing),
            "packed_tokens": packing.tokens,
            "packing_dropped_tokens": packing.dropped_tokens,
            "filled": packing.report()["filled"],
        }
    return found


def _corpus_facts(shards: Shards, held_out: Shards) -> dict[str, Any]:
    rows, tokens = len(shards) + len(held_out), shards.tokens + held_out.tokens
    return {
        "shape": "a tokenised corpus", "rows": rows, "kept": rows, "cut": 0, "dropped": 0, "unfit": 0,
        "bad": 0, "empty": 0, "tokens_in": tokens, "tokens_kept": tokens, "tokens_cut": 0,
        "tokens_dropped": 0, "tokens_learned": shards.learned_tokens + held_out.learned_tokens, "named": [],
    }  # fmt: skip


def told(name: str, facts: Mapping[str, Any]) -> list[str]:
    """The report of one source in sentences."""
    read = facts["rows"] + facts["bad"] + facts["empty"]
    lines = [
        f"{name}: recognised as {facts['shape']}",
        f"  rows: {read:,} read, {facts['kept']:,} kept ({facts['cut']:,} of them cut), "
        f"{facts['dropped']:,} dropped, {facts['unfit'] + facts['bad']:,} unreadable, "
        f"{facts['empty']:,} empty; {facts['held_out_rows']:,} held out",
        f"  tokens: {facts['tokens_in']:,} read = {facts['tokens_kept']:,} kept + "
        f"{facts['tokens_cut']:,} cut + {facts['tokens_dropped']:,} dropped; "
        f"{facts['tokens_learned']:,} learned",
        f"  packed: {facts['packed_tokens']:,} tokens in {facts['packed_rows']:,} rows, "
        f"{facts['filled']:.1%} full",
    ]
    return lines + [f"  {line}" for line in facts["named"][:5]]
