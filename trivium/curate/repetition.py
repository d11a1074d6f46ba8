"""How much of a text repeats: lines, paragraphs and runs of words, after Rae et al. 2021 (Gopher)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from trivium.curate.characters import Words

_APART = np.uint64(0x9E3779B97F4A7C15)


def repeated(parts: Sequence[str]) -> tuple[float, int]:
    """The share of parts that stood before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        else:
            seen.add(part)
    return count / max(len(parts), 1), characters


def _twice(words: Words, hashes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which runs stand in their document more than once (a mask), and hashes that tell documents apart."""
    keys = hashes ^ (words.documents[places].astype(np.uint64) * _APART)
    # Sorting values alone is many times faster than sorting places by them.
    ordered = np.sort(keys)
    values = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(values):
        return np.zeros(len(keys), dtype=bool), keys
    near = np.searchsorted(values, keys).clip(max=len(values) - 1)
    return values[near] == keys, keys


def top_gram(words: Words, size: int) -> np.ndarray:
    """Characters of all occurrences of the commonest run of `size` words, spaces included; [documents].

    Of runs that are equally common the first counts, as `Counter.most_common` has it.
    """
    found = np.zeros(words.count)
    hashes, places = words.grams(size)
    if not len(hashes):
        return found
    characters = words.characters
    # Where no run stands twice, the first one is the commonest.
    documents, first = np.unique(words.documents[places], return_index=True)
    start = places[first]
    found[documents] = characters[start + size] - characters[start] + size - 1
    twice, keys = _twice(words, hashes, places)
    keys, places = keys[twice], places[twice]
    if not len(keys):
        return found
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    documents = words.documents[places[first]]
    order = np.lexsort((first, -counts, documents))
    leading, leads = np.unique(documents[order], return_index=True)
    best = order[leads]
    start = places[first[best]]
    found[leading] = (characters[start + size] - characters[start] + size - 1) * counts[best]
    return found


def repeated_grams(words: Words, sizes: Iterable[int]) -> dict[int, np.ndarray]:
    """For each size, characters in runs of so many words that stood before, each once; [documents].

    A text is read from its start: a run that stood before is counted and passed over as a whole. A run can
    only stand twice where the shorter run that begins it does, so that each size looks at few places.
    """
    found: dict[int, np.ndarray] = {}
    places: np.ndarray | None = None
    for size in sorted(sizes):
        if places is None:
            hashes, places = words.grams(size)
        else:
            hashes, places = words.grams_at(places, size)
        twice, keys = _twice(words, hashes, places)
        places = places[twice]
        found[size] = _in_passing(words, size, keys[twice], places)
    return found


def _in_passing(words: Words, size: int, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    total = np.zeros(words.count)
    characters, documents = words.characters, words.documents
    seen: set[int] = set()
    free = -1
    for key, place in zip(keys.tolist(), places.tolist()):
        if place < free:
            continue
        if key in seen:
            total[documents[place]] += characters[place + size] - characters[place]
            free = place + size
        else:
            seen.add(key)
    return total
