"""Token shards: text is tokenised once, then read as slices of memory-mapped files, each checksummed."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trivium.data.encoding import Encoded, Refused, encode_documents
from trivium.data.sources import Document
from trivium.data.split import in_validation, text_hash
from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum, read_json, sync, whole_folder, write_json
from trivium.kit.fingerprint import fingerprint
from trivium.tokens.items import LIBRARY, ItemsFile
from trivium.tokens.tokenizer import Tokenizer

VERSION = 1
ITEMS = "items.bin"
_PARTS = (".bin", ".idx", ".bytes", ".ids")
_NAMED_IN_REPORT = 20


@dataclass
class _Shard:
    """A shard being written: tokens go to disk as they come, what is per document waits in memory."""

    folder: Path
    name: str
    dtype: np.dtype
    columns: tuple[str, ...]
    file: BinaryIO = field(init=False)
    tokens: int = 0
    ends: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file = (self.folder / f"{self.name}.bin").open("wb")
        self.values = {column: [] for column in self.columns}

    def add(self, encoded: Encoded) -> None:
        self.file.write(encoded.tokens.astype(self.dtype).tobytes())
        if encoded.learned is not None:
            self.masks[self.tokens] = encoded.learned
        self.tokens += len(encoded.tokens)
        self.ends.append(self.tokens)
        self.bytes.append(encoded.bytes)
        self.ids.append(encoded.document.id)
        for column, values in self.values.items():
            values.append(_number(encoded.document, column))

    def finish(self) -> dict[str, Any]:
        self.file.close()
        base = self.folder / self.name
        np.array(self.ends, dtype="<u8").tofile(f"{base}.idx")
        np.array(self.bytes, dtype="<u8").tofile(f"{base}.bytes")
        Path(f"{base}.ids").write_text(
            "".join(json.dumps(name) + "\n" for name in self.ids), encoding="utf-8"
        )
        for column, values in self.values.items():
            np.array(values, dtype="<f4").tofile(f"{base}.{column}.f4")
        if self.masks:
            mask = np.ones(self.tokens, dtype=bool)
            for start, learned in self.masks.items():
                mask[start : start + len(learned)] = learned
            np.packbits(mask).tofile(f"{base}.mask")
        files = sorted(self.folder.glob(f"{self.name}.*"))
        for path in files:
            sync(path)
        return {
            "name": self.name,
            "documents": len(self.ends),
            "tokens": self.tokens,
            "files": {path.name: {"size": path.stat().st_size, "checksum": checksum(path)} for path in files},
        }


def _number(document: Document, column: str) -> float:
    value: Any = document.fields
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, (int, float)):
        raise TriviumError(
            f"{document.id}: `{column}` is to be kept per document but is {value!r}, no number."
        )
    return float(value)


def write_shards(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path | str, *, workers: int = 1, **how: Any
) -> dict[str, Any]:
    """Tokenise documents and write them, which is said in the settings of `write_encoded`."""
    return write_encoded(encode_documents(documents, tokenizer, workers), tokenizer, folder, **how)


def write_encoded(
    found: Iterable[Encoded | Refused],
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    validation: float = 0.0,
    unique: bool = False,
    tokens_per_shard: int = 1 << 28,
    columns: tuple[str, ...] = (),
    skip_refused: bool = False,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write tokenised documents into a folder of shards, which appears whole; returns its manifest.

    `validation` is the share held out, `unique` drops exact copies, `columns` names numbers to keep of each;
    `facts` are kept as they are once the last document is written.
    """
    small = "<u2" if tokenizer.vocabulary_size <= 1 << 16 else "<u4"
    # Ids of pictures and sounds need 62 bits.
    dtype = np.dtype(small if tokenizer.forms is None else "<i8")
    seen: set[bytes] = set()
    counts = {"documents": 0, "duplicates": 0, "refused": 0}
    refused: list[str] = []
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    open_shards: dict[str, _Shard] = {}
    with whole_folder(folder) as beside, LIBRARY.passing() as forget:
        items = ItemsFile(beside / ITEMS)
        for encoded in found:
            # The document holds its items until they are written.
            forget()
            counts["documents"] += 1
            if isinstance(encoded, Refused):
                line = f"{encoded.document.id} {encoded.why}"
                if not skip_refused:
                    raise TriviumError(f"{line} (or set `on_bad: skip`).")
                counts["refused"] += 1
                refused = [*refused, line][:_NAMED_IN_REPORT]
                continue
            digest = text_hash(encoded.document)
            if unique and digest in seen:
                counts["duplicates"] += 1
                continue
            if unique:
                seen.add(digest)
            split = "validation" if in_validation(digest, validation) else "train"
            shard = open_shards.get(split)
            if shard is None:
                name = f"{split}-{len(splits[split]):05d}"
                shard = open_shards[split] = _Shard(beside, name, dtype, columns)
            shard.add(encoded)
            items.add(encoded.items)
            if shard.tokens >= tokens_per_shard:
                splits[split].append(open_shards.pop(split).finish())
        for split, shard in open_shards.items():
            splits[split].append(shard.finish())
        manifest = {
            "version": VERSION,
            "tokenizer": tokenizer.fingerprint,
            "vocabulary": tokenizer.vocabulary_size,
            "dtype": dtype.name,
            "columns": list(columns),
            "facts": facts or {},
            "read": {**counts, "named": refused},
            "splits": {split: _totals(beside, shards) for split, shards in splits.items()},
        }
        if items.index:
            sync(items.path)
            manifest["items"] = {"checksum": checksum(items.path), "index": items.index}
        write_json(beside / "manifest.json", {**manifest, "seal": fingerprint(manifest)})
    return manifest


