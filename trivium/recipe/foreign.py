"""Settings by the names of TRL, Axolotl and transformers, and the keys that mean the same here."""

from collections.abc import Collection, Mapping
from typing import Any

from trivium.kit.errors import TriviumError

KEYS: dict[str, str] = {
    "lr": "learning_rate",
    "lr_scheduler_type": "learning_rate.decay",
    "lr_scheduler": "learning_rate.decay",
    "warmup_ratio": "learning_rate.warmup",
    "warmup_steps": "learning_rate.warmup",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "max_length": "context",
    "max_seq_length": "context",
    "max_seq_len": "context",
    "sequence_len": "context",
    "block_size": "context",
    "max_completion_length": "max_new_tokens",
    "response_length": "max_new_tokens",
    "max_grad_norm": "clip",
    "optim": "optimiser",
    "optimizer": "optimiser",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_target_modules": "adapter.targets",
    "load_in_4bit": "adapter.base",
    "load_in_8bit": "adapter.base",
    "bf16": "precision",
    "gradient_checkpointing": "recompute",
    "loss_type": "loss",
    "beta": "beta",
    "lmbda": "on_policy",
    "neftune_noise_alpha": "neftune",
    "label_smoothing_factor": "label_smoothing",
    "train_on_inputs": "loss",
    "assistant_only_loss": "loss",
    "completion_only_loss": "loss",
    "eval_steps": "validation.times",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "reward_funcs": "reward",
    "num_iterations": "epochs_per_rollout",
    "epsilon": "clip_ratio.low",
    "epsilon_high": "clip_ratio.high",
    "num_mini_batches": "minibatches",
    "torch_compile": "compile",
    "val_set_size": "data.validation",
}
"""A foreign name, and the key (dotted where it lies inside another) that means the same."""
SIZES = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
"""How many examples a step takes, which other tools split in two."""
ANSWERS: dict[str, str] = {
    "packing": "examples are always packed, and none sees another; leave it out",
    "sample_packing": "examples are always packed, and none sees another; leave it out",
    "fp16": "half precision is not trained in; write `precision: bfloat16`",
    "logging_steps": "every step is logged; leave it out",
    "max_prompt_length": "prompts that leave no room for an answer are left out and counted; leave it out",
    "lora_dropout": "adapters have no dropout; leave it out",
    "use_peft": "write `adapter: lora`",
    "output_dir": "results lie under --runs; `--to DIR` of a one-line command copies the model",
    "model_name_or_path": "the model is `from`, and the first word of a one-line command",
    "base_model": "the model is `from`, and the first word of a one-line command",
    "dataset_name": "the data is `data`",
    "datasets": "the data is `data`",
    "report_to": "write `track: [wandb]` at the top of the recipe",
    "seq_len": "the length of sequences is `context`",
    "ref_model": "the model it starts from is the reference",
    "scale_rewards": "`algorithm: dr_grpo` leaves advantages unscaled",
    "use_vllm": "what samples is `engine`: write `engine: vllm`",
    "remove_unused_columns": "columns that are not needed are not read; leave it out",
    "dataset_text_field": "the column is named where the data is: `data: {FILE: {columns: {text: body}}}`",
    "dataset_num_proc": "data is read with as many processes as pay; leave it out",
    "dataloader_num_workers": "data is read with as many processes as pay; leave it out",
    "eval_strategy": "`validation: {times: 5}` says how often the loss is measured",
    "evaluation_strategy": "`validation: {times: 5}` says how often the loss is measured",
    "per_device_eval_batch_size": "what is measured needs no batch size; leave it out",
    "save_strategy": "`checkpoint: {every_steps: 500}` says when the state is saved",
    "resume_from_checkpoint": "the same command goes on where it was cut off; leave it out",
    "adam_beta1": "AdamW's betas are 0.9 and 0.95; leave it out",
    "adam_beta2": "AdamW's betas are 0.9 and 0.95; leave it out",
    "push_to_hub": "`trivium export MODEL --to hub` does it afterwards; leave it out",
    "attn_implementation": "the fastest attention of the machine is taken; leave it out",
    "flash_attention": "the fastest attention of the machine is taken; leave it out",
    "deepspeed": "`parallel: {shard: all}` divides weights, gradients and moments; leave it out",
    "fsdp": "`parallel: {shard: all}` divides weights, gradients and moments; leave it out",
}
"""Foreign names that no key means, with what to do instead."""
SCHEDULES = {
    "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "inverse_sqrt": "inverse-sqrt",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
POLICY = {"beta": "kl.coefficient", "loss_type": "algorithm", "epsilon": "clip_ratio.low"}
"""What some names mean in reinforcement learning."""
SEQUENCE = 1024
"""The length of an example where batches are counted in examples and nothing says how long they are."""


def key_of(name: str, known: Collection[str]) -> str | None:
    """The key that means what a foreign name does, in a stage with these keys; None where none does."""
    policy = "prompts_per_step" in known
    key = (POLICY.get(name) if policy else None) or KEYS.get(name)
    return key if key is not None and key.partition(".")[0] in known else None


def answer(name: str, known: Collection[str]) -> str | None:
    """What to write instead of a foreign name, as the end of a sentence."""
    if name in ANSWERS:
        return ANSWERS[name]
    if name in SIZES:
        if "pairs" in known:
            return "a step's pairs are counted in `pairs`"
        if "prompts_per_step" in known:
            return "a step's prompts are counted in `prompts_per_step`, with `num_generations` answers each"
        return "a step's tokens are counted in `batch`; how they are split over passes never matters"
    key = key_of(name, known)
    if key is None or key == name:
        return None
    outer, _, inner = key.partition(".")
    return f"write `{outer}: {{{inner}: ...}}`" if inner else f"write `{key}`"


def understood(name: str, value: Any, known: Collection[str], settings: dict[str, Any]) -> bool:
    """Put a foreign setting among `settings` under its key here; whether the name was understood."""
    if name in ANSWERS:
        if value in (True, None) and name in ("packing", "sample_packing", "remove_unused_columns"):
            return True
        if name == "use_peft":
            settings.setdefault("adapter", {})
            return True
        raise TriviumError(f"--{name}: {ANSWERS[name]}.")
    if name in SIZES:
        settings[name] = value
        return True
    key = key_of(name, known)
    if key is None:
        return False
    place(settings, key, _translated(name, value, known))
    return True


def _translated(name: str, value: Any, known: Collection[str]) -> Any:
    if name in ("lr_scheduler_type", "lr_scheduler"):
        return SCHEDULES.get(str(value), value)
    if name in ("optim", "optimizer"):
        return "adamw" if str(value).startswith("adamw") or "8bit" in str(value) else value
    if name in ("load_in_4bit", "load_in_8bit"):
        return {"load_in_4bit": "int4", "load_in_8bit": "int8"}[name] if value in (True, None) else "float"
    if name == "bf16":
        return "bfloat16" if value in (True, None) else "float32"
    if name == "gradient_checkpointing":
        return "full" if value in (True, None) else "none"
    if name == "train_on_inputs":
        return "all" if value in (True, None) else "assistant"
    if name in ("assistant_only_loss", "completion_only_loss"):
        return "assistant" if value in (True, None) else "all"
    if name == "torch_compile":
        return "on" if value in (True, None) else "off"
    if name in ("reward_funcs", "lora_target_modules"):
        return value if isinstance(value, list) else str(value).split(",")
    return value


def place(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; a bare learning rate becomes the place where a schedule starts."""
    *outer, last = key.split(".")
    inside = settings
    for part in outer:
        held = inside.get(part)
        if not isinstance(held, dict):
            inside[part] = {} if held is None else {"from": held}
        inside = inside[part]
    held = inside.get(last)
    if isinstance(held, dict) and not isinstance(value, Mapping):
        held["from" if last == "learning_rate" else last] = value
    else:
        inside[last] = value


def sizes(settings: dict[str, Any], known: Collection[str]) -> None:
    """Turn examples per device and steps of accumulation into what a step is counted in here."""
    given = [settings.pop(name) for name in SIZES if name in settings]
    if not given:
        return
    examples = 1
    for one in given:
        if not isinstance(one, int) or isinstance(one, bool) or one < 1:
            raise TriviumError(f"--{SIZES[0]} and --{SIZES[2]} are whole numbers from 1 on, not {one!r}.")
        examples *= one
    if "pairs" in known:
        settings.setdefault("pairs", examples)
    elif "prompts_per_step" in known:
        answers = settings.get("num_generations", 8)
        settings.setdefault("prompts_per_step", max(1, examples // int(answers)))
    else:
        context = settings.get("context", SEQUENCE)
        settings.setdefault("batch", examples * int(context))
