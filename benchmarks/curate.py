"""Filters, MinHash and tokenising of the same documents, here and by datatrove: MB/s of a core, peak memory.

    python benchmarks/curate.py documents.jsonl [--with /path/to/python-that-has-datatrove]

Each job runs in a process of its own on one core; `ours x10` reads the same input ten times over. Datatrove's
filters run with its own word tokeniser, and with ours in its place, which tells that tokeniser's share.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOBS = ("ours", "ours x10", "datatrove", "datatrove, same words")
VOCABULARY = 8192


def texts_of(path: str, times: int):
    for repeat in range(times):
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file):
                yield f"{repeat}-{number}", json.loads(line)["text"]


def ours(path: str, tokenizer: str, times: int) -> dict[str, float]:
    import pyarrow as arrow
    from tokenizers import Tokenizer

    from trivium.curate.batch import batches
    from trivium.curate.step import parse_steps

    gopher, near = parse_steps([{"filters": "gopher"}, {"deduplicate": "minhash"}])
    encoder = Tokenizer.from_file(tokenizer)
    seconds, kept = dict.fromkeys(("filters", "minhash", "tokenise"), 0.0), 0

    def work(rows: list[tuple[str, str]]) -> int:
        ids, texts = zip(*rows)
        content = {"id": ids, "source": [""] * len(ids), "text": arrow.array(texts, arrow.large_string())}
        left = 0
        for batch in batches(arrow.table({**content, "copies": [1] * len(ids)})):
            start = time.process_time()
            reasons = gopher.run(batch).reasons
            middle = time.process_time()
            seconds["filters"] += middle - start
            near.keys(batch)
            end = time.process_time()
            seconds["minhash"] += end - middle
            good = [text for text, reason in zip(batch.texts, reasons) if reason is None]
            encoder.encode_batch_fast(good)
            seconds["tokenise"] += time.process_time() - end
            left += len(good)
        return left

    rows: list[tuple[str, str]] = []
    for row in texts_of(path, times):
        rows.append(row)
        if len(rows) == 256:
            kept += work(rows)
            rows = []
    kept += work(rows) if rows else 0
    return {**seconds, "kept": kept}


def datatrove(path: str, tokenizer: str, same_words: bool) -> dict[str, float]:
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter
    from tokenizers import Tokenizer

    if same_words:
        from trivium.curate.characters import Characters

        def words(text: str, language: str = "") -> list[str]:
            found = Characters([text]).words
            return [text[start:end] for start, end in zip(found.starts.tolist(), found.ends.tolist())]

        gopher_quality_filter.split_into_words = gopher_repetition_filter.split_into_words = words
    filters = [gopher_quality_filter.GopherQualityFilter(), gopher_repetition_filter.GopherRepetitionFilter()]
    signer = MinhashDedupSignature(output_folder=tempfile.mkdtemp(), config=MinhashConfig())
    encoder = Tokenizer.from_file(tokenizer)
    seconds, kept = dict.fromkeys(("filters", "minhash", "tokenise"), 0.0), 0
    for name, text in texts_of(path, 1):
        start = time.process_time()
        good = all(one.filter(Document(text=text, id=name)) is True for one in filters)
        middle = time.process_time()
        seconds["filters"] += middle - start
        shingles = signer.get_shingles(text)
        if shingles.size:
            signer.get_signature(shingles)
        end = time.process_time()
        seconds["minhash"] += end - middle
        if good:
            encoder.encode_batch_fast([text])
            kept += 1
        seconds["tokenise"] += time.process_time() - end
    return {**seconds, "kept": kept}


class _WithoutPandas:
    def find_spec(self, name, path=None, target=None):
        if name == "pandas":
            raise ImportError(name)


def one(job: str, path: str, tokenizer: str) -> None:
    """Run one job and print what it took."""
    sys.path.insert(0, str(ROOT))
    # Arrow imports pandas where it is installed; neither job uses it, and it takes 40 MB.
    sys.meta_path.insert(0, _WithoutPandas())
    times = 10 if job.endswith("x10") else 1
    start = time.process_time()
    found = (
        ours(path, tokenizer, times)
        if job.startswith("ours")
        else datatrove(path, tokenizer, job.endswith("same words"))
    )
    total = time.process_time() - start
    size = sum(len(text.encode()) for _, text in texts_of(path, 1)) * times / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"job": job, "MB": round(size, 1), "kept": found.pop("kept"), "peak_MB": round(peak),
                      "MB_per_second": round(size / total, 2),
                      **{name: round(size / value, 1) for name, value in found.items()}}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents")
    parser.add_argument("--with", dest="python", default=sys.executable, help="a Python that has datatrove")
    parser.add_argument("--jobs", nargs="*", default=JOBS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        one(wanted.one, wanted.documents, wanted.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "tokenizer.json")
        make = (
            "import sys; from tokenizers import Tokenizer, models, trainers, pre_tokenizers, decoders\n"
            "import json; t = Tokenizer(models.BPE()); t.pre_tokenizer = pre_tokenizers.ByteLevel()\n"
            "texts = [json.loads(line)['text'][:4000] for _, line in zip(range(500), open(sys.argv[1]))]\n"
            f"trainer = trainers.BpeTrainer(vocab_size={VOCABULARY}, show_progress=False)\n"
            "t.train_from_iterator(texts, trainer)\n"
            "t.save(sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", make, wanted.documents, str(place)], check=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        for job in wanted.jobs:
            python = sys.executable if job.startswith("ours") else wanted.python
            command = [python, __file__, wanted.documents, "--one", job, "--tokenizer", str(place)]
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
