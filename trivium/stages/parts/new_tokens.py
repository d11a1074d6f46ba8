"""New tokens for a model: learnt from texts, added to its tokenizer and to its embedding."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from trivium.data.door import Door, documents, held_out_share
from trivium.data.settings import MixtureSource, Sources
from trivium.data.split import in_validation, text_hash
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.model.transformer import Transformer
from trivium.model.vocabulary import Start, compression, grow_vocabulary
from trivium.stages.parts.inheritance import held_out_by
from trivium.stages.parts.stage import Work
from trivium.tokens.extend import extend_tokenizer
from trivium.tokens.tokenizer import Tokenizer


class NewTokens(Settings):
    """Tokens learnt from the texts in `data`, and how their rows begin."""

    formerly: ClassVar[Mapping[str, str]] = {"letters": "characters"}

    data: Sources
    """Texts to learn the new tokens from."""
    added: Count = Field(gt=0)
    """How many tokens to add."""
    start: Start = "mean"
    """How the new rows of the embedding begin."""
    characters: Count = 20_000_000
    """Read at most so many characters of text."""

    def extended(self, work: Work, tokenizer: Tokenizer, mixture: Mapping[str, MixtureSource]) -> Tokenizer:
        """The tokenizer with the new tokens; what the mixture holds out tells how well they fit."""
        share = max(held_out_share(work, source) for source in mixture.values())
        texts: list[str] = []
        characters = 0
        for document in documents(work, self.data):
            if document.text and not in_validation(text_hash(document), share):
                texts.append(document.text)
                characters += len(document.text)
            if characters >= self.characters:
                break
        if not texts:
            raise TriviumError(f"{work.stage}: `vocabulary.data` has no text to learn tokens from.")
        return extend_tokenizer(tokenizer, texts, self.added)

    def add(
        self, work: Work, model: Transformer, parent: tuple[str, Path], before: Tokenizer,
        tokenizer: Tokenizer, mixture: Mapping[str, MixtureSource],
    ) -> None:  # fmt: skip
        """Grow the model's tables, and say how both vocabularies encode what is held out here and before."""
        work.change("vocabulary", before.vocabulary_size, tokenizer.vocabulary_size)
        try:
            known, places = held_out_by(work.stage, dict([parent]))
        except TriviumError:
            # Of a model from outside it is not known what it learnt from.
            known, places = {}, {}
        # Behind what is named here, as a source's place in this order names its folder.
        further = {name: place for name, place in places.items() if name not in work.inputs}
        door = Door(replace(work, inputs={**work.inputs, **further}), tokenizer)
        for name, source in {**known, **mixture}.items():
            texts = door.held_out_texts(source, 1000)
            if texts:
                found = compression(before, tokenizer, texts)
                work.change(f"bytes per token of {name}", round(found.before, 3), round(found.after, 3))
        grow_vocabulary(model, before, tokenizer, start=self.start, seed=work.seed)
