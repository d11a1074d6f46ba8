"""What the workers that stand beside TRL share: a clock for its trainers, LoRA, and the answers they give."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RANK, ALPHA = 16, 32
Making = Callable[[Path, dict[str, Any]], Callable[[int], Any]]
"""A folder with the shared model and the arguments -> a function that trains so far and says what it did."""


def device_of(arguments: dict[str, Any]) -> str:
    """Where a contestant computes: on the CPU unless it was told."""
    return str(arguments.get("device", "cpu"))


def places(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for the settings of TRL's trainers, with bfloat16 products on a GPU."""
    cpu = device_of(arguments) == "cpu"
    return {"use_cpu": cpu, "bf16": not cpu}


def loaded(folder: Path, *, adapter: bool = False) -> Any:
    """The shared model as TRL takes it, with PEFT's LoRA where asked for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if adapter:
        from peft import LoraConfig, get_peft_model

        wishes = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, wishes)
    return model


def timed(trainer: Any) -> float:
    """Train to the end and say how long all steps but the first took, which also sets things up."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        started = seconds = 0.0
        steps = 0

        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if self.steps == 1:
                self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.steps += 1
            self.seconds = time.perf_counter() - self.started

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def work(
    make: dict[str, Making],
    prepare: Callable[[Path, dict], None],
    warm_up: int,
    answer: Callable[[Any], dict],
) -> None:
    """Make the contestant that the arguments name, and train as far as every line on standard input says."""
    arguments = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(arguments["threads"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments["shape"])
        train = make[arguments["contestant"].split()[0]](folder, arguments)
        train(warm_up)
        print("ANSWER " + json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            (amount,) = json.loads(line).values()
            found = answer(train(amount))
            found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if device_of(arguments) == "cuda":
                found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            print("ANSWER " + json.dumps(found), flush=True)
