"""What a training stage learns from: tokenised corpora and raw sources, each with a weight over the stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from trivium.data.encoding import encode_text
from trivium.data.mixture import weights_over
from trivium.data.packed import Ingredient, Lengths, PackedRows
from trivium.data.rows import NOTHING, PackedSequence
from trivium.data.shards import Shards, marks, write_shards
from trivium.data.sources import Document, Reading, Source, read_documents
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.fingerprint import fingerprint
from trivium.kit.numbers import Count, Number
from trivium.kit.processes import barrier, world
from trivium.kit.seals import read_record
from trivium.kit.settings import Settings
from trivium.stages.parts.stage import Product, Reference, Work
from trivium.tokens.tokenizer import Tokenizer

Weight = Annotated[Number, Field(ge=0)]


class Portion(Settings):
    """One source's part in a mixture; how it is read matters only where it is not a corpus yet."""

    weight: Weight | list[Weight | tuple[Number, Weight]] | None = None
    """Share of the tokens: a number, `[start, end]`, or points `[[progress, weight], ...]`."""
    max_repeats: float | None = Field(default=None, gt=0)
    """How often the source may be repeated before the stage is refused."""
    easy_first: str | None = None
    """Sample rows at random, then sort them by the mean of this column, lowest first, in every epoch."""
    of: str | None = None
    """The source, where a mixture names one twice; else it is the name the portion goes by."""
    min_tokens: Count | None = None
    """Only documents of at least so many tokens take part, and with `max_tokens` of at most so many."""
    max_tokens: Count | None = None
    """Only documents of at most so many tokens take part."""
    validation: float = Field(default=0.01, ge=0, lt=1)
    """The share of documents held out for validation."""
    columns: dict[str, str] = {}
    """Which column of the data holds what: `{text: body}`."""
    split: str | None = None
    """The split of a data set from the hub, or of a source of the world."""
    subset: str | None = None
    """The configuration of a data set from the hub."""
    limit: Count | None = Field(default=None, ge=0)
    """Read at most so many documents."""
    separator: str | None = None
    """What separates documents in a plain text file."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Whether a line that cannot be read stops the stage or is skipped and counted."""

    @property
    def within(self) -> Lengths:
        """The fewest and the most tokens of the documents that take part."""
        return self.min_tokens or 0, self.max_tokens

    @model_validator(mode="after")
    def some_length_fits(self) -> Portion:
        """Refuse bounds that no document lies between."""
        if self.max_tokens is not None and self.max_tokens < max(2, self.min_tokens or 0):
            raise ValueError(f"no document has as few as `max_tokens` {self.max_tokens}; raise it")
        return self

    def source(self, path: str) -> Source:
        """How to read the documents, if they have to be read."""
        return Source(path=path, **self.model_dump(include=set(Source.model_fields)))


