"""How the settings of a stage name what it reads: sources, mixtures, replay; the references they make."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from trivium.data.settings import Mixture, MixtureSource, Sources
from trivium.data.sources import Reading, Source
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.settings import Settings
from trivium.stages.parts.inheritance import learnt_by
from trivium.stages.parts.stage import Product, Reference, Work
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


class Replay(Settings):
    """What the parent learnt from, or `data` in its place, seen again at a share of every stretch."""

    data: Mixture | None = None
    """What is replayed; the parent's own mixture where it is left out."""
    share: float = Field(gt=0, lt=1)
    """The share of all tokens that is replayed."""


def _share(value: Any) -> Any:
    """A bare number is the share of what the parent learnt from."""
    return {"share": value} if isinstance(value, (int, float, str)) else value


Replayed = Annotated[Replay, BeforeValidator(_share, json_schema_input_type=float | Replay)]


def replay_references(replay: Replay | None, *, by_length: bool = False) -> list[Reference]:
    """The references that a replay with data of its own makes."""
    if replay is None or replay.data is None:
        return []
    return mixture_references(replay.data, "replay.data", by_length=by_length)


def replayed(
    work: Work,
    replay: Replay | None,
    start: str,
    folder: Path,
    taken: Mapping[str, Mapping[str, MixtureSource]],
    *,
    examples: bool = False,
) -> tuple[Work, dict[str, MixtureSource]]:
    """What is seen again, and the work that knows where it is; `taken` are the stage's other mixtures.

    `examples` says whether conversations, and prompts with completions, can be seen again as well.
    """
    if replay is None:
        return work, {}
    again = replay.data
    if again is None:
        learnt = learnt_by(work.stage, start, folder, examples=examples)
        work, again = replace(work, inputs={**work.inputs, **learnt.places}), learnt.mixture
        for name, source in again.items():
            if examples and source.within != (0, None):
                raise TriviumError(
                    f"{work.stage}: `replay` is a bare share, but {start} chose `{name}` by the length of "
                    "its documents, which this stage cannot do; say `replay: {share: 0.2, data: ...}`."
                )
    for setting, mixture in taken.items():
        for name in sorted(mixture.keys() & again.keys()):
            raise TriviumError(f"{work.stage}: `{name}` is in `{setting}` and in `replay`; leave it in one.")
    weights = {name: "by its tokens" if one.weight is None else one.weight for name, one in again.items()}
    work.change("replay", "nothing", {"share": replay.share, **weights})
    return work, again
