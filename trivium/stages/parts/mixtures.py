"""How the settings of a stage name mixtures: the references they make."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium.data.settings import MixtureSource
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.stages.parts.stage import Product, Reference
from trivium.tokens.tokenizer import Tokenizer

TOKENISED: tuple[Product, ...] = ("shards", "data", "source")
ROWS: tuple[Product, ...] = ("data", "source")
"""What a mixture may name: a tokenised corpus as well, or only what has rows to read."""
MEASURED = ("weight", "max_repeats", "easy_first")
"""What a source cannot say where its documents are measured and not trained on."""
PROMPTS = (*MEASURED, "validation")
"""What it cannot say where its documents are prompts: all are used, in an order of their own."""
PAIRS = ("easy_first", "separator")
"""What it cannot say where its rows are preference pairs."""


def mixture_references(
    mixture: Mapping[str, MixtureSource],
    setting: str = "data",
    *,
    needs: tuple[Product, ...] = TOKENISED,
    by_length: bool = False,
    without: Collection[str] = (),
) -> list[Reference]:
    """The references that a mixture makes; a stage that can choose documents by their length says so.

    What a source says of `without` is refused, as it would change nothing.
    """
    for name, source in mixture.items():
        for field in without:
            if getattr(source, field) != MixtureSource.model_fields[field].default:
                raise TriviumError(
                    f"{setting}: `{name}` has a `{field}`, which changes nothing here; leave it out."
                )
        if not by_length and (source.of is not None or source.within != (0, None)):
            raise TriviumError(
                f"{setting}: `{name}` is chosen by length or stands under another name, which only a stage "
                "that reads plain text can do; leave `of`, `min_tokens` and `max_tokens` out."
            )
        if source.of is not None and "." in name:
            raise TriviumError(f"{setting}: `{name}` has an `of`; give it a name without a dot.")
    return [
        Reference(
            setting if source.of is None else f"{setting}.{name}.of",
            source.path,
            needs,
            source.at(source.path),
        )
        for name, source in mixture.items()
    ]


def planned_vocabulary(
    inputs: Mapping[str, Path | Mapping[str, Any]], names: Iterable[str | None]
) -> int | None:
    """The vocabulary of a corpus or a tokenizer that exists, or of one that is only planned."""
    for name in names:
        known = inputs.get(name) if name is not None else None
        if isinstance(known, Path) and (known / "manifest.json").is_file():
            return int(read_json(known / "manifest.json")["vocabulary"])
        if isinstance(known, Path) and (known / "tokenizer.json").is_file():
            return Tokenizer.load(known).vocabulary_size
        if isinstance(known, Mapping) and "vocabulary" in known:
            return int(known["vocabulary"])
    return None
