"""One contestant of `eval.py`: opens the folder and scores all choices of all questions when told to."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

Score = Callable[[list[dict]], list[float]]


def trivium_score(folder: str) -> tuple[Score, str]:
    """Trivium's evaluation room, through the same call as its tasks."""
    import torch

    from trivium.evals.asking import Item, Subject
    from trivium.model.folder import load_model
    from trivium.tokens.tokenizer import Tokenizer

    subject = Subject(load_model(Path(folder), dtype=torch.float32), Tokenizer.load(Path(folder)))

    def score(questions: list[dict]) -> list[float]:
        items = [
            Item(str(number), one["prompt"], [], "", lambda text: {}, tuple(one["choices"]))
            for number, one in enumerate(questions)
        ]
        return [one.total for found in subject.choose(items, "continue") for one in found]

    return score, ""


def lm_eval_score(folder: str) -> tuple[Score, str]:
    """lm-evaluation-harness's `hf` backend, at the batch size that makes it fastest here."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=16, max_length=1024)

    def score(questions: list[dict]) -> list[float]:
        asked = [
            Instance("loglikelihood", {}, (one["prompt"], f" {choice}"), number)
            for number, one in enumerate(questions)
            for choice in one["choices"]
        ]
        return [total for total, _ in model.loglikelihood(asked, disable_tqdm=True)]

    sample = json.loads((Path(folder) / "questions.json").read_text())[:100]
    timings = {}
    for size in (8, 32, 128):
        model.batch_size_per_gpu = size
        score(sample)
        start = time.perf_counter()
        score(sample)
        timings[size] = time.perf_counter() - start
    model.batch_size_per_gpu = min(timings, key=lambda size: timings[size])
    return score, f"batches of {model.batch_size_per_gpu}"


def main() -> None:
    arguments = json.loads(sys.argv[1])
    # Only answers belong on the standard output.
    with contextlib.redirect_stdout(sys.stderr):
        import torch

        torch.set_num_threads(arguments["threads"])
        make = {"trivium": trivium_score, "lm_eval": lm_eval_score}[arguments["contestant"]]
        score, about = make(arguments["folder"])
        questions = json.loads((Path(arguments["folder"]) / "questions.json").read_text())
        score(questions[:50])
    print("ANSWER " + json.dumps({"about": about}), flush=True)
    for _ in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            start = time.perf_counter()
            totals = score(questions)
            seconds = time.perf_counter() - start
        print("ANSWER " + json.dumps({"seconds": seconds, "totals": totals}), flush=True)


if __name__ == "__main__":
    main()
