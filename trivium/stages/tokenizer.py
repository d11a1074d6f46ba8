"""The tokenizer stage: a vocabulary learnt from text."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from trivium.data.door import documents
from trivium.data.settings import Sources
from trivium.data.sources import Reading
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder
from trivium.kit.numbers import Count
from trivium.stages.parts.documents import source_references
from trivium.stages.parts.stage import Product, Reference, Stage, Work
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import SMALLEST, Digits, train_tokenizer


class TokenizerStage(Stage):
    """Learn a byte-level BPE vocabulary from `data`."""

    kind: Literal["tokenizer"]
    """Train a tokenizer (byte-level BPE)."""
    formerly: ClassVar[Mapping[str, str]] = {"letters": "characters"}
    version: ClassVar[int] = 2
    produces: ClassVar[Product] = "tokenizer"
    computes: ClassVar[bool] = False
    unaffecting: ClassVar[frozenset[str]] = frozenset({"seed"})

    data: Sources
    """Texts to train on."""
    vocabulary: Count = Field(default=4096, ge=SMALLEST)
    """The number of tokens."""
    digits: Digits = "single"
    """How digits are split."""
    # Merges settle long before a large corpus ends.
    characters: Count = 200_000_000
    """Read at most so many characters of text."""

    def references(self) -> list[Reference]:
        return source_references("data", self.data)

    def plan(self, inputs: Any) -> dict[str, Any]:
        """The size of the vocabulary, on which the model's size depends."""
        return {"vocabulary": self.vocabulary}

    def run(self, work: Work) -> dict[str, Any]:
        reading = Reading()
        seen = {"characters": 0, "bytes": 0}
        tokenizer = train_tokenizer(self._texts(work, reading, seen), self.vocabulary, digits=self.digits)
        if not reading.documents:
            raise TriviumError(f"{work.stage}: `data` has no text to learn a vocabulary from; give it some.")
        with whole_folder(work.output("tokenizer")) as folder:
            tokenizer.save(folder)
        return {"vocabulary": tokenizer.vocabulary_size, "documents": reading.documents, **seen} | (
            self._compression(work, tokenizer)
        )

    def _texts(self, work: Work, reading: Reading, seen: dict[str, int]) -> Iterator[str]:
        for document in documents(work, self.data, reading):
            text = document.text if document.text is not None else _spoken(document.fields)
            seen["characters"] += len(text)
            seen["bytes"] += len(text.encode())
            work.progress.update(seen["characters"], None, "characters")
            yield text
            if seen["characters"] >= self.characters:
                return

    def _compression(self, work: Work, tokenizer: Tokenizer) -> dict[str, float]:
        """Bytes per token on the first documents."""
        size = tokens = 0
        for document in documents(work, self.data, Reading()):
            text = document.text if document.text is not None else _spoken(document.fields)
            size += len(text.encode())
            tokens += len(tokenizer.encode(text))
            if size > 1_000_000:
                break
        return {"bytes_per_token": round(size / max(tokens, 1), 3)}


def _spoken(fields: dict[str, Any]) -> str:
    """What is said in a conversation, without who says it, and beside which pictures and sounds."""
    contents = [message.get("content") for message in fields.get("messages") or []]
    parts = [part for one in contents for part in (one if isinstance(one, list) else [{"text": one}])]
    texts = (part.get("text") for part in parts if isinstance(part, Mapping))
    return "\n".join(text for text in texts if isinstance(text, str))