def _totals(folder: Path, shards: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(int(np.fromfile(folder / f"{shard['name']}.bytes", "<u8").sum()) for shard in shards),
        "shards": shards,
    }


def marks(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """A number for each document that begins at one of `starts`: the same for the same, seldom for others."""
    sums = np.add.reduceat(tokens, starts, dtype=np.int64)
    return (sums << 24) ^ np.bitwise_xor.reduceat(tokens, starts).astype(np.int64)


class Shards:
    """One split of a folder of shards, every file of which is checked before the first token is read."""

    def __init__(
        self,
        folder: Path | str,
        split: str = "train",
        *,
        tokenizer: Tokenizer | None = None,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest = _manifest(self.folder)
        if tokenizer is not None and tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise TriviumError(
                f"{self.folder} was tokenised with another tokenizer (its vocabulary has "
                f"{self.manifest['vocabulary']} entries); make the corpus again with this one."
            )
        if split not in self.manifest["splits"]:
            raise TriviumError(
                f"{self.folder} has no split {split!r}, only {', '.join(self.manifest['splits'])}."
            )
        self._shards: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        if verify:
            self.verify()
        if "items" in self.manifest:
            LIBRARY.add_stored(self.folder / ITEMS, self.manifest["items"]["index"])
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._maps = [np.memmap(self._path(shard, ".bin"), dtype=dtype, mode="r") for shard in self._shards]
        ends = [np.fromfile(self._path(shard, ".idx"), "<u8").astype(np.int64) for shard in self._shards]
        self._starts = [np.concatenate([[0], end]) for end in ends]
        self._first = np.concatenate([[0], np.cumsum([len(end) for end in ends], dtype=np.int64)])
        self.lengths: np.ndarray = np.concatenate(
            [np.diff(start) for start in self._starts] or [np.zeros(0, dtype=np.int64)]
        )

    def _path(self, shard: dict[str, Any], ending: str) -> Path:
        return self.folder / f"{shard['name']}{ending}"

    def verify(self) -> None:
        """Compare every file with the manifest; a damaged one is named and nothing is read from it."""
        if "items" in self.manifest:
            path = self.folder / ITEMS
            if not path.is_file() or checksum(path) != self.manifest["items"]["checksum"]:
                raise TriviumError(f"{path} is damaged or gone; make the corpus again.")
        for shard in self._shards:
            for name, expected in shard["files"].items():
                path = self.folder / name
                if not path.is_file():
                    raise TriviumError(f"{path} is missing; make the corpus again.")
                size = path.stat().st_size
                if size != expected["size"]:
                    raise TriviumError(
                        f"{path} is damaged: it has {size} bytes instead of {expected['size']}; "
                        "make the corpus again."
                    )
                if checksum(path) != expected["checksum"]:
                    raise TriviumError(
                        f"{path} is damaged: it is not what was written; make the corpus again."
                    )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """How many tokens the split has."""
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Changes when any token of the split changes."""
        files = [shard["files"][f"{shard['name']}.bin"]["checksum"] for shard in self._shards]
        return hashlib.blake2b("".join(files).encode(), digest_size=8).hexdigest()

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    def tokens_of(self, index: int, start: int, end: int) -> np.ndarray:
        """Tokens `start` up to `end` of a document, or up to where it ends."""
        shard, inside = self._place(index)
        base = int(self._starts[shard][inside])
        last = min(base + end, int(self._starts[shard][inside + 1]))
        return self._maps[shard][base + start : last].astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        return self.tokens_of(index, 0, int(self.lengths[index]))

    def learned_of(self, index: int, start: int, end: int) -> np.ndarray | None:
        """Which tokens of a document are learned; None if its shard learns everything."""
        shard, inside = self._place(index)
        mask = self._masks[shard]
        if mask is None:
            return None
        base = int(self._starts[shard][inside])
        first, last = base + start, base + end
        bits = np.unpackbits(mask[first // 8 : (last + 7) // 8])
        return bits[first % 8 : first % 8 + last - first].astype(bool)

    @cached_property
    def _masks(self) -> list[np.ndarray | None]:
        return [
            np.memmap(self._path(shard, ".mask"), dtype=np.uint8, mode="r")
            if f"{shard['name']}.mask" in shard["files"]
            else None
            for shard in self._shards
        ]

    @cached_property
    def has_masks(self) -> bool:
        """Whether some shard learns only part of its tokens."""
        return any(mask is not None for mask in self._masks)

    @cached_property
    def learned_tokens(self) -> int:
        """How many tokens are predicted and learned: the first of a document is never predicted."""
        return sum(map(self._learned_in, range(len(self._shards))))

    def _learned_in(self, shard: int) -> int:
        first, mask = self._starts[shard][:-1], self._masks[shard]
        if mask is None:
            return int(self._starts[shard][-1]) - len(first)
        bits = np.unpackbits(mask, count=int(self._starts[shard][-1]))
        return int(bits.sum()) - int(bits[first].sum())

    @cached_property
    def marks(self) -> np.ndarray:
        found = [marks(tokens, start[:-1]) for tokens, start in zip(self._maps, self._starts, strict=True)]
        return np.concatenate(found or [np.zeros(0, dtype=np.int64)])

    @cached_property
    def bytes(self) -> np.ndarray:
        """The bytes of each document's text."""
        return self._per_document(".bytes", "<u8").astype(np.int64)

    def column(self, name: str) -> np.ndarray:
        """A number kept per document."""
        if name not in self.manifest["columns"]:
            kept = ", ".join(self.manifest["columns"]) or "none"
            raise TriviumError(f"{self.folder} keeps no column {name!r} (it keeps: {kept}).")
        return self._per_document(f".{name}.f4", "<f4")

    def _per_document(self, ending: str, dtype: str) -> np.ndarray:
        parts = [np.fromfile(self._path(shard, ending), dtype) for shard in self._shards]
        return np.concatenate(parts or [np.zeros(0, dtype=dtype)])

    @cached_property
    def _ids(self) -> list[list[str]]:
        return [self._path(shard, ".ids").read_text(encoding="utf-8").splitlines() for shard in self._shards]

    def id(self, index: int) -> str:
        """The id a document has had since it was read."""
        shard, inside = self._place(index)
        return json.loads(self._ids[shard][inside])


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise TriviumError(f"{folder} holds no manifest.json, so it is no finished corpus; make it again.")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise TriviumError(f"{path} is not of version {VERSION}; make the corpus again.")
    if manifest.pop("seal", None) != fingerprint(manifest):
        raise TriviumError(f"{path} is damaged: it is not what was written; make the corpus again.")
    return manifest
