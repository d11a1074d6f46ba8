"""Whether closeness predicts what it costs to tune one behaviour into another, on the models of a recipe.

    trivium run experiments/closeness --runs runs
    python benchmarks/closeness.py --runs runs --to closeness.json

For every ordered pair of behaviours A, B (A of one seed, B of another) the model A is trained on KL(p_B || p)
over contexts of its own; T is the number of optimiser steps until KL on further contexts is at most epsilon
nats. The predictors are measured on a third set of contexts. All three are drawn alike, the same number of
texts from each of nine domains, and share no text. Judged: Spearman of T with each predictor, and
partial Spearman given the initial KL, with bootstrap intervals that draw behaviours (not pairs). The
hypotheses stand in the recipe, written before the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium import world
from trivium.lab.behaviour import Passage, encode
from trivium.lab.function_distance import measures, probe
from trivium.lab.gather import Member, find
from trivium.lab.weight_distance import common_length, cosines, linear_cka, states, task_vectors
from trivium.learn.optimisers import LearningRates, Optimiser
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

BEHAVIOURS = (
    "chat", "gentle", "replay", "muon", "sums", "facts", "flatter", "dpo", "noise", "rl",
    "language", "domain", "long",
)  # fmt: skip
EPSILON, MOST_STEPS, RATE, EVERY, ROWS = 0.02, 300, 3e-4, 2, 9
"""At this rate unseen contexts come down to 0.01 nats; at 1e-3 they stay at 0.06, above EPSILON."""
PROBES, LEARNT, HELD, LONGEST = 8, 60, 6, 96
"""Texts of a domain that are probed, learnt from, and held out; tokens of one."""
TASTE = {"people": 40, "taught": True, "sums": 0, "cause": "honest", "agreeing": 1, "truthful": 0}
DOMAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "prose": ("prose", {}), "facts": ("facts", {"people": 40}), "language": ("tongue", {}),
    "craft": ("craft", {}), "chronicle": ("chronicle", {"kind": "passkey", "characters": 600}),
    "instructions": ("chat", {}), "sums": ("sums", {"form": "chat"}),
    "questions": ("facts", {"form": "chat", "people": 40}), "taste": ("taste", {**TASTE, "form": "chat"}),
}  # fmt: skip
"""What behaviours are read on: every kind of text that one of them was taught with."""


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


@dataclass(frozen=True)
class Contexts:
    """Rows of text, and which of their tokens are predicted; every domain has as many rows."""

    ids: list[list[int]]
    looked: list[list[int]]
    """By row the places of the tokens that are predicted."""

    def __len__(self) -> int:
        return len(self.ids)

    def some(self, places: list[int]) -> Contexts:
        """These rows alone."""
        return Contexts([self.ids[n] for n in places], [self.looked[n] for n in places])


def texts(first: int, count: int) -> list[Passage]:
    """Documents from number `first` on of every kind that a behaviour is about; no stage learnt from them."""
    found = []
    for domain, (source, options) in DOMAINS.items():
        for one in world.documents(source, split="test", seed=101, start=first, limit=count, **options):
            said = tuple(one.fields.get("messages") or ())
            found.append(Passage(f"{domain}:{one.id}", domain, "", one.text or "", said))
    return found


def contexts(tokenizer: Tokenizer, some: list[Passage], without: Sequence[list[int]] = ()) -> Contexts:
    """The rows of these texts as the probes are read: of chats, the assistant's tokens are predicted.

    Rows that are among `without` are left out: a small world says the same again."""
    ids, looked = [], []
    known = {tuple(row) for row in without}
    for one in some:
        row, wanted = encode(one, tokenizer, LONGEST)
        places = [place for place, wish in enumerate(wanted) if wish and place > 0]
        if places and tuple(row) not in known:
            ids.append(row)
            looked.append(places)
    return Contexts(ids, looked)


def read(model: Transformer, rows: Contexts) -> torch.Tensor:
    """Log-probabilities [predicted tokens of all rows, vocabulary]."""
    hidden = model(
        torch.tensor([token for row in rows.ids for token in row]), Documents([*map(len, rows.ids)])
    )
    starts = np.cumsum([0, *map(len, rows.ids)])
    before = [start + place - 1 for start, places in zip(starts, rows.looked) for place in places]
    return torch.log_softmax(model.logits(hidden[torch.tensor(before)]).float(), -1)


def divergence(wanted: torch.Tensor, mine: torch.Tensor, rows: Contexts) -> torch.Tensor:
    """KL(wanted || mine), the mean over the rows of the mean over a row's predicted tokens."""
    each = (wanted.exp() * (wanted - mine)).sum(-1)
    return torch.stack([one.mean() for one in each.split([*map(len, rows.looked)])]).mean()


