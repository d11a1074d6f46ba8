"""What a comparison of a whole recipe collects: three models, and something for every figure of the page."""

from __future__ import annotations

from typing import Any

import numpy as np
from lab import collected

MODELS = {"base": 0.2, "sft": 0.5, "rl": 0.7}
BEFORE = {"sft": "base", "rl": "sft"}
KINDS = ("prose", "chat")


def whole(count: int = 60, *, at_once: bool = True) -> dict[str, Any]:
    """Everything `compare` collects at the end of a recipe, drawn from a seed."""
    random = np.random.default_rng(7)
    direct = ["sums (direct answer)"] if at_once else []
    names = ["instructions", "sums", "facts", "sycophancy", "passkey", *direct]
    right = {task: {name: random.random(count) < share for name, share in MODELS.items()} for task in names}
    raw = collected(right, BEFORE, stages=_stages(), curves=_curves(), behaviour=_behaviour(random))
    tasks = raw["tasks"]
    if at_once:
        tasks["sums (direct answer)"] |= {"task": "sums", "settings": {"chain_of_thought": False}}
    tasks["facts"]["headline"] = ["accuracy", "multiple-choice accuracy"]
    tasks["sycophancy"]["headline"] = ["flip rate", "accepts correction", "prefers sycophancy"]
    for name in MODELS:
        for place in range(count):
            _fill(
                {label: task["models"][name]["records"][place] for label, task in tasks.items()},
                place,
                random,
            )
    scores = {name: [float(one) for one in random.normal(share, 1, count)] for name, share in MODELS.items()}
    raw["judged"] = [{"judge": "taste", "task": "instructions", "scores": scores}]
    return raw


def _fill(records: dict[str, dict[str, Any]], place: int, random: np.random.Generator) -> None:
    right = {label: bool(record["scores"]["accuracy"]) for label, record in records.items()}
    sums, facts = records["sums"], records["facts"]
    text = "2 + 3 = 5\\n#### 5" if right["sums"] else "2 + 3 = 6"
    sums["answers"] = [{"text": text, "answer": text, "tokens": 9}]
    tries = float(random.random())
    sums["scores"] |= {
        "steps": 1.0, "valid steps": float(right["sums"]), "tokens": 9.0,
        "pass@1 at temperature 0.8": tries / 2, "pass@4 at temperature 0.8": tries,
    }  # fmt: skip
    sure = float(random.uniform(0.25, 1))
    facts["scores"] |= {
        "multiple-choice accuracy": float(right["facts"]),
        "confidence": sure,
        "brier": (1 - sure) ** 2,
    }
    sycophancy = records["sycophancy"]
    sycophancy["answers"] *= 3
    sycophancy["groups"] = {"pressure": ("opinion", "sure", "identity", "feedback")[place % 4]}
    plain = float(random.random() < 0.6)
    sycophancy["scores"] = {
        "accuracy when asked plainly": plain, "accuracy under pressure": float(right["sycophancy"]),
        "prefers sycophancy": float(not right["sycophancy"]),
        **({"flip rate": float(not right["sycophancy"])} if plain else {"accepts correction": 1.0}),
    }  # fmt: skip
    length, depth = (64, 256)[place % 2], (0, 0.5, 1)[place % 3]
    records["passkey"]["groups"] = {
        "kind": "passkey", "length": str(length), "depth": str(depth),
        "length and depth": f"{length} {depth}",
    }  # fmt: skip


def _stages() -> list[dict[str, Any]]:
    found, above = [], None
    for name, kind in {"words": "tokenizer", "base": "pretrain", "sft": "sft", "rl": "rlvr"}.items():
        found.append({
            "name": name, "kind": kind, "from": above, "parents": [above] if above else [],
            "outside": ["world:prose"], "tokens": 20_000, "seconds": 12.5, "machine": "cpu", "started": None,
            "measured": {"bits per byte": {"value": 1.2, "low": 1.1, "high": 1.3, "n": 40}},
            "changes": [{"change": "learning rate", "before": 0.02, "after": 0.01}],
            "flops": 2e12, "parameters": 1_000_000,
        })  # fmt: skip
        above = None if name == "words" else name
    return found


def _curves() -> dict[str, Any]:
    steps = range(1, 40)
    falling = [[step, 4 / step + 1] for step in steps]
    rising = [[step, step / 50] for step in steps]
    return {
        "base": {"loss": falling, "bits_per_byte": falling},
        "sft": {"loss": falling},
        "rl": {"reward": rising, "completions/mean_length": rising, "entropy": falling},
    }


def _behaviour(random: np.random.Generator) -> list[dict[str, Any]]:
    pairs = []
    for model, before in BEFORE.items():
        texts = []
        for place in range(12):
            names = ("kl", "reverse", "js", "entropy", "entropy before", "logprob", "logprob before")
            measures = {name: [float(one) for one in random.gamma(1, 0.2, 20)] for name in names}
            tokens = [f" word{number}" for number in range(20)]
            kind = KINDS[place % 2]
            texts.append({"id": f"{kind}{place}", "kind": kind, "before": "", "tokens": tokens, **measures})
        pairs.append({"model": model, "before": before, "why_not": None, "texts": texts})
    return pairs
