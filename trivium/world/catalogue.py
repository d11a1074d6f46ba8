"""The shelf of sources: one call hands out any of them, with its options checked by name."""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.world.document import SPLITS, Question, Share, Split, WorldDocument


@dataclass(frozen=True)
class Source:
    """One source: what it is for, its options, how a document is written and how a question is asked."""

    description: str
    options: type
    write: Callable[[int, Split, int, Any], WorldDocument]
    ask: Callable[[int, Split, int, Any], Question] | None = None
    count: Callable[[Split, Any], int | None] | None = None


_DESCRIPTIONS = {
    "prose": "Tales, letters, talks and guides, for pre-training; bits per byte beside their floor.",
    "facts": "What is true of people and towns, for pre-training; recall by how often each is spoken of.",
    "sums": "Word problems with worked steps, for reasoning; the answer and every step can be checked.",
    "craft": "What the crafts make and how, a new domain for mid-training; facts asked before and after.",
    "tongue": "A second language with its own script and grammar, for mid-training; translation and recall.",
    "chronicle": "Long documents with something to find at any length and depth, for context extension.",
    "ledger": "Questions over the tables of the country with their SQL, for customisation; executed and "
    "compared.",
    "web": "Texts buried in duplicates, boilerplate, spam and leaked test items, each labelled, for "
    "curation.",
    "chat": "Instructions whose fulfilment a program can check, for supervised fine-tuning.",
    "taste": "Pairs of answers with a known cause, for preferences; its questions are the sycophancy "
    "evaluation.",
    "pictures": "Questions about shapes, colours, counts, positions, digits and charts in pictures, for "
    "modalities.",
    "sounds": "Questions about the pitches, order, number and lengths of tones, for modalities.",
}
"""Every source, a module of this folder, and what it is for."""


def _source(name: str, description: str) -> Source:
    """The source of a module: its options, documents, and questions where it asks any."""
    module = import_module(f"trivium.world.{name}")
    ask, count = (getattr(module, method, None) for method in ("ask", "count"))
    return Source(description, module.Options, module.write, ask, count)


SOURCES = {name: _source(name, description) for name, description in _DESCRIPTIONS.items()}


def sources() -> dict[str, str]:
    """Every source and, in one sentence, what it is for."""
    return {name: source.description for name, source in SOURCES.items()}


def options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of a source with these values, each refused by name where the source does not know it."""
    if name not in SOURCES:
        raise TriviumError(
            f"There is no source world:{name}{_nearest(name, SOURCES)}; there are {', '.join(SOURCES)}."
        )
    known = {field.name: field for field in dataclasses.fields(SOURCES[name].options)}
    found: dict[str, Any] = {}
    for option, value in given.items():
        if option not in known:
            raise TriviumError(
                f"world:{name} has no option '{option}'{_nearest(option, known)}; it has {', '.join(known)}."
            )
        found[option] = _as(name, option, known[option].default, value)
        if known[option].type is Share and not 0 <= found[option] <= 1:
            raise TriviumError(
                f"The option '{option}' of world:{name} is a share from 0 to 1, not {value!r}."
            )
    return SOURCES[name].options(**found)


def documents(
    name: str,
    *,
    split: str = "train",
    seed: int = 0,
    limit: int | None = None,
    start: int = 0,
    **options: Any,
) -> Iterator[WorldDocument]:
    """The documents of a source from number `start` on, without end unless `limit` says how many."""
    source, settings, side = _prepare(name, split, seed, limit, start, options)
    return _documents(name, source, settings, side, seed, _indices(start, limit))


def _documents(
    name: str, source: Source, settings: Any, split: Split, seed: int, indices: Iterator[int]
) -> Iterator[WorldDocument]:
    prefix = f"world:{name}" if split == "train" else f"world:{name}/{split}"
    for index in indices:
        yield dataclasses.replace(source.write(index, split, seed, settings), id=f"{prefix}#{index}")


def questions(
    name: str,
    split: str = "test",
    *,
    seed: int = 0,
    limit: int | None = None,
    start: int = 0,
    shots: int = 0,
    **options: Any,
) -> Iterator[Question]:
    """Questions with known answers; with `shots`, each prompt begins with that many of train, answered."""
    source, settings, side = _prepare(name, split, seed, limit, start, options)
    if source.ask is None:
        able = ", ".join(sorted(other for other, one in SOURCES.items() if one.ask))
        raise TriviumError(f"world:{name} asks no questions; these do: {able}.")
    if source.count is not None:
        there_are = source.count(side, settings)
        if there_are is not None:
            left = max(there_are - start, 0)
            limit = left if limit is None else min(limit, left)
    return _questions(name, source, settings, side, seed, _indices(start, limit), shots)


def _questions(
    name: str, source: Source, settings: Any, split: Split, seed: int, indices: Iterator[int], shots: int
) -> Iterator[Question]:
    assert source.ask is not None
    for index in indices:
        item = source.ask(index, split, seed, settings)
        shown = [source.ask(index * shots + shot, "train", seed + 1, settings) for shot in range(shots)]
        if shots:
            lines = [f"Question: {one.question}\nAnswer: {one.answer}\n\n" for one in shown]
            item = dataclasses.replace(item, prompt="".join(lines) + f"Question: {item.question}\nAnswer:")
        messages = item.messages or ({"role": "user", "content": item.question},)
        yield dataclasses.replace(item, id=f"world:{name}/{split}?{index}", messages=messages)


def entropy(
    name: str, *, split: str = "train", seed: int = 0, sample: int = 1000, **options: Any
) -> dict[str, float]:
    """The floor of the loss on a source: mean bits per document and per byte that no model can beat."""
    bits = size = 0.0
    for document in documents(name, split=split, seed=seed, limit=sample, **options):
        if document.text is None or "bits" not in document.truth:
            raise TriviumError(f"The entropy of world:{name} is not known in this form; use its text form.")
        bits += document.truth["bits"]
        size += len(document.text.encode())
    return {
        "bits_per_document": bits / sample,
        "bits_per_byte": bits / size,
        "bytes_per_document": size / sample,
    }


def _indices(start: int, limit: int | None) -> Iterator[int]:
    return itertools.count(start) if limit is None else iter(range(start, start + limit))


def _prepare(
    name: str, split: str, seed: Any, limit: Any, start: Any, given: Mapping[str, Any]
) -> tuple[Source, Any, Split]:
    settings = options(name, given)
    side = next((one for one in SPLITS if one == split), None)
    if side is None:
        raise TriviumError(f"world:{name} has no split '{split}'; use train, validation or test.")
    for what, number in (("seed", seed), ("limit", limit), ("start", start)):
        whole = isinstance(number, int) and not isinstance(number, bool)
        fits = whole and (number >= 0 or what == "seed")
        if not fits and not (what == "limit" and number is None):
            least = "" if what == "seed" else " from 0 on"
            raise TriviumError(f"The `{what}` of world:{name} is a whole number{least}, not {number!r}.")
    return SOURCES[name], settings, side


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _as(name: str, option: str, default: Any, value: Any) -> Any:
    kind = type(default)
    if kind is bool and str(value).lower() in ("true", "false", "1", "0"):
        return str(value).lower() in ("true", "1")
    try:
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
        if kind is str:
            return str(value)
    except (TypeError, ValueError):
        pass
    raise TriviumError(
        f"The option '{option}' of world:{name} takes a value like {default!r}, not {value!r}."
    )
