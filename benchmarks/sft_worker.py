"""One contestant of `sft.py`: fine-tunes the shared model on the shared rows when told to."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_worker import ALPHA, RANK, device_of, loaded, places, timed, work

LEARNING_RATE = 1e-4
Timed = Callable[[int], tuple[float, int]]


def shared_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions cut out of the world's prose, a few words to a few hundred long."""
    from trivium import world

    chance = random.Random(seed)
    text = " ".join(one.text or "" for one in world.documents("prose", limit=count))
    words = text.split()
    rows, place = [], 0
    for _ in range(count):
        prompt = min(200, max(4, int(chance.lognormvariate(3.0, 0.6))))
        completion = min(300, max(2, int(chance.lognormvariate(3.3, 0.9))))
        piece = [words[(place + index) % len(words)] for index in range(prompt + completion)]
        place += prompt + completion
        rows.append({"prompt": " ".join(piece[:prompt]), "completion": " " + " ".join(piece[prompt:])})
    return rows


def shared_model(folder: Path, shape: dict[str, Any]) -> None:
    """The model's folder and its tokenizer, the same for every contestant: made, or those of a checkpoint."""
    if "folder" in shape:
        for file in Path(shape["folder"]).iterdir():
            if file.suffix in (".json", ".jinja", ".safetensors"):
                (folder / file.name).symlink_to(file.resolve())
        return
    from trivium import world
    from trivium.model.config import ModelConfig
    from trivium.model.folder import save_model
    from trivium.model.initialise import new_model
    from trivium.tokens.train import train_tokenizer

    texts = (one.text or "" for one in world.documents("prose", limit=500))
    tokenizer = train_tokenizer(texts, shape["vocabulary"])
    width = shape["width"]
    config = ModelConfig(
        family="llama", vocabulary=shape["vocabulary"], width=width, layers=shape["layers"], context=1024,
        heads=shape["heads"], key_value_heads=shape["heads"], head_width=width // shape["heads"],
        inner_width=shape["inner"], rope={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    save_model(new_model(config, seed=0), folder)
    tokenizer.save(folder)


def trivium_training(folder: Path, arguments: dict[str, Any]) -> Timed:
    """Trivium's batch source, objective and trainer, as its sft stage puts them together."""
    from trivium.data.conversations import Encoder
    from trivium.data.ingredients import Ingredient
    from trivium.data.packed import PackedBatches
    from trivium.data.shards import Shards, write_encoded
    from trivium.data.sources import Document
    from trivium.kit.metrics import MetricsLog
    from trivium.kit.progress import Progress
    from trivium.learn.objectives.next_token import NextToken
    from trivium.learn.optimisers import LearningRates
    from trivium.learn.settings import Training
    from trivium.learn.trainer import Trainer
    from trivium.model.folder import load_model
    from trivium.model.lora import AdapterSettings, add_adapter
    from trivium.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    documents = [
        Document(None, row, f"row:{n}") for n, row in enumerate(shared_rows(arguments["rows"]), start=1)
    ]
    encoder = Encoder(tokenizer, arguments["longest"])
    write_encoded(encoder.encode(documents), tokenizer, folder / "shards")
    shards = Shards(folder / "shards")
    tokens = round(arguments["batch"] * shards.tokens / len(shards))
    context = min(arguments["longest"], tokens)
    ingredients = [Ingredient("rows", shards)]
    batches = PackedBatches(ingredients, context=context, batch_tokens=tokens, seed=0, steps=100_000)
    model = load_model(folder, device=device_of(arguments))
    if arguments["adapter"]:
        add_adapter(model, AdapterSettings(rank=RANK, alpha=ALPHA))
    trainer = Trainer(
        model=model, objective=NextToken(), batches=batches,
        settings=Training(optimiser="adamw", compile="off"), folder=folder,
        rates=LearningRates(LEARNING_RATE, LEARNING_RATE, LEARNING_RATE, LEARNING_RATE),
        log=MetricsLog(folder / "metrics.jsonl"), progress=Progress(),
    )  # fmt: skip

    def train(steps: int) -> tuple[float, int]:
        before, start = trainer.tokens, time.perf_counter()
        for _ in range(steps):
            trainer._one_step()
        return time.perf_counter() - start, trainer.tokens - before

    return train


def trl_training(folder: Path, arguments: dict[str, Any]) -> Timed:
    """TRL's SFTTrainer, with PEFT's LoRA where asked for; only whole steps after the first are timed."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    packing = arguments["contestant"] == "TRL packed"
    rows = datasets.Dataset.from_list(shared_rows(arguments["rows"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = loaded(folder, adapter=arguments["adapter"])

    def train(steps: int) -> tuple[float, int]:
        settings = SFTConfig(
            output_dir=str(folder / "trl"), max_steps=steps + 1, learning_rate=LEARNING_RATE,
            **places(arguments),
            per_device_train_batch_size=arguments["batch"], gradient_checkpointing=False,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, packing=packing,
            max_length=arguments["longest"],
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        counts: list[int] = []
        compute = trainer.compute_loss

        def counted(model, inputs, *rest, **named):  # type: ignore[no-untyped-def]
            mask = inputs.get("attention_mask")
            counts.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
            return compute(model, inputs, *rest, **named)

        trainer.compute_loss = counted
        seconds = timed(trainer)
        return seconds, sum(counts[1:])

    return train


def speed(done: tuple[float, int]) -> dict[str, float]:
    """Real tokens a second."""
    seconds, tokens = done
    return {"tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    work({"Trivium": trivium_training, "TRL": trl_training}, shared_model, 2, speed)
