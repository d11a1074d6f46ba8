"""How the settings of a stage name documents to read: the references they make, and what became of them."""

from typing import Any

from trivium.data.settings import Sources
from trivium.data.sources import Reading, Source
from trivium.kit.errors import TriviumError
from trivium.stages.parts.stage import Product, Reference


def source_references(
    setting: str, sources: Sources, needs: tuple[Product, ...] = ("data", "source")
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
