"""Deduplicate: whole documents that are equal or nearly so, and lines or passages that stand in many."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from pydantic import Field

from trivium.curate.batch import Batch, Outcome
from trivium.curate.engines import Workers
from trivium.curate.keys import hash64, joined, load, sizes, split_by_shard
from trivium.curate.minhash import band_keys, find_clusters, probability, signatures
from trivium.curate.step import Decision, Keys, Step, WholeStep

_NONE = np.iinfo(np.int64).max


class Deduplicate(WholeStep):
    """Remove what stands in the corpus more than once."""

    name: ClassVar[str] = "deduplicate"
    short: ClassVar[str] = "method"
    methods: ClassVar[dict[str, type[Deduplicate]]] = {}

    method: str = "exact"

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "way" in vars(cls):
            Deduplicate.methods[vars(cls)["way"]] = cls

    @classmethod
    def variant(cls, written: Mapping[str, Any]) -> type[Step]:
        method = written.get("method", "exact")
        if method not in cls.methods:
            raise ValueError(f"`deduplicate` has no method {method!r}; methods are {', '.join(cls.methods)}")
        return cls.methods[method]

    @property
    def title(self) -> str:
        return f"deduplicate {self.method}"


class _Documents(Deduplicate):
    """Whole documents: of every cluster the best copy is kept."""

    within: Literal["all", "source"] = "all"
    """Whether copies in other sources count."""
    best: str | None = None
    """A numeric column: the copy with the highest value is kept. Otherwise the first (exact) or longest."""
    weight: Literal["none", "log", "count"] = "none"
    """A column `weight` of what is kept: how often it stood there, or 1 + log2 of that."""

    def columns(self) -> dict[str, arrow.DataType]:
        weight = {} if self.weight == "none" else {"weight": arrow.float32()}
        return {"copies": arrow.int32(), **weight}

    def run(self, batch: Batch) -> Outcome:
        # An earlier step of this kind has counted already.
        missing = {
            name: kind for name, kind in self.columns().items() if name not in batch.records.schema.names
        }
        one = arrow.array(np.ones(batch.size, dtype=np.int32))
        return Outcome(columns={name: one.cast(kind) for name, kind in missing.items()})

    def keys(self, batch: Batch) -> Keys:
        found: Keys = {
            "length": batch.characters.lengths,
            "copies": batch.numbers("copies").astype(np.int32),
        }
        if self.best is not None:
            found["score"] = batch.numbers(self.best)
        return found

    def _source_salt(self, batch: Batch) -> list[bytes]:
        return [one.encode() if self.within == "source" else b"" for one in batch.sources]

    def _keep_best(
        self, shards: Sequence[Path], to: Path, members: np.ndarray, roots: np.ndarray, longest: bool
    ) -> dict[str, Any]:
        """Write for every document which one is kept in its place, and how many copies the kept one had."""
        count = sum(sizes(shards))
        # The document kept in place of this one; none where it stays.
        instead = np.full(count, _NONE, dtype=np.int64)
        copies = joined(shards, "copies").astype(np.int32)
        clusters = 0
        if len(members):
            length = joined(shards, "length")[members] if longest else np.zeros(len(members))
            score = np.nan_to_num(joined(shards, "score")[members], nan=-np.inf) if self.best else length
            order = np.lexsort((members, -length, -score, roots))
            leads = np.flatnonzero(np.concatenate([[True], roots[order][1:] != roots[order][:-1]]))
            clusters = len(leads)
            group = np.cumsum(np.isin(np.arange(len(order)), leads)) - 1
            kept = members[order][leads]
            total = np.bincount(group, weights=copies[members[order]]).astype(np.int32)
            copies[kept] = total
            instead[members[order]] = kept[group]
            instead[kept] = _NONE
        split_by_shard(shards, to, copies=copies, instead=instead)
        _write_names(shards, to, instead)
        return {"clusters": clusters, "copies removed": int((instead != _NONE).sum())}

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        instead, copies = decision.of(batch, "instead"), decision.of(batch, "copies")
        names = _names(decision.folder / f"{decision.shard:05d}.names.parquet")
        rule = "copy" if self.method == "exact" else "near copy"
        reasons = [None if one == _NONE else f"{rule}: of {names[int(one)]}" for one in instead]
        columns: dict[str, arrow.Array] = {"copies": arrow.array(np.asarray(copies))}
        if self.weight != "none":
            weight = copies if self.weight == "count" else 1 + np.log2(copies)
            columns["weight"] = arrow.array(np.asarray(weight, dtype=np.float32))
        return Outcome(reasons, columns=columns)


def _write_names(shards: Sequence[Path], to: Path, instead: np.ndarray) -> None:
    """For every shard, the ids of the documents that are kept in place of some of its own."""
    starts = np.concatenate([[0], np.cumsum(sizes(shards))])
    wanted = np.unique(instead[instead != _NONE])
    ids: dict[int, str] = {}
    for number, shard in enumerate(shards):
        mine = wanted[(wanted >= starts[number]) & (wanted < starts[number + 1])]
        if len(mine):
            column = parquet.read_table(shard.with_suffix(".kept.parquet"), columns=["id"]).column("id")
            ids.update(zip(mine.tolist(), column.take(arrow.array(mine - starts[number])).to_pylist()))
    for number in range(len(shards)):
        mine = instead[starts[number] : starts[number + 1]]
        named = np.unique(mine[mine != _NONE]).tolist()
        table = arrow.table(
            {"document": arrow.array(named, arrow.int64()), "id": [ids[one] for one in named]}
        )
        parquet.write_table(table, to / f"{number:05d}.names.parquet")


def _names(path: Path) -> dict[int, str]:
    table = parquet.read_table(path)
    return dict(zip(table.column("document").to_pylist(), table.column("id").to_pylist()))


class ExactDocuments(_Documents):
    """Documents with the same text."""

    way: ClassVar[str] = "exact"
    method: Literal["exact"] = "exact"
    words_only: bool = False
    """Compare the words alone, in lower case and without accents or signs."""

    def keys(self, batch: Batch) -> Keys:
        if self.words_only:
            words = batch.characters.folded_words(False)
            parts = [words.hashes[a:b].tobytes() for a, b in zip(words.first[:-1], words.first[1:])]
        else:
            parts = [text.encode("utf-8", "surrogatepass") for text in batch.texts]
        salts = self._source_salt(batch)
        digests = b"".join(
            hashlib.blake2b(part, digest_size=16, key=hashlib.blake2b(salt).digest()).digest()
            for part, salt in zip(parts, salts)
        )
        return {"text": np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2), **super().keys(batch)}

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        pairs = workers.grouped(shards, "text", _copies).astype(np.int64)
        return self._keep_best(shards, to, pairs[:, 0], pairs[:, 1], longest=False)


def _copies(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Every document that has a copy, and the first of them, [documents, 2]."""
    order = np.lexsort((places, keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    several = ~(new & np.append(new[1:], True)[: len(new)])
    return places[np.stack([order, order[first]], axis=1)[several]]


class NearDocuments(_Documents):
    """Documents whose shingles overlap: MinHash, locality-sensitive hashing, and a check of every pair."""

    way: ClassVar[str] = "minhash"
    method: Literal["minhash"] = "minhash"
    threshold: float = Field(default=0.75, gt=0, le=1)
    """The least estimated Jaccard similarity of a copy; candidates below it stay."""
    bands: int = Field(default=14, ge=1, le=1024)
    """Bands of the signature; two documents that agree in one are compared."""
    rows: int = Field(default=8, ge=1, le=64)
    """Values a band."""
    shingle: int = Field(default=5, ge=1, le=64)
    """Words a shingle."""
    digits: Literal["same", "as written"] = "same"
    """Whether all digits count as the same one, so that pages that differ in a date are copies."""

    def keys(self, batch: Batch) -> Keys:
        words = batch.characters.folded_words(self.digits == "same")
        signature, has_words = signatures(words, self.shingle, self.bands * self.rows)
        bands = band_keys(signature, self.bands, self.rows)
        if self.within == "source":
            salts = [hash64(one) for one in self._source_salt(batch)]
            bands ^= np.array(salts, dtype=np.uint64)[None, :]
        return {"signature": signature, "bands": bands.T, "has_words": has_words, **super().keys(batch)}

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        clusters, candidates = find_clusters(shards, self.bands, self.threshold, workers)
        members, roots = clusters.members()
        facts = self._keep_best(shards, to, members, roots, longest=True)
        expected = {f"{one:g}": round(probability(one, self.bands, self.rows), 3)
                    for one in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)}  # fmt: skip
        return {
            **facts,
            "pairs that agree in a band": candidates,
            "found at similarity": expected,
        }


class Lines(Deduplicate):
    """Lines that stand in many documents, such as menus and notices: all but the first are cut out."""

    way: ClassVar[str] = "lines"
    method: Literal["lines"] = "lines"
    most: int = Field(default=3, ge=1)
    """In how many places a line may stand before its repeats are cut."""
    characters: int = Field(default=20, ge=1)
    """Shorter lines are left alone."""
    loses: float = Field(default=0.8, gt=0, le=1)
    """A document that would lose more than this share of its text is left out."""

    def keys(self, batch: Batch) -> Keys:
        hashes = [_line_hash(line) for text in batch.texts for line in _long(text, self.characters)]
        return {"lines": np.array(hashes, dtype=np.uint64)}

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        return {"repeated lines": _decide_places(shards, "lines", self.most, to, workers)}

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        known = _known_lines(decision.folder)
        place = decision.seen
        texts: list[str] = []
        reasons: list[str | None] = []
        cut: Counter[str] = Counter()
        for text in batch.texts:
            kept = []
            for line in text.split("\n"):
                if len(line.strip()) >= self.characters:
                    found = known.get(_line_hash(line.strip()))
                    place += 1
                    if found is not None and found != (decision.shard, place - 1):
                        cut[line.strip()[:200]] += 1
                        continue
                kept.append(line)
            left = "\n".join(kept).strip()
            lost = 1 - len(left) / max(len(text), 1)
            reasons.append(
                None if lost <= self.loses and left
                else f"repeated lines: {100 * lost:.0f} % of it are lines that stand elsewhere"
            )  # fmt: skip
            texts.append(left if reasons[-1] is None else text)
        decision.seen = place
        return Outcome(reasons, texts, notes={f"line: {line}": count for line, count in cut.items()})


def _long(text: str, least: int) -> list[str]:
    return [one for line in text.split("\n") if len(one := line.strip()) >= least]


def _line_hash(line: str) -> int:
    return hash64(line.encode("utf-8", "surrogatepass"))


class Passages(Deduplicate):
    """Runs of words that stand elsewhere, too (Lee et al. 2022): all but the first are cut out."""

    way: ClassVar[str] = "substrings"
    method: Literal["substrings"] = "substrings"
    words: int = Field(default=50, ge=5)
    """The length of a run that counts as repeated."""
    loses: float = Field(default=0.8, gt=0, le=1)
    """A document that would lose more than this share of its text is left out."""

    def keys(self, batch: Batch) -> Keys:
        hashes, _ = batch.characters.words.grams(self.words)
        return {"runs": hashes}

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        return {"repeated runs": _decide_places(shards, "runs", 1, to, workers)}

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        repeated = np.load(decision.folder / "repeated.npy", mmap_mode="r")
        first = np.load(decision.folder / "first.npy", mmap_mode="r")
        words = batch.characters.words
        hashes, places = words.grams(self.words)
        ordinal = decision.seen + np.arange(len(hashes))
        decision.seen += len(hashes)
        if not len(repeated) or not len(hashes):
            return Outcome()
        at = np.searchsorted(repeated, hashes).clip(max=len(repeated) - 1)
        again = (repeated[at] == hashes) & ~((first[at, 0] == decision.shard) & (first[at, 1] == ordinal))
        cut = np.zeros(len(batch.characters.codes), dtype=bool)
        for place in places[again]:
            cut[words.starts[place] : words.ends[place + self.words - 1]] = True
        texts, reasons, count = [], [], 0
        for text, start in zip(batch.texts, batch.characters.starts):
            mine = cut[start : start + len(text)]
            lost = float(mine.mean()) if len(text) else 0.0
            count += bool(lost)
            left = "".join(np.array(list(text))[~mine]).strip() if lost else text
            fails = lost > self.loses or not left
            reasons.append(f"repeated passages: {100 * lost:.0f} % of it stands elsewhere" if fails else None)
            texts.append(text if fails else left)
        return Outcome(reasons, texts, notes={"texts cut": count})


@lru_cache(2)
def _known_lines(folder: Path) -> dict[int, tuple[int, int]]:
    """For the hash of every repeated line, the shard and the number of its first place."""
    places = np.load(folder / "first.npy").tolist()
    return dict(zip(np.load(folder / "repeated.npy").tolist(), map(tuple, places)))


def _decide_places(shards: Sequence[Path], name: str, most: int, to: Path, workers: Workers) -> int:
    """Write the hashes that occur more than `most` times, and where each stands first: shard and number."""
    found = workers.grouped(shards, name, partial(_often, most))
    repeated, place = found[np.argsort(found[:, 0])].T
    starts = np.cumsum([0, *(len(load(shard, name)) for shard in shards)])
    shard = np.searchsorted(starts, place.astype(np.int64), side="right") - 1
    np.save(to / "repeated.npy", repeated)
    np.save(to / "first.npy", np.stack([shard, place.astype(np.int64) - starts[shard]], axis=1))
    return len(repeated)


def _often(most: int, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The keys that stand more than `most` times, and the first place of each, [keys, 2]."""
    values, first, counts = np.unique(keys[:, 0], return_index=True, return_counts=True)
    often = counts > most
    return np.stack([values[often], places[first[often]].astype(np.uint64)], axis=1)
