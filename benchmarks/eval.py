"""Log-likelihoods of 1,000 four-choice questions: Trivium beside lm-evaluation-harness, in turns, in one run.

python benchmarks/eval.py                # without examples and with three before each question
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from peers import Worker, peer_python, take_turns


def write_model(folder: Path, questions: list[dict]) -> None:
    """A random model of about 5 million parameters with a tokenizer for these questions, as a folder."""
    import torch

    from trivium.model.config import ModelConfig
    from trivium.model.folder import save_model
    from trivium.model.transformer import Transformer
    from trivium.tokens.train import train_tokenizer

    tokenizer = train_tokenizer([one["prompt"] + " " + " ".join(one["choices"]) for one in questions], 4096)
    torch.manual_seed(0)
    config = ModelConfig(
        family="qwen3", vocabulary=4096, width=256, layers=4, heads=4, key_value_heads=4, head_width=64,
        inner_width=768, context=1024, query_key_norm="head",
        rope={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    save_model(model, folder)
    tokenizer.save(folder)


def questions_of(count: int, shots: int) -> list[dict]:
    """Questions on the country's people, all after the same worked examples, as harnesses ask them."""
    from trivium import world

    examples = "".join(
        f"Question: {one.question}\nAnswer: {one.answer}\n\n"
        for one in world.questions("facts", "validation", limit=shots)
    )
    return [
        {"prompt": f"{examples}Question: {one.question}\nAnswer:", "choices": list(one.choices)}
        for one in world.questions("facts", "train", limit=count, people=600)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    peers = peer_python("lm-eval", "transformers", "accelerate")
    for shots in (0, 3):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            questions = questions_of(arguments.questions, shots)
            assert len(questions) == arguments.questions
            (folder / "questions.json").write_text(json.dumps(questions))
            write_model(folder, questions)
            given = {"folder": str(folder), "threads": arguments.threads}
            workers = {
                "trivium": Worker(sys.executable, "eval_worker.py", {**given, "contestant": "trivium"}),
                "lm-eval": Worker(peers, "eval_worker.py", {**given, "contestant": "lm_eval"}),
            }
            answers = take_turns(workers, arguments.rounds)
            facts = {who: worker.ready for who, worker in workers.items()}
            for worker in workers.values():
                worker.close()
        apart = max(
            abs(one - other)
            for one, other in zip(
                answers["trivium"][0]["totals"], answers["lm-eval"][0]["totals"], strict=True
            )
        )
        print(f"\n{arguments.questions} four-choice questions after {shots} examples; "
              f"largest difference of a log-likelihood: {apart:.1e}")  # fmt: skip
        seconds = {who: statistics.median(row["seconds"] for row in rows) for who, rows in answers.items()}
        for who, taken in seconds.items():
            print(
                f"  {who:8s} {taken:7.2f} s  {arguments.questions / taken:7.0f} questions/s  "
                f"x{seconds['lm-eval'] / taken:.2f} of lm-eval  {facts[who]['about']}"
            )
        assert apart < 1e-3, "the two must compute the same"


if __name__ == "__main__":
    main()
