"""Clusters of near copies among the same documents: ours, datatrove's, and where they differ, exact Jaccard.

    /path/to/python-that-has-datatrove benchmarks/near_copies.py documents.jsonl [--documents 5000]

Datatrove believes every pair that agrees in a band; ours compares the whole signatures first. So ours runs
twice: with the check off, as datatrove works, and with it. Pairs in one cluster by one of the two alone are
counted by their exact similarity, over our words; some are printed with that over datatrove's as well.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[1]
BANDS, ROWS, SHINGLE = 14, 8, 5
SHOWN, MOST = 8, 20_000


def texts_of(path: str, count: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for _, line in zip(range(count), file)]


def ours(texts: list[str], threshold: float) -> dict[int, int]:
    """The cluster of every document that has a near copy."""
    import pyarrow.parquet as parquet

    from trivium.curate.curation import Curation
    from trivium.curate.step import parse_steps
    from trivium.data.sources import Source

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"text": text, "place": place}) + "\n" for place, text in enumerate(texts)]
        (folder / "texts.jsonl").write_text("".join(lines))
        step = {"method": "minhash", "threshold": threshold, "bands": BANDS, "rows": ROWS, "shingle": SHINGLE}
        Curation(
            steps=parse_steps([{"deduplicate": step}]),
            sources=[("texts", Source(path=str(folder / "texts.jsonl")))],
            scratch=folder / "work", kept=folder / "kept", dropped=folder / "dropped",
            funnel=folder / "funnel.json",
        ).run()  # fmt: skip
        found: dict[int, int] = {}
        for path in sorted((folder / "dropped").glob("*.parquet")):
            for row in parquet.read_table(path).to_pylist():
                if row["step"].startswith("deduplicate"):
                    kept = place_of(row["reason"].removeprefix("near copy: of "))
                    found[place_of(row["id"])] = found[kept] = kept
        return found


def place_of(name: str) -> int:
    """The document behind an id, which ends in the number of its line."""
    return int(name.rpartition(":")[2]) - 1


def datatrove(texts: list[str]) -> tuple[dict[int, int], list[set[int]]]:
    """The same by datatrove, and the shingles of every document."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )

    config = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as name:
        signer = MinhashDedupSignature(output_folder=f"{name}/signatures", config=config)
        signer.run(iter(Document(text=text, id=str(place)) for place, text in enumerate(texts)), 0, 1)
        buckets = MinhashDedupBuckets(f"{name}/signatures", f"{name}/buckets", config=config)
        for rank in range(BANDS):
            buckets.run(None, rank, BANDS)
        MinhashDedupCluster(f"{name}/buckets", f"{name}/clusters", config, save_cluster_id=True).run(
            None, 0, 1
        )
        content = Path(f"{name}/clusters/000000.clusters").read_bytes()
    shingles = [set(signer.get_shingles(text).ravel().tolist()) for text in texts]
    return dict(struct.iter_unpack("<2I", content)), shingles


def own_shingles(texts: list[str]) -> list[set[int]]:
    """The shingles of every document by our words."""
    from trivium.curate.characters import Characters

    found = []
    for text in texts:
        hashes, _ = Characters([text]).folded_words(True).grams(SHINGLE)
        found.append(set(hashes.tolist()))
    return found


def pairs_of(clusters: dict[int, int]) -> set[tuple[int, int]]:
    members = defaultdict(list)
    for place, cluster in clusters.items():
        members[cluster].append(place)
    return {pair for some in members.values() for pair in combinations(sorted(some), 2)}


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / max(len(one | other), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts")
    parser.add_argument("--documents", type=int, default=5000)
    wanted = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    texts = texts_of(wanted.texts, wanted.documents)
    theirs, shingles = datatrove(texts)
    mine = own_shingles(texts)
    print(f"{len(texts)} documents; datatrove: {len(theirs)} in {len(set(theirs.values()))} clusters")
    for threshold in (1e-9, 0.75):
        clusters = ours(texts, threshold)
        one, other = pairs_of(clusters), pairs_of(theirs)
        print(f"ours, threshold {threshold:g}: {len(clusters)} in {len(set(clusters.values()))} clusters")
        print(f"  pairs: {len(one & other)} by both, {len(one - other)} and {len(other - one)} by one alone")
        for name, some in (("ours", one - other), ("datatrove", other - one)):
            chosen = sorted(some)[:MOST]
            similar = [jaccard(mine[first], mine[second]) for first, second in chosen]
            table = Counter(int(value * 10) / 10 for value in similar)
            print(f"  by {name} alone, by similarity: {dict(sorted(table.items()))}")
            for (first, second), value in list(zip(chosen, similar))[:SHOWN]:
                print(f"    {first} {second}: {value:.2f}, {jaccard(shingles[first], shingles[second]):.2f}")


if __name__ == "__main__":
    main()
