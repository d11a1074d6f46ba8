"""Equal time, which model reads better: Trivium's defaults beside a tuned AdamW of transformers, in one run.

python benchmarks/time_to_quality.py --data FOLDER        # holds tinyshakespeare.txt and wikitext2_valid.txt
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import Worker, peer_python

from trivium.tokens.train import train_tokenizer

SHAPE = {
    "layers": 4, "width": 256, "heads": 4, "inner": 768, "vocabulary": 1024, "context": 256, "rows": 16,
    "micro": 4, "tokens_per_second": 6000,
}  # fmt: skip
FILES = ("tinyshakespeare.txt", "wikitext2_valid.txt")
HELD_OUT = 50_000
RATES = (1e-3, 2e-3, 4e-3)


def prepare(data: Path, folder: Path) -> Path:
    """Split each text, train the vocabulary on what is learned, and tokenise both parts."""
    texts = [(data / name).read_text(encoding="utf-8") for name in FILES]
    learned, unseen = [text[:-HELD_OUT] for text in texts], [text[-HELD_OUT:] for text in texts]
    tokenizer = train_tokenizer(learned, SHAPE["vocabulary"])
    path = folder / "texts.npz"
    np.savez(
        path,
        train=np.concatenate([np.array(ids, dtype=np.uint16) for ids in tokenizer.encode_batch(learned)]),
        unseen=np.concatenate([np.array(ids, dtype=np.uint16) for ids in tokenizer.encode_batch(unseen)]),
        byte_lengths=tokenizer.byte_lengths(),
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--also-bfloat16", action="store_true", help="Trivium with bfloat16 products as well")
    arguments = parser.parse_args()
    peers = peer_python("transformers")
    contestants: list[tuple[str, str, dict]] = [
        (f"transformers, AdamW at {rate:g}", peers, {"contestant": "transformers", "rate": rate})
        for rate in RATES
    ]
    contestants.append(("trivium", sys.executable, {"contestant": "trivium", "precision": "float32"}))
    if arguments.also_bfloat16:
        name = "trivium, bfloat16 products"
        contestants.append((name, sys.executable, {"contestant": "trivium", "precision": "bfloat16"}))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = prepare(arguments.data, Path(folder))
        for name, python, settings in contestants:
            common = {"shape": SHAPE, "threads": arguments.threads, "texts": str(texts)}
            worker = Worker(python, "quality_worker.py", {**common, **settings})
            results[name] = worker.ask(seconds=arguments.seconds)
            worker.close()
            row = results[name]
            print(
                f"{name:32s} {row['bits_per_byte']:.3f} bits per byte after {row['tokens']} tokens",
                flush=True,
            )
    tuned = min(row["bits_per_byte"] for name, row in results.items() if name.startswith("transformers"))
    gain = tuned - results["trivium"]["bits_per_byte"]
    print(f"trivium's gain over the best AdamW in {arguments.seconds:g} s of steps: {gain:.3f} bits per byte")


if __name__ == "__main__":
    main()