def _named(value: Any) -> Any:
    """`corpus`, and `[corpus, ./texts]`, are short for a mapping without further wishes."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return {name: {} for name in value}
    if not isinstance(value, Mapping):
        return value
    return {name: {} if portion is None else portion for name, portion in value.items()}


Mixture = Annotated[
    dict[str, Portion],
    Field(min_length=1),
    BeforeValidator(_named, json_schema_input_type=str | list[str] | dict[str, Portion]),
]

NEEDS: tuple[Product, ...] = ("shards", "data", "source")


MEASURED = ("weight", "max_repeats", "easy_first")
"""What a portion cannot say where its documents are measured and not trained on."""
PROMPTS = (*MEASURED, "validation")
"""What it cannot say where its documents are prompts: all are posed, in an order of their own."""
JUDGED = ("easy_first", "separator")
"""What it cannot say where its rows are preference pairs."""


def mixture_references(
    mixture: Mapping[str, Portion],
    setting: str = "data",
    *,
    by_length: bool = False,
    without: Collection[str] = (),
) -> list[Reference]:
    """The references that a mixture makes; a stage that can choose documents by their length says so.

    What a portion says of `without` is refused, as it would change nothing.
    """
    for name, portion in mixture.items():
        for field in without:
            if getattr(portion, field) != Portion.model_fields[field].default:
                raise TriviumError(
                    f"{setting}: `{name}` has a `{field}`, which changes nothing here; leave it out."
                )
        if not by_length and (portion.of is not None or portion.within != (0, None)):
            raise TriviumError(
                f"{setting}: `{name}` is chosen by length or stands under another name, which only a stage "
                "that reads plain text can do; leave `of`, `min_tokens` and `max_tokens` out."
            )
        if portion.of is not None and "." in name:
            raise TriviumError(f"{setting}: `{name}` has an `of`; give it a name without a dot.")
    return [
        Reference(setting, name, NEEDS, portion.source(name))
        if portion.of is None
        else Reference(f"{setting}.{name}.of", portion.of, NEEDS, portion.source(portion.of))
        for name, portion in mixture.items()
    ]


def sources_of(mixture: Mapping[str, Portion]) -> list[str]:
    """The source of every portion, as recipes write it."""
    return [portion.of or name for name, portion in mixture.items()]


def read_alike(stage: str, mixture: Mapping[str, Portion]) -> None:
    """Refuse two portions of one source that would have it read or held out differently."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, portion in mixture.items():
        place = portion.of or name
        wishes = portion.model_dump(include={*Source.model_fields, "validation"})
        other, before = first.setdefault(place, (name, wishes))
        for key in wishes:
            if wishes[key] != before[key]:
                raise TriviumError(f"{stage}: `{other}` and `{name}` read `{place}` with another `{key}`.")


def all_weighted_or_none(stage: str, mixture: Mapping[str, Portion]) -> None:
    """Refuse a mixture in which some sources have a weight and others none."""
    weighted = [portion.weight is not None for portion in mixture.values()]
    if any(weighted) and not all(weighted):
        missing = list(mixture)[weighted.index(False)]
        raise TriviumError(f"{stage}: `{missing}` has no `weight` and other sources have one; give it one.")


def ingredients(
    work: Work,
    mixture: Mapping[str, Portion],
    tokenizer: Tokenizer,
    beside: Mapping[str, Portion] = MappingProxyType({}),
) -> list[Ingredient]:
    """The training split of every source, tokenised if it was not; `beside` is what else the stage reads."""
    all_weighted_or_none(work.stage, mixture)
    whole = {**beside, **mixture}
    read_alike(work.stage, whole)
    ranked = {
        name: {one.easy_first for other, one in whole.items() if (one.of or other) == (portion.of or name)}
        for name, portion in mixture.items()
    }
    return [
        Ingredient(
            name,
            Shards(
                tokenised(work, name, portion, tokenizer, sorted(filter(None, ranked[name]))),
                "train",
                tokenizer=tokenizer,
            ),
            weights=None if portion.weight is None else weights_over(portion.weight),
            origin=_origin(work.path(portion.of or name), portion),
            max_repeats=portion.max_repeats,
            easy_first=portion.easy_first,
            within=portion.within,
        )
        for name, portion in mixture.items()
    ]


def _origin(path: Path, portion: Portion) -> str:
    """What tells a source in every stage that reads it, however its texts are tokenised there."""
    if (path / "manifest.json").is_file():
        read = str(read_json(path / "manifest.json")["seal"])
    else:
        read = fingerprint([portion.source(str(path)).model_dump(mode="json"), portion.validation])
    return read if portion.within == (0, None) else f"{read} {portion.within}"


def tokenised(
    work: Work, name: str, portion: Portion, tokenizer: Tokenizer, columns: Sequence[str] = ()
) -> Path:
    """The shards of a source: a corpus as it is, anything else tokenised into this stage's own folder."""
    name = portion.of or name
    path = work.path(name)
    number = list(work.inputs).index(name)
    if (path / "manifest.json").is_file():
        wishes = portion.model_dump(include={*Source.model_fields, "validation"}, exclude_defaults=True)
        if wishes:
            raise TriviumError(
                f"{work.stage}: `{name}` is tokenised already, so `{next(iter(wishes))}` changes nothing "
                "here; say it where the corpus is made."
            )
        if _same_vocabulary(path, tokenizer):
            return path
        return _retokenised(work, name, path, work.folder / "retokenised" / str(number), tokenizer)
    folder = work.folder / "tokenised" / str(number)
    if not folder.exists() and world().leads:
        work.say(f"tokenising {name}")
        documents = read_documents(portion.source(str(path)), Reading())
        skip = portion.on_bad == "skip"
        write_shards(
            documents,
            tokenizer,
            folder,
            validation=portion.validation,
            columns=tuple(columns),
            skip_refused=skip,
        )
    barrier()
    return folder


