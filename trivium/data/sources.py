"""Where documents come from: files of every usual kind, data sets on disk and on the hub, and the world."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from pydantic import Field

from trivium.data.formats import BadLine, entries
from trivium.data.opening import KINDS, kind_of, opened
from trivium.kit.errors import TriviumError, needing
from trivium.kit.files import bare_name, expanded, read_object
from trivium.kit.listing import files_below, is_pattern, matching
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.tokens.parts import has_items, is_part

_NAMED_IN_REPORT = 20
WRITTEN = "written"
"""The key under which a picture or a sound in a message keeps its path as the file has it."""


class Source(Settings):
    """One place to read documents from, and how."""

    path: str
    """A file, a folder, a pattern, `world:NAME?option=value`, `owner/name@revision` of the hub, a stage."""
    columns: dict[str, str] = {}
    """Which column of the data holds what: `{text: body}`."""
    split: str | None = None
    """The split of a data set from the hub, or of a source of the world."""
    subset: str | None = None
    """The configuration of a data set from the hub."""
    limit: Count | None = Field(default=None, ge=0)
    """Read at most so many documents."""
    separator: str | None = Field(default=None, min_length=1)
    """What separates documents in a plain text file."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Whether a line that cannot be read stops the stage or is skipped and counted."""

    def at(self, path: str) -> Source:
        """The source alone, read in the same way from this place."""
        return Source(**{**self.model_dump(include=set(Source.model_fields)), "path": path})


@dataclass(frozen=True)
class Document:
    """One document: its text if it has one, every field as read, and an id that says where it came from."""

    text: str | None
    fields: dict[str, Any]
    id: str


@dataclass
class Reading:
    """What reading a source came to: counted as it happens, malformed lines by name."""

    documents: int = 0
    bad: int = 0
    empty: int = 0
    named: list[str] = field(default_factory=list)

    def add_bad(self, line: BadLine) -> None:
        """Count a malformed line and remember where the first ones were."""
        self.bad += 1
        if len(self.named) < _NAMED_IN_REPORT:
            self.named.append(f"{line.where}: {line.why}")


def read_documents(source: Source | str, reading: Reading | None = None) -> Iterator[Document]:
    """Every document of a source in a fixed order; malformed lines stop the reading or are counted."""
    source = Source(path=source) if isinstance(source, str) else source
    reading = reading if reading is not None else Reading()
    left = source.limit
    if left == 0:
        return
    for found in _found(source):
        document = found if isinstance(found, BadLine) else _document(source, *found)
        if isinstance(document, BadLine):
            if source.on_bad == "stop":
                raise TriviumError(f"{document.where}: {document.why}; fix it or set `on_bad: skip`.")
            reading.add_bad(document)
        elif document.text == "":
            reading.empty += 1
        else:
            reading.documents += 1
            yield document
            left = None if left is None else left - 1
            if left == 0:
                return


def in_our_columns(source: Source, identity: str, fields: dict[str, Any]) -> dict[str, Any] | BadLine:
    """The fields of an entry under the names that `columns` gives them."""
    if missing := [there for there in source.columns.values() if there not in fields]:
        return BadLine(identity, f"has no column {missing[0]!r}, only {', '.join(map(repr, fields))}")
    renamed = {there: ours for ours, there in source.columns.items()}
    return {renamed.get(name, name): value for name, value in fields.items()}


