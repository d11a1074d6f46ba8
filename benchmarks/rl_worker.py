"""One contestant of `rl.py`: rolls out and learns from the shared model when told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sft_worker import shared_model, shared_rows
from trl_worker import device_of, loaded, places, timed, work

LEARNING_RATE = 1e-5
END_BIAS = 3.2
"""Added to the logit of the end token where answers end early: about one token in twenty then ends one."""
Timed = Callable[[int], tuple[float, int, int]]
"""Steps -> seconds, answers, tokens of answers."""


def reward(completions: list[str], **columns: Any) -> list[float]:
    """How much of an answer is the letter e: cheap, and different for every answer."""
    return [one.count("e") / max(1, len(one)) for one in completions]


def prompts_of(count: int) -> list[str]:
    """The beginnings of the world's prose that both contestants go on from."""
    return [row["prompt"] for row in shared_rows(count) if len(row["prompt"]) < 300]


def trivium_training(folder: Path, arguments: dict[str, Any]) -> Timed:
    """The feed, objective and trainer, as the rlvr stage puts them together."""
    from trivium.generate.engine import Engine
    from trivium.generate.sampling import Sampling
    from trivium.grade.rewards import Combined, FunctionReward
    from trivium.kit.metrics import MetricsLog
    from trivium.kit.progress import Progress
    from trivium.learn.objectives.policy import PolicyGradient
    from trivium.learn.objectives.policy_losses import ALGORITHMS
    from trivium.learn.optimisers import LearningRates
    from trivium.learn.settings import Training
    from trivium.learn.trainer import Trainer
    from trivium.model.folder import load_model
    from trivium.stages.parts.prompts import Prompt
    from trivium.stages.parts.rollout_worker import EngineWorker
    from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings
    from trivium.tokens.tokenizer import Tokenizer

    tokenizer, model = (
        Tokenizer.load(folder),
        load_model(folder, dtype=torch.float32, device=device_of(arguments)),
    )
    early = dict.fromkeys(tokenizer.stop_ids, END_BIAS) if arguments["early"] else {}
    longest = arguments["longest"]
    sampling = Sampling(
        max_new_tokens=longest, min_new_tokens=4 if arguments["early"] else longest, logit_bias=early
    )
    prompts = [Prompt(tokenizer.encode(text), text, {}, text[:20]) for text in prompts_of(400)]
    settings = RolloutSettings(
        steps=100_000,
        prompts_per_step=arguments["answers"] // arguments["group"],
        num_generations=arguments["group"],
    )
    engine = Engine(model, tokenizer, max_rows=arguments["answers"])
    algorithm = ALGORITHMS["dapo"]
    feed = RolloutBatches(
        model, EngineWorker(engine, sampling), prompts, Combined([FunctionReward("e", reward)], [1.0]),
        algorithm, settings, sampling=sampling, seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model=model, objective=PolicyGradient(algorithm, algorithm.numbers), batches=feed,
        settings=Training(optimiser="adamw", compile="off"), folder=folder,
        rates=LearningRates(LEARNING_RATE, LEARNING_RATE, LEARNING_RATE, LEARNING_RATE),
        log=MetricsLog(folder / "metrics.jsonl"), progress=Progress(),
    )  # fmt: skip

    def train(steps: int) -> tuple[float, int, int]:
        tokens, start = 0, time.perf_counter()
        for _ in range(steps):
            row = trainer._one_step()
            tokens += round(row["completions/mean_length"] * arguments["answers"])
        return time.perf_counter() - start, steps * arguments["answers"], tokens

    return train


def trl_training(folder: Path, arguments: dict[str, Any]) -> Timed:
    """TRL's GRPOTrainer; only whole steps after the first are timed."""
    import datasets
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"prompt": text} for text in prompts_of(400)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = loaded(folder)
    longest, answers = arguments["longest"], arguments["answers"]
    generation: dict[str, Any] = {"min_new_tokens": 4 if arguments["early"] else longest}
    if arguments["early"]:
        generation["sequence_bias"] = [[[tokenizer.eos_token_id], END_BIAS]]

    def train(steps: int) -> tuple[float, int, int]:
        lengths: list[int] = []

        def counted(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
            lengths.append(sum(map(len, completion_ids)))
            return reward(completions)

        settings = GRPOConfig(
            output_dir=str(folder / "trl"), max_steps=steps + 1, learning_rate=LEARNING_RATE,
            **places(arguments),
            per_device_train_batch_size=arguments["batch"],
            gradient_accumulation_steps=answers // arguments["batch"], num_generations=arguments["group"],
            max_completion_length=longest, gradient_checkpointing=False, report_to=[],
            logging_strategy="no", save_strategy="no", disable_tqdm=True, generation_kwargs=generation,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, args=settings, train_dataset=rows, processing_class=tokenizer, reward_funcs=counted
        )
        seconds = timed(trainer)
        return seconds, steps * answers, sum(lengths[1:])

    return train


def speed(done: tuple[float, int, int]) -> dict[str, float]:
    """Answers a second, and how long they were."""
    seconds, answers, tokens = done
    return {"rollouts_per_second": answers / seconds, "mean_length": tokens / answers}


if __name__ == "__main__":
    work({"Trivium": trivium_training, "TRL": trl_training}, shared_model, 1, speed)
