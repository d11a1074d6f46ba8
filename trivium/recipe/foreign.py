"""Settings by the names of TRL, Axolotl and transformers, and the keys that mean the same here."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from trivium.kit.errors import TriviumError

_NAMES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
KEYS, POLICY, SCHEDULES, ANSWERS = (_NAMES[part] for part in ("keys", "policy", "schedules", "answers"))
SIZES = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
"""How many examples a step takes, which other tools split in two."""
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
