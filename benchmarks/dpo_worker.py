"""One contestant of `dpo.py`: learns the shared pairs from the shared model when told to."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_worker import shared_model
from trl_worker import ALPHA, RANK, device_of, loaded, places, timed, work

LEARNING_RATE = 1e-5
Timed = Callable[[int], tuple[float, int]]


def shared_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts with two answers cut out of the world's prose, a few words to a few hundred long."""
    from trivium import world

    chance = random.Random(seed)
    text = " ".join(one.text or "" for one in world.documents("prose", limit=count))
    words, place = text.split(), 0

    def taken(typical: float, spread: float, least: int, most: int) -> str:
        nonlocal place
        size = min(most, max(least, int(chance.lognormvariate(typical, spread))))
        piece = [words[(place + index) % len(words)] for index in range(size)]
        place += size
        return " ".join(piece)

    return [
        {
            "prompt": taken(3.6, 0.7, 4, 200),
            "chosen": " " + taken(3.3, 0.9, 2, 200),
            "rejected": " " + taken(3.3, 0.9, 2, 200),
        }
        for _ in range(count)
    ]


def trivium_training(folder: Path, arguments: dict[str, Any]) -> Timed:
    """Trivium's batch source, objective and trainer, as its preference stage puts them together."""
    from trivium.data.counted import CountedSource
    from trivium.data.preferences import PreferenceBatches, PreferenceData
    from trivium.data.sources import Document
    from trivium.kit.metrics import MetricsLog
    from trivium.kit.progress import Progress
    from trivium.learn.objectives.preference import Beside, Preference
    from trivium.learn.optimisers import LearningRates
    from trivium.learn.settings import Training
    from trivium.learn.trainer import Trainer
    from trivium.model.folder import load_model
    from trivium.model.lora import AdapterSettings, add_adapter
    from trivium.stages.parts.references import store_references
    from trivium.stages.parts.stage import Work
    from trivium.tokens.tokenizer import Tokenizer

    documents = [Document(None, row, f"row:{n}") for n, row in enumerate(shared_pairs(arguments["pairs"]))]
    judged = list(PreferenceData(Tokenizer.load(folder), 1024).read(documents))
    batches = PreferenceBatches(
        [CountedSource("pairs", judged)], batch=arguments["batch"], seed=0, steps=100_000
    )
    model = load_model(folder, device=device_of(arguments))
    log = MetricsLog(folder / "metrics.jsonl")
    beside: Beside = "parent"
    if arguments["adapter"]:
        add_adapter(model, AdapterSettings(rank=RANK, alpha=ALPHA))
        beside = "adapter off"
    if arguments["stored"]:
        beside = "stored"
        work = Work("dpo", folder, {}, 0, log, Progress())
        store_references(work, "train", model, batches, parent="shared")
    reference = copy.deepcopy(model).requires_grad_(False) if beside == "parent" else None
    trainer = Trainer(
        model=model, objective=Preference({"sigmoid": 1.0}, beside=beside, reference=reference),
        batches=batches,
        settings=Training(optimiser="adamw", compile="off"), folder=folder, log=log, progress=Progress(),
        rates=LearningRates(LEARNING_RATE, LEARNING_RATE, LEARNING_RATE, LEARNING_RATE),
    )  # fmt: skip

    def train(pairs: int) -> tuple[float, int]:
        steps = max(1, pairs // arguments["batch"])
        start = time.perf_counter()
        for _ in range(steps):
            trainer._one_step()
        return time.perf_counter() - start, steps * arguments["batch"]

    return train


def trl_training(folder: Path, arguments: dict[str, Any]) -> Timed:
    """TRL's DPOTrainer, with PEFT's LoRA where asked for; only whole steps after the first are timed."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(shared_pairs(arguments["pairs"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def train(pairs: int) -> tuple[float, int]:
        steps = max(1, pairs // arguments["batch"])
        settings = DPOConfig(
            output_dir=str(folder / "trl"), max_steps=steps + 1, learning_rate=LEARNING_RATE,
            **places(arguments),
            per_device_train_batch_size=arguments["batch"], gradient_checkpointing=False,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, max_length=1024,
            precompute_ref_log_probs=arguments["stored"],
        )  # fmt: skip
        # TRL lays a reference beside the adapter, and only once on the same model.
        model = loaded(folder, adapter=arguments["adapter"])
        trainer = DPOTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        seconds = timed(trainer)
        return seconds, steps * arguments["batch"]

    return train


def speed(done: tuple[float, int]) -> dict[str, float]:
    """Pairs a second."""
    seconds, pairs = done
    return {"pairs_per_second": pairs / seconds}


if __name__ == "__main__":
    work({"Trivium": trivium_training, "TRL": trl_training}, shared_model, 2, speed)
