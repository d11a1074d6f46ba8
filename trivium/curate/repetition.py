"""How much of a text repeats: lines, paragraphs and runs of words, after Rae et al. 2021 (Gopher)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trivium.curate.characters import Words


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


def top_gram(words: Words, size: int) -> np.ndarray:
    """Characters of all occurrences of the commonest run of `size` words, spaces included; [documents].

    Of runs that are equally common the first counts, as `Counter.most_common` has it.
    """
    found = np.zeros(words.count)
    hashes, places = words.grams(size)
    if not len(hashes):
        return found
    documents = words.documents[places]
    # Runs of different documents must not meet: the document goes into the hash.
    keys = hashes ^ (documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    characters = np.concatenate([[0], np.cumsum(words.lengths)])
    order = np.lexsort((first, -counts, documents[first]))
    _, leads = np.unique(documents[first][order], return_index=True)
    best = order[leads]
    start = places[first[best]]
    length = characters[start + size] - characters[start] + size - 1
    found[documents[first[best]]] = length * counts[best]
    return found


def repeated_grams(words: Words, size: int, among: np.ndarray) -> np.ndarray:
    """Characters in runs of `size` words that stood before, each character once; [documents].

    Only the documents where `among` is true are counted: a text without a repeated run of five words has
    none of six.
    """
    found = np.zeros(words.count)
    hashes, places = words.grams(size)
    documents = words.documents[places]
    lengths = np.concatenate([[0], np.cumsum(words.lengths)])
    edges = np.searchsorted(documents, np.arange(words.count + 1))
    for document in np.flatnonzero(among):
        runs = hashes[edges[document] : edges[document + 1]].tolist()
        start = int(words.first[document])
        seen: set[int] = set()
        place, total = 0, 0
        while place < len(runs):
            if runs[place] in seen:
                total += int(lengths[start + place + size] - lengths[start + place])
                place += size
            else:
                seen.add(runs[place])
                place += 1
        found[document] = total
    return found


def repeats_a_gram(words: Words, size: int) -> np.ndarray:
    """Whether a document holds any run of `size` words twice; [documents] of bool."""
    found = np.zeros(words.count, dtype=bool)
    hashes, places = words.grams(size)
    documents = words.documents[places]
    keys = hashes ^ (documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    ordered = np.sort(keys)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(twice):
        near = np.searchsorted(twice, keys).clip(max=len(twice) - 1)
        found[documents[twice[near] == keys]] = True
    return found
