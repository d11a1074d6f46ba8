"""How stages name data: one place, or a list of places, each with its own way of being read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trivium.data.sources import Document, Reading, Source, read_documents
from trivium.kit.errors import TriviumError
from trivium.stages.parts.stage import Product, Reference, Work


def _listed(value: Any) -> Any:
    """`./texts` and `{path: ./texts, limit: 10}` are short for lists of one."""
    places = value if isinstance(value, list) else [value]
    return [{"path": place} if isinstance(place, str) else place for place in places]


Sources = Annotated[
    list[Source],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=str | Source | list[str | Source]),
]


def source_references(
    setting: str, sources: list[Source], needs: tuple[Product, ...] = ("data", "source")
) -> list[Reference]:
    """The references that a setting of this kind makes."""
    return [
        Reference(f"{setting}.{place}.path", source.path, needs, source)
        for place, source in enumerate(sources)
    ]


def refuse_separator(setting: str, source: Source) -> None:
    """Where documents have to have columns, no text file is read that could be divided."""
    if source.separator is not None:
        raise TriviumError(
            f"{setting}: {source.path} needs columns, so `separator` changes nothing here; leave it out."
        )


def documents(work: Work, sources: list[Source], reading: Reading) -> Iterator[Document]:
    """Every document of all sources, one source after the other."""
    for source in sources:
        yield from read_documents(located(work, source), reading)


def located(work: Work, source: Source) -> Source:
    """The source as it is found from here, whatever folder the recipe lies in."""
    return source.model_copy(update={"path": str(work.path(source.path))})


def summary_of(manifest: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """What came of reading and tokenising, for `stage.yaml`."""
    splits = manifest["splits"]
    return {
        "documents": manifest["read"]["documents"],
        "duplicates": manifest["read"]["duplicates"],
        "refused": manifest["read"]["refused"],
        "bad": reading.bad,
        "empty": reading.empty,
        "named": [*reading.named, *manifest["read"]["named"]],
        "tokens": splits["train"]["tokens"],
        "bytes": splits["train"]["bytes"],
        "validation_documents": splits["validation"]["documents"],
        "validation_tokens": splits["validation"]["tokens"],
    }
