"""The door through which a stage gets its data: what it names is found, read, tokenised once, and opened."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from trivium.data.conversations import Encoder, Learned
from trivium.data.ingredients import Ingredient
from trivium.data.mixture import weights_over
from trivium.data.overlap import TokenisedData, also_in
from trivium.data.packed import PackedRows
from trivium.data.rows import NOTHING, PackedSequence
from trivium.data.settings import MixtureSource, all_weighted_or_none, read_alike
from trivium.data.shards import Shards, write_encoded, write_shards
from trivium.data.sources import Document, Reading, Source, read_documents
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.fingerprint import fingerprint
from trivium.kit.processes import barrier, world
from trivium.kit.seals import read_record
from trivium.tokens.tokenizer import Tokenizer


class Place(Protocol):
    """The work on a stage, as far as its data is concerned."""

    stage: str
    folder: Path
    inputs: Mapping[str, Path]

    def say(self, text: str) -> None:
        """Tell the person a line that stays."""


def located(work: Place, source: Source) -> Source:
    """The source as it is found from here: what a stage of data made, or a place outside the recipe."""
    return source.at(str(work.inputs[source.path]))


def documents(work: Place, sources: Iterable[Source], reading: Reading | None = None) -> Iterator[Document]:
    """Every document of all sources, one source after the other."""
    for source in sources:
        yield from read_documents(located(work, source), reading)


def is_corpus(work: Place, source: Source) -> bool:
    """Whether a source is tokenised already, such as the corpus of an earlier stage."""
    return (work.inputs[source.path] / "manifest.json").is_file()


@dataclass(frozen=True)
class Examples:
    """Where rows are conversations, or prompts with completions: how long they may be, what is learned."""

    context: int
    learned: Learned


@dataclass(frozen=True)
class Door:
    """Opens the sources of one stage with one tokenizer, as plain text or as examples."""

    work: Place
    tokenizer: Tokenizer
    examples: Examples | None = None
    order: Sequence[str] = ()
    """The sources in the order that names their folders; that of the stage's inputs where it is left out."""

    def ingredients(
        self,
        mixture: Mapping[str, MixtureSource],
        beside: Mapping[str, MixtureSource] = MappingProxyType({}),
    ) -> list[Ingredient]:
        """The training split of every source; `beside` is what else the stage reads."""
        all_weighted_or_none(self.work.stage, mixture)
        whole = {**beside, **mixture}
        read_alike(self.work.stage, whole)
        found = []
        for name, source in mixture.items():
            ranked = {one.easy_first for one in whole.values() if one.path == source.path and one.easy_first}
            folder = self.folder(source, sorted(ranked))
            found.append(
                Ingredient(
                    name,
                    Shards(folder, "train", tokenizer=self.tokenizer),
                    weights=None if source.weight is None else weights_over(source.weight),
                    origin=self._origin(source),
                    max_repeats=source.max_repeats,
                    easy_first=source.easy_first,
                    within=source.within,
                )
            )
        return found

    def _origin(self, source: MixtureSource) -> str:
        """What tells a source in every stage that reads it, however its texts are tokenised there."""
        if is_corpus(self.work, source):
            read = str(read_json(self.work.inputs[source.path] / "manifest.json")["seal"])
        else:
            read = fingerprint([located(self.work, source).model_dump(mode="json"), source.validation])
        return read if source.within == (0, None) else f"{read} {source.within}"

    def held_out(self, source: MixtureSource) -> Shards:
        """The validation split of a source."""
        return Shards(self.folder(source), "validation", tokenizer=self.tokenizer)

    def folder(self, source: MixtureSource, columns: Sequence[str] = ()) -> Path:
        """The shards of a source: a corpus as it is, anything else tokenised into this stage's own folder."""
        path, name = self.work.inputs[source.path], source.path
        number = str(list(self.order or self.work.inputs).index(name))
        if is_corpus(self.work, source):
            wishes = source.model_dump(include={*Source.model_fields, "validation"}, exclude_defaults=True)
            if wishes:
                raise TriviumError(
                    f"{self.work.stage}: `{name}` is tokenised already, so `{next(iter(wishes))}` changes "
                    "nothing here; say it where the corpus is made."
                )
            # A corpus that brings no tokenizer says itself why it cannot be read.
            brought = (path / "tokenizer").is_dir()
            if not brought or read_json(path / "manifest.json")["tokenizer"] == self.tokenizer.fingerprint:
                return path
            return self._retokenised(name, path, self.work.folder / "retokenised" / number)
        folder = self.work.folder / "tokenised" / number
        if not folder.exists() and world().leads:
            self.work.say(f"{'tokenising' if self.examples is None else 'reading'} {name}")
            self._tokenise(source, folder, columns)
        barrier()
        if self.examples is not None:
            facts = read_json(folder / "manifest.json")["facts"]
            if facts["kept"] == 0:
                because = f"; {facts['named'][0]}" if facts["named"] else ""
                raise TriviumError(f"{name}: none of its {facts['rows']} rows can be learned from{because}.")
        return folder

    def _tokenise(self, source: MixtureSource, folder: Path, columns: Sequence[str]) -> None:
        reading = Reading()
        texts = documents(self.work, [source], reading)
        skip, share = source.on_bad == "skip", source.validation
        if self.examples is None:
            write_shards(
                texts, self.tokenizer, folder, validation=share, columns=tuple(columns), skip_refused=skip
            )
            return
        encoder = Encoder(self.tokenizer, self.examples.context, self.examples.learned)
        counted: dict[str, Any] = {}

        def encoded() -> Iterator[Any]:
            yield from encoder.encode(texts)
            counted.update(encoder.tally.facts())
            counted["bad"], counted["empty"] = reading.bad, reading.empty
            counted["named"] = [*reading.named, *counted["named"]]

        write_encoded(
            encoded(), self.tokenizer, folder, validation=share, columns=("weight", *columns), facts=counted,
            skip_refused=skip,
        )  # fmt: skip

    def _retokenised(self, name: str, corpus: Path, folder: Path) -> Path:
        """A corpus made with another vocabulary, tokenised again: what was held out stays held out."""
        if not folder.exists() and world().leads:
            self.work.say(f"{name} was tokenised with another vocabulary: tokenising it again")
            before = Tokenizer.load(corpus / "tokenizer")
            columns = tuple(read_json(corpus / "manifest.json")["columns"])

            def texts() -> Iterator[Document]:
                for split in ("train", "validation"):
                    shards = Shards(corpus, split)
                    if shards.has_masks:
                        raise TriviumError(
                            f"{self.work.stage}: {name} holds conversations tokenised with another "
                            "vocabulary; name their source instead of the corpus."
                        )
                    kept = {name: shards.column(name) for name in columns}
                    for index in range(len(shards)):
                        numbers = {name: float(column[index]) for name, column in kept.items()}
                        text = before.decode(shards.document(index).tolist())
                        yield Document(text, numbers, shards.id(index))

            # What is held out follows from the text and this share alone, so it is what the corpus held out.
            write_shards(texts(), self.tokenizer, folder, validation=_share_of(corpus), columns=columns)
        barrier()
        return folder

    def validation_rows(
        self,
        mixture: Mapping[str, MixtureSource],
        context: int,
        tokens: int,
        *,
        learnt: Sequence[TokenisedData] = (),
        required: Collection[str] = (),
    ) -> dict[str, list[PackedSequence]]:
        """Held-out rows of every source, about `tokens` of them together, each token with its bytes of text.

        What is in the training split of `learnt`, under whatever name, is not measured; of a source in
        `required` something has to be left.
        """
        lengths = self.tokenizer.byte_lengths()
        found: dict[str, list[PackedSequence]] = {}
        held = {name: self.held_out(source) for name, source in mixture.items()}
        trained_on = also_in(held, learnt, self.tokenizer)
        for name, source in mixture.items():
            shards, known = held[name], trained_on[name]
            if known:
                self.work.say(
                    f"{name}: {len(known)} of {len(shards)} held-out documents are trained on; left out"
                )
            rows: list[PackedSequence] = []
            if len(known) < len(shards):
                packed = PackedRows(shards, context, within=source.within)
                taken = 0
                for index in range(len(packed)):
                    if taken < tokens / len(mixture):
                        row = self._measured(packed.row(index), packed.packing.pieces(index)[0], known)
                        predicted = row.targets >= 0
                        if predicted.any():
                            taken += len(row)
                            spelled = np.where(predicted, lengths[row.targets], 0).astype(np.float32)
                            rows.append(replace(row, columns={"bytes": spelled}))
            if rows:
                found[name] = rows
            elif name in required:
                raise TriviumError(
                    f"{self.work.stage}: of `{name}` nothing that is not trained on is held out to be "
                    "measured; give it a larger `validation`, the same wherever it stands."
                )
        return found

    def _measured(self, row: PackedSequence, documents: np.ndarray, known: Collection[int]) -> PackedSequence:
        """The row with nothing to predict in known documents and, of examples, in what is not learned."""
        drop = np.repeat([document in known for document in documents.tolist()], row.lengths)
        if self.examples is not None:
            drop |= row.weights <= 0
        return replace(row, targets=np.where(drop, NOTHING, row.targets))

    def held_out_texts(self, source: MixtureSource, most: int) -> list[str]:
        """The first texts that a source holds out, whatever vocabulary it was tokenised with."""
        path = self.work.inputs[source.path]
        if (path / "tokenizer").is_dir():
            reader, shards = Tokenizer.load(path / "tokenizer"), Shards(path, "validation")
        else:
            reader, shards = self.tokenizer, Shards(self.folder(source), "validation")
        return [reader.decode(shards.document(index).tolist()) for index in range(min(most, len(shards)))]


def _share_of(corpus: Path) -> float:
    return float(read_record(corpus.parent)["settings"]["validation"])


def held_out_share(work: Place, source: MixtureSource) -> float:
    """The share of a source's documents that is held out, which a corpus decided when it was made."""
    path = work.inputs[source.path]
    made = is_corpus(work, source) and (path.parent / "stage.yaml").is_file()
    return _share_of(path) if made else source.validation
