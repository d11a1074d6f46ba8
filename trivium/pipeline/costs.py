"""The numbers a stage will really run with: tokens, steps, epochs of every source, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from trivium.data.mixture import weights_over
from trivium.data.packing import pack
from trivium.data.settings import MixtureSource
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.numbers import short
from trivium.model.folder import load_config
from trivium.model.hub import resolve
from trivium.pipeline.checks import Checked
from trivium.pipeline.looking import lengths
from trivium.pipeline.run import Run
from trivium.recipe.outside import locate
from trivium.stages.parts.examples import ROWS_PER_BATCH
from trivium.stages.parts.shapes import size_of
from trivium.stages.parts.stage import Stage
from trivium.stages.parts.training import LONGEST
from trivium.tokens.tokenizer import Tokenizer

MOST_EPOCHS = 8
"""How often a source may come round before a person has to say `max_repeats`."""
INHERITED = ("parameters", "vocabulary", "context", "width", "layers")
REACHED = {"rlvr": 0.3, "ppo": 0.3, "synthesize": 0.3}
"""The share of the machine's matrix peak that generation reaches, roughly; training half of it."""
EXAMPLES = ("sft", "distill")
READ_PER_SECOND = 2e6
"""Characters that are read and tokenised in a second, roughly."""


def inherited(going: Run, name: str, derived: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a stage takes over from the model it starts from: its size and how much it reads."""
    start = getattr(going.nodes[name].stage, "start", None) or next(
        iter(getattr(going.nodes[name].stage, "of", [])), None
    )
    if not isinstance(start, str):
        return {}
    parent = going.nodes[name].parents.get(start)
    if parent is not None and going.entry(parent.stage).state != "done":
        return {key: derived[parent.stage][key] for key in INHERITED if key in derived[parent.stage]}
    if parent is not None:
        folder = going.entry(parent.stage).output
    else:
        found = locate(start, going.recipe.base)
        if found is None:
            return {}
        folder = resolve(found)
    if not (folder / "config.json").is_file():
        return {}
    config = load_config(folder)
    return {**size_of(config), "context": config.context, "width": config.width, "layers": config.layers}


def tokenizer_of(going: Run, name: str) -> Tokenizer | None:
    """The tokenizer a stage reads its data with, or that of what it starts from, where there is one yet."""
    node = going.nodes[name]
    stage: Any = node.stage
    named = [getattr(stage, setting, None) for setting in ("start", "tokenizer")]
    for written in [*named, *node.parents]:
        if not isinstance(written, str):
            continue
        parent = node.parents.get(written)
        if parent is not None and going.entry(parent.stage).state != "done":
            above = tokenizer_of(going, parent.stage)
            if above is not None:
                return above
            continue
        place = going.entry(parent.stage).output if parent else locate(written, going.recipe.base)
        if place is None:
            continue
        folder = resolve(place) if place.is_dir() else place
        for inside in (folder, folder / "tokenizer"):
            if (inside / "tokenizer.json").is_file():
                return Tokenizer.load(inside)
    return None


def amounts(
    going: Run, name: str, checked: Checked, derived: Mapping[str, Mapping[str, Any]], vocabulary: int
) -> dict[str, tuple[float, np.ndarray]]:
    """For every source of a stage how many tokens there are to train on, and lengths of some of its rows."""
    node, found = going.nodes[name], {}
    tokenizer = tokenizer_of(going, name)
    mixture = _mixture(node.stage)
    for written in mixture or checked.sources.get(name, {}):
        said = mixture.get(written)
        source = said.path if said is not None else written
        if source in node.parents:
            made = derived[node.parents[source].stage]
            if "tokens to learn" in made:
                found[written] = (float(made["tokens to learn"]), made["lengths"])
            continue
        looked = checked.sources.get(name, {}).get(source)
        if looked is None or not looked.documents:
            continue
        sizes = lengths(looked, tokenizer, vocabulary)
        share = said.validation if said is not None else 0.0
        if node.stage.kind == "corpus":
            share = float(getattr(node.stage, "validation", 0.0))
        left = looked.documents - (looked.held_out(share) or 0)
        found[written] = (left * float(sizes.mean()), sizes)
    return found


def _mixture(stage: Stage) -> dict[str, MixtureSource]:
    data = getattr(stage, "data", None)
    if isinstance(data, dict) and all(isinstance(one, MixtureSource) for one in data.values()):
        return data
    return {}


def corpus_numbers(going: Run, name: str, known: Mapping[str, tuple[float, np.ndarray]]) -> dict[str, Any]:
    """How many tokens a corpus has to learn from, counted where it is made and else estimated."""
    entry = going.entry(name)
    if entry.state == "done":
        manifest = read_json(entry.output / "manifest.json")["splits"]["train"]
        count = max(1, manifest["documents"])
        return {
            "tokens to learn": manifest["tokens"],
            "lengths": np.full(256, max(2, manifest["tokens"] // count)),
        }
    total = sum(tokens for tokens, _ in known.values())
    if not known:
        return {}
    return {"tokens to learn": total, "lengths": np.concatenate([sizes for _, sizes in known.values()])}


def training_numbers(
    going: Run, name: str, known: Mapping[str, tuple[float, np.ndarray]], numbers: Mapping[str, Any]
) -> dict[str, Any]:
    """Batch, steps, tokens and epochs of a stage that trains on packed texts, as they will really be."""
    stage: Any = going.nodes[name].stage
    available = sum(tokens for tokens, _ in known.values())
    context = getattr(stage.context, "longest", stage.context) if hasattr(stage, "context") else None
    if stage.kind in EXAMPLES:
        context = context or min(LONGEST, numbers.get("context", LONGEST))
    context = int(context or numbers.get("context", 512))
    batch = stage.batch or numbers.get("batch")
    if stage.kind in EXAMPLES and stage.batch is None:
        rows = ROWS_PER_BATCH if not available else max(1, min(ROWS_PER_BATCH, -(-int(available) // context)))
        batch = rows * context
    if batch is None:
        return {}
    if stage.batch is not None and batch < context:
        raise TriviumError(
            f"{name}: `batch: {short(batch)}` holds no sequence of {context:,} tokens, the context here; "
            f"write `batch: {context}` or more, or a `context` of at most {batch}."
        )
    batch = max(int(batch), context)
    rows = batch // context
    sizes = np.concatenate([some for _, some in known.values()]) if known else np.array([context])
    packing = pack(sizes, context)
    filled = packing.tokens / max(1, len(packing) * context)
    per_step = rows * context * filled
    epochs = stage.epochs if stage.epochs is not None or stage.kind not in EXAMPLES else 1.0
    if stage.tokens is None and stage.steps is None and epochs is not None:
        steps = max(1, round(epochs * available / per_step)) if available else None
    elif stage.steps is not None:
        steps = stage.steps
    else:
        tokens = stage.tokens or numbers.get("tokens")
        steps = max(1, round(tokens / per_step)) if tokens else None
    if steps is None:
        return {"batch": batch}
    found: dict[str, Any] = {"batch": batch, "steps": steps, "tokens": round(steps * per_step)}
    if stage.kind == "pretrain" or (stage.kind == "midtrain" and stage.context is not None):
        found["context"] = context
    if available:
        found["epochs"] = _epochs(stage, known, found["tokens"])
    return found


def _epochs(stage: Any, known: Mapping[str, tuple[float, np.ndarray]], tokens: float) -> dict[str, float]:
    """How often each source comes round."""
    mixture = _mixture(stage)
    share = 1 - (getattr(getattr(stage, "replay", None), "share", 0.0) or 0.0)
    weights = {}
    for name, (size, _) in known.items():
        weight = mixture[name].weight if name in mixture else None
        weights[name] = size if weight is None else _mean(weights_over(weight))
    total = sum(weights.values())
    if total <= 0:
        return {}
    return {name: share * tokens * weights[name] / total / max(1.0, known[name][0]) for name in known}


def _mean(knots: tuple[tuple[float, float], ...]) -> float:
    """The mean of a weight over the stage."""
    if len(knots) == 1:
        return knots[0][1]
    inside = sum((b - a) * (low + high) / 2 for (a, low), (b, high) in pairwise(knots))
    return inside + knots[0][0] * knots[0][1] + (1 - knots[-1][0]) * knots[-1][1]


def check_repeats(name: str, stage: Any, epochs: Mapping[str, float]) -> None:
    """Refuse a source that comes round more than a few times without a word from the person."""
    if getattr(stage, "epochs", None) is not None:
        return
    for source, passes in epochs.items():
        said = _mixture(stage).get(source)
        most = said.max_repeats if said is not None and said.max_repeats else None
        if most is not None and passes > most * 1.1:
            raise TriviumError(
                f"{name}: {source} would be repeated {passes:,.0f} times, more than its "
                f"`max_repeats: {most:g}`; give it more data, a smaller weight, or fewer `tokens`."
            )
        if most is None and passes > MOST_EPOCHS:
            raise TriviumError(
                f"{name}: {source} is so small that it would be repeated {passes:,.0f} times; give it more "
                f"data or fewer `tokens`, or say that you mean it: `data: {{{source}: {{max_repeats: "
                f"{int(passes) + 1}}}}}`."
            )


def policy_numbers(
    stage: Any, numbers: Mapping[str, Any], problems: int | None, prompt: float
) -> dict[str, Any]:
    """Rollouts of reinforcement learning, with answers half as long as they may be."""
    per_rollout = stage.epochs_per_rollout * stage.minibatches
    steps = getattr(stage, "steps", None)
    if steps is None and getattr(stage, "epochs", None) and problems:
        steps = max(1, round(stage.epochs * problems / stage.prompts_per_step)) * per_rollout
    if steps is None:
        return {}
    generations = getattr(stage, "num_generations", 1)
    answers = -(-steps // per_rollout) * stage.prompts_per_step * generations
    tokens = answers * stage.max_new_tokens
    found = {"steps": steps, "answers": answers, "tokens at most": tokens}
    if "parameters" in numbers:
        # Answers are written, read by the reference, and learned from; PPO reads and trains a critic as well.
        factor = (2 + 2 + 6 * stage.epochs_per_rollout) * (2 if stage.kind == "ppo" else 1)
        found["flops"] = factor * numbers["parameters"] * answers * (stage.max_new_tokens / 2 + prompt)
    return found


def pair_numbers(stage: Any, numbers: Mapping[str, Any], pairs: float, length: float) -> dict[str, Any]:
    """Steps of a stage that learns from judgements, and what they cost."""
    epochs = stage.epochs if stage.epochs is not None else 1.0
    steps = stage.steps or (max(1, round(epochs * pairs / stage.pairs)) if pairs else None)
    if steps is None:
        return {}
    found = {"steps": steps, "pairs": round(steps * stage.pairs)}
    if "parameters" in numbers and length:
        found["flops"] = 8.0 * numbers["parameters"] * steps * stage.pairs * length
    return found


def synthesis_numbers(stage: Any, numbers: Mapping[str, Any], rows: float, prompt: float) -> dict[str, Any]:
    """Answers and tokens of a stage that writes data, with answers half as long as they may be."""
    found: dict[str, Any] = stage.estimate(rows, prompt)
    if "parameters" in numbers:
        found["flops"] = (
            2.0 * numbers["parameters"] * (found["tokens at most"] + found["answers"] * prompt) / 2
        )
    return found


def online_numbers(
    stage: Any, numbers: Mapping[str, Any], prompts: int | None, prompt: float
) -> dict[str, Any]:
    """Steps and answers of preferences that the model's own answers make, half as long as they may be."""
    steps = stage.steps or (round(stage.epochs * prompts / stage.pairs) if stage.epochs and prompts else None)
    if not steps:
        return {}
    answers = steps * stage.pairs * stage.online.num_generations
    found = {"steps": steps, "answers": answers, "tokens at most": answers * stage.online.max_new_tokens}
    if "parameters" in numbers:
        # All answers are written; two of each prompt are read by the reference and learned from.
        length = prompt + stage.online.max_new_tokens / 2
        pairs = 2 * steps * stage.pairs
        found["flops"] = numbers["parameters"] * length * (2.0 * answers + 8.0 * pairs)
    return found


class Speed:
    """FLOPs per second on this machine, as earlier stages of a kind reached them or as its peak suggests."""

    def __init__(self, going: Run) -> None:
        self.peak = machine.matmul_peak(0.3)
        here = machine.describe()
        self._reached: dict[str, list[float]] = {}
        for entry in going.store.entries():
            if entry.state != "done":
                continue
            record = entry.record
            same = (record.get("machine") or {}).get("device_name") == here.device_name
            if same and record.get("seconds") and record.get("flops"):
                self._reached.setdefault(record["kind"], []).append(record["flops"] / record["seconds"])

    def seconds(self, kind: str, flops: float) -> float:
        """How long so many FLOPs take a stage of this kind."""
        reached = self._reached.get(kind)
        return flops / (median(reached) if reached else self.peak * REACHED.get(kind, 0.5))


def told(numbers: Mapping[str, Any]) -> str:
    """The numbers in one line."""
    parts = []
    for name, value in numbers.items():
        if name in ("lengths", "flops") or isinstance(value, np.ndarray):
            continue
        if name == "epochs" and isinstance(value, Mapping):
            parts += [f"{source} {passes:.3g} epochs" for source, passes in value.items()]
        elif not isinstance(value, Mapping):
            parts.append(f"{name} {short(value) if isinstance(value, (int, float)) else value}")
    return ", ".join(parts)