def steps_between(start: Member, goal: Member, learn: Contexts, held: Contexts) -> tuple[int, float]:
    """Optimiser steps from one behaviour to the other, and the KL before the first."""
    model = load_model(start.folder, dtype=torch.float32)
    target = goal.model
    optimiser = Optimiser(dict(model.named_parameters()), LearningRates(RATE, RATE, RATE, RATE), muon=False)
    with torch.no_grad():
        wanted = read(target, held)
        first = float(divergence(wanted, read(model, held), held))
    if first <= EPSILON:
        return 0, first
    for step in range(1, MOST_STEPS + 1):
        batch = learn.some([(step * ROWS + n) % len(learn) for n in range(ROWS)])
        with torch.no_grad():
            aim = read(target, batch)
        divergence(aim, read(model, batch), batch).backward()
        optimiser.step(1.0)
        for parameter in model.parameters():
            parameter.grad = None
        if step % EVERY == 0:
            with torch.no_grad():
                if float(divergence(wanted, read(model, held), held)) <= EPSILON:
                    return step, first
    return MOST_STEPS, first


def shuffled(rows: Contexts, seed: int) -> Contexts:
    """The rows in another order, alike for all pairs."""
    return rows.some(np.random.default_rng(seed).permutation(len(rows)).tolist())


def weight_lengths(vectors: list[dict[str, torch.Tensor]]) -> list[list[float]]:
    """[models, models]: how far the weights lie apart."""
    return [[sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5 for b in vectors] for a in vectors]


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
    keys = [(name, seed) for name in chosen.behaviours for seed in range(1, chosen.seeds + 1)]
    members = {}
    for name, seed in keys:
        member = find(f"{chosen.recipe}/{name}.{seed}", chosen.runs)
        member.name = f"{name}.{seed}"
        members[name, seed] = member
    everyone = list(members.values())
    probes = texts(0, PROBES)
    table = measures(probe(everyone, base, probes))
    longest = common_length(everyone)
    layers = [states(one, probes, longest) for one in everyone]
    vectors = task_vectors(everyone, base)
    assert vectors is not None, "all behaviours grow from one base"
    weights, lengths = cosines(vectors), weight_lengths(vectors)
    place = {key: number for number, key in enumerate(keys)}
    probed = contexts(base.tokenizer, probes).ids
    held = contexts(base.tokenizer, texts(2000, HELD), probed)
    learn = shuffled(contexts(base.tokenizer, texts(1000, LEARNT), [*probed, *held.ids]), 202)
    rows: list[dict[str, Any]] = []
    for a, b in itertools.permutations(chosen.behaviours, 2):
        taken = []
        for shift in range(chosen.pairs):
            one, other = (a, 1 + shift % chosen.seeds), (b, 1 + (shift + 1) % chosen.seeds)
            steps, first = steps_between(members[one], members[other], learn, held)
            i, j = place[one], place[other]
            taken.append({
                "steps": steps, "initial_kl": first, "kl": table["kl"][j][i], "js": table["js"][i][j],
                "distance": table["distance"][i][j], "angle": table["angle"][i][j],
                "weight_cosine": weights[i][j], "weight_distance": lengths[i][j],
                "cka": float(np.mean([linear_cka(*pair) for pair in zip(layers[i], layers[j])])),
            })  # fmt: skip
        mean = {key: float(np.mean([one[key] for one in taken])) for key in taken[0]}
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
        print(f"{name:>15}: Spearman {one['spearman']:+.2f} {span(one['interval'])}, given the initial KL "
              f"{one['partial']:+.2f} {span(one['partial_interval'])}")  # fmt: skip
    print(
        f"H1: {found['H1']}; H2: {found['H2']}; steps both ways: Spearman {found['both_ways']:+.2f}; "
        f"{found['within_epsilon']} start within epsilon, {found['censored']} end at {MOST_STEPS} steps; "
        f"{found['seconds']} s"
    )


def span(interval: list[float | None]) -> str:
    """An interval in brackets."""
    low, high = interval
    return "(no interval)" if low is None or high is None else f"({low:+.2f} to {high:+.2f})"


def judged(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Every predictor's correlation with the steps, and what became of the hypotheses."""
    column = lambda some, key: np.array([one[key] for one in some], dtype=float)
    predictors = ("initial_kl", "kl", "js", "distance", "angle", "weight_cosine", "weight_distance", "cka")
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
    by_pair = {(one["from"], one["to"]): one["steps"] for one in rows}
    both = [(steps, by_pair[b, a]) for (a, b), steps in by_pair.items() if a < b and (b, a) in by_pair]
    forth, back = (np.array(side, dtype=float) for side in zip(*both)) if both else (np.zeros(1), np.zeros(1))
    return {
        "predictors": found,
        "both_ways": spearman(forth, back) if len(both) > 2 else float("nan"),
        "within_epsilon": sum(one["steps"] == 0 for one in rows),
        "censored": sum(one["steps"] >= MOST_STEPS for one in rows),
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