def _same_vocabulary(corpus: Path, tokenizer: Tokenizer) -> bool:
    """Whether a corpus can be read as it is; one that brings no tokenizer says itself why it cannot."""
    brought = (corpus / "tokenizer").is_dir()
    return not brought or read_json(corpus / "manifest.json")["tokenizer"] == tokenizer.fingerprint


def _retokenised(work: Work, name: str, corpus: Path, folder: Path, tokenizer: Tokenizer) -> Path:
    """A corpus made with another vocabulary, re-tokenised: what was held out stays held out."""
    if not folder.exists() and world().leads:
        work.say(f"{name} was tokenised with another vocabulary: tokenising it again")
        before = Tokenizer.load(corpus / "tokenizer")
        columns = tuple(read_json(corpus / "manifest.json")["columns"])

        def texts() -> Iterator[Document]:
            for split in ("train", "validation"):
                shards = Shards(corpus, split)
                if shards.has_masks:
                    raise TriviumError(
                        f"{work.stage}: {name} holds conversations tokenised with another vocabulary; "
                        "name their source instead of the corpus."
                    )
                kept = {name: shards.column(name) for name in columns}
                for index in range(len(shards)):
                    numbers = {name: float(column[index]) for name, column in kept.items()}
                    yield Document(before.decode(shards.document(index).tolist()), numbers, shards.id(index))

        # What is held out follows from the text and this share alone, so it is what the corpus held out.
        write_shards(texts(), tokenizer, folder, validation=_share_of(corpus), columns=columns)
    barrier()
    return folder


def validation_rows(
    work: Work,
    mixture: Mapping[str, Portion],
    tokenizer: Tokenizer,
    context: int,
    tokens: int,
    *,
    learnt: Sequence[TokenisedData] = (),
    required: Collection[str] = (),
) -> dict[str, list[PackedSequence]]:
    """Held-out rows of every source, about `tokens` of them together, each token with its bytes of text.

    What is in the training split of `learnt`, under whatever name, is not measured; of a source in `required`
    something has to be left.
    """
    lengths = tokenizer.byte_lengths()
    found: dict[str, list[PackedSequence]] = {}
    held = {
        name: Shards(tokenised(work, name, portion, tokenizer), "validation", tokenizer=tokenizer)
        for name, portion in mixture.items()
    }
    trained_on = also_in(held, learnt, tokenizer)
    for name, portion in mixture.items():
        shards, known = held[name], trained_on[name]
        if known:
            work.say(f"{name}: {len(known)} of {len(shards)} held-out documents are trained on; left out")
        rows: list[PackedSequence] = []
        if len(known) < len(shards):
            packed = PackedRows(shards, context, within=portion.within)
            taken = 0
            for index in range(len(packed)):
                if taken < tokens / len(mixture):
                    row = _without(packed.row(index), packed.packing.pieces(index)[0], known)
                    predicted = bool((row.targets >= 0).any())
                    taken += len(row) if predicted else 0
                    rows += [_with_bytes(row, lengths)] if predicted else []
        if rows:
            found[name] = rows
        elif name in required:
            raise TriviumError(
                f"{work.stage}: of `{name}` nothing that is not trained on is held out to be measured; give "
                "it a larger `validation`, the same wherever it stands."
            )
    return found


def _share_of(corpus: Path) -> float:
    record = read_record(corpus.parent)
    return float(record["settings"]["validation"])


def held_out_share(work: Work, name: str, portion: Portion) -> float:
    """The share of a source's documents that is held out, which a corpus decided when it was made."""
    path = work.path(portion.of or name)
    made = (path / "manifest.json").is_file() and (path.parent / "stage.yaml").is_file()
    return _share_of(path) if made else portion.validation


