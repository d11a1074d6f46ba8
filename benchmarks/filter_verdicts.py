"""Verdicts of the filters on the same documents: ours and datatrove's, and every document where they differ.

    /path/to/python-that-has-datatrove benchmarks/filter_verdicts.py documents.jsonl [--documents 5000]

Datatrove's filters run with our words in place of its own, so that what differs is a rule; `--own-words`
leaves it spaCy's words, which is slow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRESETS = ("gopher", "fineweb", "c4")
EXCERPT = 160


def ours(texts: list[str], preset: str) -> list[str | None]:
    """Why each document is left out, or None."""
    import pyarrow as arrow

    from trivium.curate.batch import batches
    from trivium.curate.step import parse_steps

    [step] = parse_steps([{"filters": preset}])
    columns = {"id": [""] * len(texts), "source": [""] * len(texts)}
    table = arrow.table({**columns, "text": arrow.array(texts, arrow.large_string())})
    return [reason for batch in batches(table) for reason in step.run(batch).reasons]


def with_our_words(*modules) -> None:
    """Have datatrove's modules count the words that we count."""
    from trivium.curate.characters import Characters

    def words(text: str, language: str = "") -> list[str]:
        found = Characters([text]).words
        return [text[start:end] for start, end in zip(found.starts.tolist(), found.ends.tolist())]

    for module in modules:
        module.split_into_words = words


def datatrove(texts: list[str], preset: str, own_words: bool) -> list[str | None]:
    """The same by datatrove."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter
    from datatrove.pipeline.filters import gopher_quality_filter as quality
    from datatrove.pipeline.filters import gopher_repetition_filter as repetition

    if not own_words:
        with_our_words(quality, repetition, fineweb_quality_filter)
    filters = {
        "gopher": [quality.GopherQualityFilter(), repetition.GopherRepetitionFilter()],
        "fineweb": [fineweb_quality_filter.FineWebQualityFilter()],
        "c4": [c4_filters.C4QualityFilter()],
    }[preset]

    def verdict(text: str) -> str | None:
        for one in filters:
            found = one.filter(Document(text=text, id=""))
            if found is not True:
                return str(found[1]) if isinstance(found, tuple) else "left out"
        return None

    return [verdict(text) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents")
    parser.add_argument("--documents", dest="count", type=int, default=5000)
    parser.add_argument("--own-words", action="store_true")
    wanted = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with open(wanted.documents, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(wanted.count), file)]
    for preset in PRESETS:
        one, other = ours(texts, preset), datatrove(texts, preset, wanted.own_words)
        kept = [sum(reason is None for reason in some) for some in (one, other)]
        differ = [at for at, both in enumerate(zip(one, other)) if (both[0] is None) != (both[1] is None)]
        print(
            f"{preset}: of {len(texts)} we keep {kept[0]}, datatrove {kept[1]}, {len(differ)} verdicts differ"
        )
        why = Counter(f"{(one[at] or 'kept').partition(':')[0]} / {other[at] or 'kept'}" for at in differ)
        for pair, count in why.most_common():
            print(f"  {pair}: {count}")
        for at in differ:
            print(f"    {at}: {one[at] or 'kept'} / {other[at] or 'kept'}: {texts[at][:EXCERPT]!r}")


if __name__ == "__main__":
    main()
