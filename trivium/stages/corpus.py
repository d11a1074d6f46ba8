"""The corpus stage: documents tokenised once, into shards that every training stage reads."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from trivium.curate.examination import Examined, held_out_of
from trivium.data.door import documents
from trivium.data.settings import Sources
from trivium.data.shards import write_shards
from trivium.data.sources import Document, Reading
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.stages.parts.documents import source_references, summary_of
from trivium.stages.parts.stage import Product, Reference, Stage, Work
from trivium.tokens.tokenizer import Tokenizer


class Corpus(Stage):
    """Tokenise `data` with `tokenizer` and hold out a share of the documents for validation."""

    kind: Literal["corpus"]
    """Tokenise documents into shards."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "shards"
    computes: ClassVar[bool] = False
    unaffecting: ClassVar[frozenset[str]] = frozenset({"seed", "workers"})

    data: Sources
    """Where the documents are."""
    tokenizer: str
    """The tokenizer."""
    validation: float = Field(default=0.01, ge=0, lt=1)
    """The share of documents held out for validation."""
    unique: bool = True
    """Leave out documents whose text has been seen."""
    columns: tuple[str, ...] = ()
    """Numeric columns to keep with every document."""
    tokens_per_shard: Count = 1 << 28
    """The size of a shard in tokens."""
    # One process already tokenises on all cores; more of them read and unpack in parallel, too.
    workers: int = Field(default=1, ge=1)
    """How many processes tokenise."""

    def references(self) -> list[Reference]:
        """`tokenizer` names a tokenizer or a model with one; `data` documents."""
        return [
            *source_references("data", self.data),
            Reference("tokenizer", self.tokenizer, ("tokenizer", "model")),
        ]

    def examines(self) -> Examined:
        return held_out_of(self.data, self.validation)

    def plan(self, inputs: Any) -> dict[str, Any]:
        """What the tokenizer's plan says, for the model that will be trained on it."""
        return dict(inputs[self.tokenizer]) if isinstance(inputs[self.tokenizer], dict) else {}

    def run(self, work: Work) -> dict[str, Any]:
        reading = Reading()
        tokenizer = Tokenizer.load(work.path(self.tokenizer))
        manifest = write_shards(
            self._counted(work, reading),
            tokenizer,
            work.output("shards"),
            workers=self.workers,
            validation=self.validation,
            unique=self.unique,
            tokens_per_shard=self.tokens_per_shard,
            columns=self.columns,
            skip_refused=all(source.on_bad == "skip" for source in self.data),
            facts={"sources": [source.path for source in self.data]},
        )
        if not any(split["documents"] for split in manifest["splits"].values()):
            names = ", ".join(source.path for source in self.data)
            raise TriviumError(f"{work.stage}: no document of {names} is left; name others in `data`.")
        # A model trained on these shards needs the tokenizer they were made with.
        tokenizer.save(work.output("shards") / "tokenizer")
        summary = summary_of(manifest, reading)
        if summary["bad"] or summary["refused"]:
            work.say(f"{summary['bad'] + summary['refused']} documents left out: {summary['named'][0]} ...")
        return summary

    def _counted(self, work: Work, reading: Reading) -> Iterator[Document]:
        for number, document in enumerate(documents(work, self.data, reading), start=1):
            if number % 100 == 0:
                work.progress.update(number, None, "documents")
            yield document
