"""Whether closeness predicts what it costs to tune one behaviour into another, on the models of a recipe.

    trivium run experiments/closeness --runs runs
    python benchmarks/closeness.py --runs runs --to closeness.json

For every ordered pair of behaviours A, B (A of one seed, B of another) the model A is trained on KL(p_B || p)
over contexts of its own; T is the number of optimiser steps until KL on further contexts is at most epsilon
nats. The predictors are measured on a third set of contexts. Judged: Spearman of T with each predictor, and
partial Spearman given the initial KL, with bootstrap intervals that draw behaviours (not pairs). The
hypotheses stand in the recipe, written before the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.lab.closeness_table import probe_set
from trivium.lab.function_distance import measures, probe
from trivium.lab.gather import Member, find
from trivium.lab.weight_distance import cosines, task_vectors
from trivium.learn.optimisers import LearningRates, Optimiser
from trivium.model.attention import Documents
from trivium.model.folder import load_model

BEHAVIOURS = (
    "chat", "gentle", "replay", "muon", "sums", "facts", "flatter", "dpo", "noise", "rl",
    "language", "domain", "long",
)  # fmt: skip
EPSILON, MOST_STEPS, RATE, EVERY = 0.02, 300, 1e-3, 2


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties shared."""
    order = np.argsort(values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.arange(1, len(values) + 1)
    for one in np.unique(values):
        same = values == one
        found[same] = found[same].mean()
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of the ranks."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Spearman of x and y with what the ranks of `given` explain taken off both."""
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    scale = np.sqrt(max(1 - xz**2, 0) * max(1 - yz**2, 0))
    return float((xy - xz * yz) / scale) if scale > 1e-9 else float("nan")


def bootstrap(rows: list[dict[str, Any]], names: list[str], measure, draws: int = 1000, seed: int = 0):
    """The 95 % interval of a measure when behaviours are drawn with replacement."""
    generator = np.random.default_rng(seed)
    by_pair = {(one["from"], one["to"]): one for one in rows}
    found = []
    for _ in range(draws):
        drawn = generator.choice(names, len(names))
        some = [by_pair[a, b] for a, b in itertools.product(drawn, drawn) if (a, b) in by_pair]
        if len({(one["from"], one["to"]) for one in some}) >= 6:
            value = measure(some)
            if np.isfinite(value):
                found.append(value)
    return [float(one) for one in np.percentile(found, [2.5, 97.5])] if found else [None, None]


def divergence(model, target, batch: list[list[int]]) -> torch.Tensor:
    """Mean KL(target || model) over all places of these rows."""
    tokens = torch.tensor([token for row in batch for token in row])
    documents = Documents([len(row) for row in batch])
    with torch.no_grad():
        wanted = torch.log_softmax(target.logits(target(tokens, documents)).float(), -1)
    mine = torch.log_softmax(model.logits(model(tokens, documents)).float(), -1)
    return (wanted.exp() * (wanted - mine)).sum(-1).mean()


def steps_between(
    start: Member, goal: Member, learn: list[list[int]], held: list[list[int]]
) -> tuple[int, float]:
    """Optimiser steps from one behaviour to the other, and the KL before the first."""
    model = load_model(start.folder, dtype=torch.float32)
    target = goal.model
    optimiser = Optimiser(dict(model.named_parameters()), LearningRates(RATE, RATE, RATE, RATE), muon=False)
    with torch.no_grad():
        first = float(divergence(model, target, held))
    if first <= EPSILON:
        return 0, first
    for step in range(1, MOST_STEPS + 1):
        batch = [learn[(step * 8 + n) % len(learn)] for n in range(8)]
        divergence(model, target, batch).backward()
        optimiser.step(1.0)
        for parameter in model.parameters():
            parameter.grad = None
        if step % EVERY == 0:
            with torch.no_grad():
                if float(divergence(model, target, held)) <= EPSILON:
                    return step, first
    return MOST_STEPS, first


def contexts(tokenizer, seed: int, count: int, sources: tuple[str, ...]) -> list[list[int]]:
    """Rows of unseen text of every kind the behaviours are about, alike for all pairs."""
    from trivium import world

    rows = []
    for source in sources:
        for document in world.documents(source, split="test", seed=seed, limit=count):
            text = document.text
            if text is None:
                said = document.fields.get("messages") or []
                text = " ".join(str(one.get("content", "")) for one in said)
            ids = tokenizer.encode(text)[:96]
            if len(ids) > 8:
                rows.append(ids)
    generator = np.random.default_rng(seed)
    return [rows[place] for place in generator.permutation(len(rows))]


def main() -> None:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--recipe", default="closeness")
    parser.add_argument("--to", type=Path, default=Path("closeness.json"))
    parser.add_argument("--behaviours", nargs="*", default=list(BEHAVIOURS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--pairs", type=int, default=1, help="how many pairs of seeds for each pair of behaviours"
    )
    parser.add_argument("--most", type=int, help="stop after so many transfers, for a trial")
    chosen = parser.parse_args()
    began = time.monotonic()
    base = find(f"{chosen.recipe}/base", chosen.runs)
    members = {
        (name, seed): find(
            f"{chosen.recipe}/{name}.{seed}" if seed else f"{chosen.recipe}/{name}", chosen.runs
        )
        for name in chosen.behaviours
        for seed in range(1, chosen.seeds + 1)
    }
    keys = list(members)
    for key, member in members.items():
        member.name = f"{key[0]}.{key[1]}"
    _, probes = probe_set(None, list(members.values()), 8, 101)
    table = measures(probe(list(members.values()), base, probes))
    vectors = task_vectors(list(members.values()), base)
    weights = cosines(vectors) if vectors is not None else None
    place = {key: number for number, key in enumerate(keys)}
    sources = ("facts", "chat", "sums", "tongue", "craft", "prose")
    learn, held = (contexts(base.tokenizer, seed, count, sources) for seed, count in ((202, 60), (303, 12)))
    held = held[:48]
    rows: list[dict[str, Any]] = []
    for a, b in itertools.permutations(chosen.behaviours, 2):
        taken = []
        for shift in range(chosen.pairs):
            one, other = (a, 1 + shift % chosen.seeds), (b, 1 + (shift + 1) % chosen.seeds)
            steps, first = steps_between(members[one], members[other], learn, held)
            i, j = place[one], place[other]
            taken.append({
                "steps": steps, "initial_kl": first, "kl": table["kl"][j][i], "js": table["js"][i][j],
                "distance": table["distance"][i][j], "angle": table["angle"][i][j] or 0.0,
                "weight_cosine": weights[i][j] if weights is not None else None,
            })  # fmt: skip
        mean = {
            key: float(np.mean([one[key] for one in taken])) for key in taken[0] if taken[0][key] is not None
        }
        rows.append({"from": a, "to": b, **mean})
        told = f"{mean['steps']:6.1f} steps  KL {mean['initial_kl']:.3f}  angle {mean['angle']:+.2f}"
        print(f"{a:>9} -> {b:<9} {told}", flush=True)  # fmt: skip
        if chosen.most and len(rows) >= chosen.most:
            break
    found = judged(rows, list(chosen.behaviours))
    found |= {
        "rows": rows, "self_agreement": self_agreement(table["angle"], keys), "epsilon": EPSILON,
        "rate": RATE, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    chosen.to.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, one in found["predictors"].items():
        print(f"{name:>14}: Spearman {one['spearman']:+.2f} {one['interval']}, given the initial KL "
              f"{one['partial']:+.2f} {one['partial_interval']}")  # fmt: skip
    print(f"H1: {found['H1']}; H2: {found['H2']}; {found['seconds']} s")


def judged(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Every predictor's correlation with the steps, and what became of the hypotheses."""
    column = lambda some, key: np.array([one[key] for one in some], dtype=float)
    predictors = [key for key in ("initial_kl", "kl", "js", "distance", "angle", "weight_cosine")
                  if all(key in one for one in rows)]  # fmt: skip
    found: dict[str, Any] = {}
    for key in predictors:
        plain = lambda some, key=key: spearman(column(some, "steps"), column(some, key))
        given = lambda some, key=key: partial(
            column(some, "steps"), column(some, key), column(some, "initial_kl")
        )
        found[key] = {
            "spearman": plain(rows), "interval": bootstrap(rows, names, plain), "partial": given(rows),
            "partial_interval": bootstrap(rows, names, given),
        }  # fmt: skip
    angle = found["angle"]
    low, high = angle["partial_interval"]
    covers = low is None or low <= 0 <= high
    return {
        "predictors": found,
        "H1": "supported" if angle["spearman"] <= -0.5 else "refuted",
        "H2": "refuted" if covers or angle["partial"] > -0.2 else "supported",
    }


def self_agreement(angle: list[list[float | None]], keys: list[tuple[str, int]]) -> dict[str, float]:
    """By behaviour the mean angle between its seeds: the ceiling of what can be found."""
    found: dict[str, list[float]] = {}
    for (i, one), (j, other) in itertools.combinations(enumerate(keys), 2):
        value = angle[i][j]
        if one[0] == other[0] and value is not None:
            found.setdefault(one[0], []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


if __name__ == "__main__":
    main()