def _document(source: Source, identity: str, given: dict[str, Any]) -> Document | BadLine:
    fields = in_our_columns(source, identity, given)
    if isinstance(fields, BadLine):
        return fields
    text = fields.get("text")
    if text is not None and not isinstance(text, str):
        return BadLine(identity, f"`text` holds {type(text).__name__}, not text")
    try:
        (text if text is not None else json.dumps(fields, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError:
        return BadLine(identity, "holds half a surrogate pair, which is no letter")
    return Document(text=text, fields=fields, id=identity)


def _found(source: Source) -> Iterator[tuple[str, dict[str, Any]] | BadLine]:
    if source.path.startswith("world:"):
        yield from _world(source)
        return
    listed = files_of(source)
    if listed is None:
        yield from _hub(source)
        return
    if source.subset is not None:
        raise TriviumError(
            f"`subset: {source.subset}` names a part of a data set on the hub, and {source.path} lies here; "
            "leave it out, or name the part's own folder."
        )
    for name, path in listed:
        for entry in entries(name, path, source.separator):
            if not isinstance(entry, BadLine):
                place_items(entry[1], path.parent)
            yield entry


def place_items(fields: dict[str, Any], folder: Path) -> None:
    """Make the paths of pictures and sounds in messages, relative to the file that names them, absolute."""
    for part in items_in(fields):
        if isinstance(part.get("path"), str) and not part["path"].startswith("data:"):
            part.setdefault(WRITTEN, part["path"])
            part["path"] = str(folder / Path(part["path"]).expanduser())


def as_written(value: Any) -> Any:
    """A value of a row with the paths of pictures and sounds as the file has them, wherever that lies."""
    if isinstance(value, (list, tuple)):
        return [as_written(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if is_part(value) and WRITTEN in value:
        value = {**value, "path": value[WRITTEN]}
    return {name: as_written(one) for name, one in value.items()}


def named_items(file: Path) -> list[str]:
    """The files of pictures and sounds that the rows of a file name, each once.

    A file that is damaged names those that stand before the damage; what reads its rows says what is wrong.
    """
    found: dict[str, None] = {}
    with suppress(TriviumError):
        # Most files hold none, which is seen without reading their rows.
        if not _holds(file, b'"path"'):
            return []
        for document in read_documents(Source(path=str(file), on_bad="skip")):
            for part in items_in(document.fields):
                if isinstance(part.get("path"), str) and not part["path"].startswith("data:"):
                    found[part["path"]] = None
    return list(found)


def _holds(file: Path, sign: bytes) -> bool:
    """Whether a sign stands anywhere in a file; a line may be longer than memory."""
    with opened(file) as content:
        before = b""
        while block := content.read(1 << 20):
            if sign in (before := before[-len(sign) :] + block):
                return True
    return False


def items_in(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of all messages of a row that are pictures or sounds."""
    for value in fields.values():
        if isinstance(value, list) and has_items(value):
            for message in value:
                content = message.get("content") if isinstance(message, dict) else None
                yield from (part for part in content if is_part(part)) if isinstance(content, list) else ()


def files_of(source: Source) -> list[tuple[str, Path]] | None:
    """The files behind a source with their stable names, in order; None for an id on the hub."""
    path = expanded(source.path)
    if path.is_file():
        if kind_of(path) is None:
            raise TriviumError(f"{path} ends in none of {', '.join(KINDS)} (or these with .gz or .zst).")
        return [(path.name, path)]
    if path.is_dir():
        return _files_in(path, source)
    if is_pattern(source.path):
        return matches_of(source, "readable file", kind_of)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?", source.path) and kind_of(path) is None:
        return None
    raise TriviumError(
        f"There is no file or folder {source.path}; check the path (in a recipe it starts from that file)."
    )


def matches_of(source: Source, what: str, known: Callable[[Path], Any]) -> list[tuple[str, Path]]:
    """The files of a known kind that match a pattern, named from where it begins to be one."""
    path = expanded(source.path)
    kept = [match for match in sorted(matching(path)) if match.is_file() and known(match)]
    if not kept:
        raise TriviumError(f"No {what} matches {source.path}; check the pattern.")
    fixed = Path(re.split(r"[*?\[]", str(path))[0] + "_").parent
    return [(match.relative_to(fixed).as_posix(), match) for match in kept]


def _files_in(folder: Path, source: Source) -> list[tuple[str, Path]]:
    if (folder / "dataset_dict.json").is_file():
        splits = _named_in(folder / "dataset_dict.json", "splits")
        chosen = source.split or ("train" if "train" in splits else None)
        if chosen is None or chosen not in splits:
            raise TriviumError(f"{folder} has the splits {', '.join(splits)}; name one of them as `split`.")
        folder = folder / chosen
    if (folder / "state.json").is_file():
        arrows = [folder / name for name in _named_in(folder / "state.json", "_data_files")]
        return [(f"{folder.name}/{arrow.name}", arrow) for arrow in arrows]
    paths = sorted(path for path in files_below(folder) if kind_of(path))
    kept = [(path.relative_to(folder.parent).as_posix(), path) for path in paths]
    if source.split is not None:
        # Data sets as the hub stores them carry the split in the file's or the folder's name.
        named = re.compile(rf"(^|[/_.-]){re.escape(source.split)}([/_.-]|$)")
        kept = [(name, path) for name, path in kept if named.search(path.relative_to(folder).as_posix())]
    if not kept:
        wanted = f" of split {source.split!r}" if source.split else ""
        raise TriviumError(f"{folder} holds no readable file{wanted}; it needs {', '.join(KINDS)}.")
    return kept


def _named_in(path: Path, key: str) -> list[str]:
    """The files or folders beside `path` that it names, as a list of names or of objects with a name."""
    listed = read_object(path).get(key)
    if not isinstance(listed, list) or not listed:
        raise TriviumError(f"{path} has no list of {key!r}; save the data set again.")
    names = [one.get("filename") if isinstance(one, dict) else one for one in listed]
    return [bare_name(path, name) for name in names]


def _hub(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    with needing(
        f"There is no file or folder {source.path}; reading the hub needs: pip install 'trivium[hub]'."
    ):
        from datasets import load_dataset
    split = source.split or "train"
    repository, _, revision = source.path.partition("@")
    try:
        rows = load_dataset(repository, source.subset, split=split, revision=revision or None, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{repository}/{split}:{number}", dict(row)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TriviumError(
            f"{source.path} is no file here and cannot be read from the hub: {reason}"
        ) from error


def world_call(path: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in `world:NAME?option=value&…`."""
    name, _, query = path.removeprefix("world:").partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def _world(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    from trivium import world

    name, options = world_call(source.path)
    arguments = {"split": source.split or "train", "limit": source.limit, **options}
    if arguments["limit"] is None:
        raise TriviumError(f"{source.path} never ends; say how many documents with `limit`.")
    for document in world.documents(name, **arguments):
        text = {} if document.text is None else {"text": document.text}
        yield document.id, {**text, **document.fields, "truth": document.truth}