def held_out_texts(work: Work, name: str, portion: Portion, tokenizer: Tokenizer, most: int) -> list[str]:
    """The first texts that a source holds out, whatever vocabulary it was tokenised with."""
    path = work.path(portion.of or name)
    if (path / "tokenizer").is_dir():
        reader, shards = Tokenizer.load(path / "tokenizer"), Shards(path, "validation")
    else:
        reader, shards = tokenizer, Shards(tokenised(work, name, portion, tokenizer), "validation")
    return [reader.decode(shards.document(index).tolist()) for index in range(min(most, len(shards)))]


@dataclass(frozen=True)
class TokenisedData:
    """Documents that are learnt from, and the folder of their tokenizer where it may be another one."""

    shards: Shards
    tokenizer: Path | None = None


def also_in(
    held: Mapping[str, Shards], learnt: Sequence[TokenisedData], tokenizer: Tokenizer
) -> dict[str, set[int]]:
    """Which documents of held-out splits stand, letter for letter, among those that are trained on."""
    found: dict[str, set[int]] = {name: set() for name in held}
    homes = {name: shards.folder.resolve() for name, shards in held.items()}
    spellings: dict[str, tuple[Places, list[np.ndarray]]] = {}
    for folder, one in {one.shards.folder.resolve(): one for one in learnt}.items():
        # What one reading wrote is apart by the text itself, so only other folders can hold the same text.
        if set(homes.values()) <= {folder}:
            continue
        spelling = one.shards.manifest["tokenizer"]
        if spelling not in spellings:
            other = None if spelling == tokenizer.fingerprint else one.tokenizer
            spellings[spelling] = _marked_alike(held, tokenizer, other)
        places, held_marks = spellings[spelling]
        # One look at all tokens leaves few documents to be compared.
        for index in np.flatnonzero(np.isin(one.shards.marks, held_marks)).tolist():
            for name, number in places.get(one.shards.document(index).tobytes(), ()):
                if homes[name] != folder:
                    found[name].add(number)
    return found


Places = dict[bytes, list[tuple[str, int]]]
"""Where each text is held out, as a name and a number, by its tokens."""


def _marked_alike(
    held: Mapping[str, Shards], tokenizer: Tokenizer, other: Path | None
) -> tuple[Places, list[np.ndarray]]:
    """Where each text is held out, and the marks of all, as `other` encodes them if it is given."""
    places: Places = {}
    speller = None if other is None else Tokenizer.load(other)
    for name, shards in held.items():
        for index in range(len(shards)):
            tokens = shards.document(index)
            if speller is not None:
                text = Document(tokenizer.decode(tokens.tolist()), {}, "")
                tokens = encode_text(text, speller).tokens
            places.setdefault(tokens.tobytes(), []).append((name, index))
    return places, [marks(np.frombuffer(tokens, dtype=np.int64), np.array([0])) for tokens in places]


def _without(row: PackedSequence, documents: np.ndarray, known: Collection[int]) -> PackedSequence:
    """The row, with nothing to predict in these documents."""
    if not known:
        return row
    drop = np.repeat([document in known for document in documents.tolist()], row.lengths)
    return replace(row, targets=np.where(drop, NOTHING, row.targets))


def _with_bytes(row: PackedSequence, lengths: np.ndarray) -> PackedSequence:
    spelled = np.where(row.targets >= 0, lengths[row.targets], 0).astype(np.float32)
    return replace(row, columns={**row.columns, "bytes": spelled})


def planned_vocabulary(
    inputs: Mapping[str, Path | Mapping[str, Any]], names: Iterable[str | None]
) -> int | None:
    """The vocabulary of a corpus that exists, or of one that is only planned."""
    for name in names:
        known = inputs.get(name) if name is not None else None
        if isinstance(known, Path) and (known / "manifest.json").is_file():
            return int(read_json(known / "manifest.json")["vocabulary"])
        if isinstance(known, Mapping) and "vocabulary" in known:
            return int(known["vocabulary"])
    return None
