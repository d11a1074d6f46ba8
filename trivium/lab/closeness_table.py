"""Behaviours beside each other: all pairs of models on versioned probes, as matrices, a tree and an order."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint
from trivium.lab.behaviour import Passage, passages
from trivium.lab.function_distance import measures, probe
from trivium.lab.gather import Member, Seen, find, find_all, stages_above, world_sources
from trivium.lab.weight_distance import inside
from trivium.model.flops import parameter_count
from trivium.model.folder import load_config

PROBES = Path(__file__).with_name("probes")
VERSION = "general-1"


def probe_set(
    name: str | None, members: Sequence[Member], count: int, seed: int
) -> tuple[str, list[Passage]]:
    """The contexts: a versioned set, a file like one, or unseen texts of the world they learnt from."""
    if name is None:
        sources = world_sources(stages_above(one.seen for one in members if one.seen))
        if sources:
            return f"world, seed {seed}, {count} of a kind", passages(sources, count, seed)
        name = VERSION
    path = PROBES / f"{name}.jsonl"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in PROBES.glob("*.jsonl")))
        raise TriviumError(f"--probes {name} is no file and no probe set; there are {known}.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            before = str(row.get("before", ""))
            found.append(Passage(f"{path.stem}:{number}", str(row["domain"]), before, row["text"]))
        except (ValueError, KeyError, TypeError):
            raise TriviumError(f"{path}:{number} is no row with `domain` and `text`; correct it.") from None
    if not found:
        raise TriviumError(f"{path} holds no probe; write rows with `domain` and `text`.")
    return f"{path.stem}, {fingerprint([vars(one) for one in found])}", found


def chain(seen: Seen) -> list[Path]:
    """A stage and everything its model grew from, the nearest first."""
    found = [seen.folder.resolve()]
    while True:
        start = Seen("", found[-1]).start
        if start is None or not (start / "stage.yaml").is_file():
            return found
        found.append(start.resolve())


def common_base(members: Sequence[Member]) -> Member:
    """The nearest stage that all models grew from; without one, the first of them."""
    if any(one.seen is None for one in members):
        return members[0]
    chains = [chain(one.seen) for one in members if one.seen is not None]
    for folder in chains[0]:
        if all(folder in one for one in chains):
            seen = Seen(str(Seen("", folder).record.get("stage", folder.name)), folder)
            for member in members:
                if member.seen is not None and member.seen.folder.resolve() == folder:
                    return member
            if seen.model is not None:
                return Member(seen.name, seen.model, seen)
    return members[0]


def closeness(
    names: Sequence[str], *, runs: Path, base: str | None = None, probes: str | None = None, count: int = 24,
    seed: int = 0, weights: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Every measure between every two models, ready for JSON."""
    if len(names) < 2:
        raise TriviumError("A distance takes two models; name a second one.")
    members = find_all(names, runs)
    start = common_base(members) if base is None else find(base, runs)
    described, texts = probe_set(probes, members, count, seed)
    return closeness_of(members, start, described, texts, seed=seed, weights=weights)


def closeness_of(
    members: Sequence[Member], start: Member, described: str, texts: Sequence[Passage],
    *, seed: int = 0, weights: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The measures between these models, from this base, on these probes."""
    found = probe(members, start, texts)
    if not len(found.kinds):
        raise TriviumError("No probe fits into the models' windows, or none has a border that all share.")
    table = measures(found)
    result = {
        "models": [one.name for one in members], "base": start.name, "probes": described, "unit": found.unit,
        "contexts": int(found.counts.sum()), **table,
    }  # fmt: skip
    if weights:
        result |= inside(members, start, texts, seed)
    return result | {
        "seeds": agreement(members, result["inner"]),
        "tree": tree(result["models"], table["distance"]),
    }


def agreement(members: Sequence[Member], inner: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Where models differ by their seed alone: how far a training agrees with itself, which bounds the rest.

    K(A, B) is the mean of <A_s, B_s'> over different seeds; rho = K(A, B) / sqrt(K(A, A) K(B, B)) is the
    angle without the noise of seeds.
    """
    groups: dict[str, list[int]] = {}
    for place, member in enumerate(members):
        if member.seen is None:
            return None
        record = member.seen.record
        settings = {
            key: value for key, value in (record.get("settings") or {}).items() if key not in ("seed", "from")
        }
        key = fingerprint([record["kind"], settings, _origin(record)])
        groups.setdefault(key, []).append(place)
    if max(map(len, groups.values())) < 2:
        return None
    names, several = [], list(groups.values())
    for some in several:
        names.append(members[some[0]].name)
    table = np.array(inner)

    def kernel(a: list[int], b: list[int]) -> float:
        pairs = [table[i, j] for i in a for j in b if i != j]
        return float(np.mean(pairs)) if pairs else float("nan")

    k = np.array([[kernel(a, b) for b in several] for a in several])
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = k / np.sqrt(np.diag(k)[:, None] * np.diag(k)[None, :])
        own = [k[n, n] / np.mean([table[i, i] for i in some]) for n, some in enumerate(several)]
    tidy = lambda value: None if np.isnan(value) else round(float(value), 6)
    return {
        "groups": names, "members": [[members[i].name for i in some] for some in several],
        "self_agreement": [tidy(one) for one in own], "rho": [[tidy(one) for one in row] for row in rho],
    }  # fmt: skip


def _origin(record: Mapping[str, Any]) -> str:
    """What a stage starts from, without the fingerprint that a seed changes."""
    start = (record.get("settings") or {}).get("from")
    parent = (record.get("parents") or {}).get(start, "")
    return str(parent).rpartition("-")[0].rstrip("0123456789.")


def tree(names: Sequence[str], distance: Sequence[Sequence[float]]) -> Any:
    """Average linkage: the two nearest groups are joined until one is left: [height, left, right], a name."""
    groups: list[tuple[Any, list[int]]] = [(name, [place]) for place, name in enumerate(names)]
    table = np.array(distance, dtype=float)
    while len(groups) > 1:
        best = min(
            (float(table[np.ix_(a[1], b[1])].mean()), i, j)
            for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j
        )  # fmt: skip
        height, i, j = best
        joined = ([round(height, 6), groups[i][0], groups[j][0]], groups[i][1] + groups[j][1])
        groups = [one for place, one in enumerate(groups) if place not in (i, j)] + [joined]
    return groups[0][0]


def drawn(node: Any, lead: str = "", branch: str = "") -> list[str]:
    """The tree as lines of text."""
    if isinstance(node, str):
        return [lead + branch + node]
    height, left, right = node
    inner = lead + {"": "", "├ ": "│ ", "└ ": "  "}[branch]
    return [f"{lead}{branch}{height:.3g}", *drawn(left, inner, "├ "), *drawn(right, inner, "└ ")]


def tables(found: Mapping[str, Any]) -> list[list[list[str]]]:
    """Distance, angle and KL as tables for a terminal."""
    made = []
    for name in ("distance", "angle", "kl", "js", "task_vector", "task_vector_fisher"):
        if not found.get(name):
            continue
        errors = found["standard_error"].get(name)
        rows = [[name.replace("_", " "), *found["models"]]]
        for i, row in enumerate(found[name]):
            cells = ["" if x is None else f"{x:.3g}" + _error(errors, i, j) for j, x in enumerate(row)]
            rows.append([found["models"][i], *cells])
        made.append(rows)
    return made


def _error(errors: Any, i: int, j: int) -> str:
    one = None if errors is None or i == j else errors[i][j]
    return "" if one is None else f" ±{one:.1g}"


def suggested(
    names: Sequence[str], goal: str, *, runs: Path, probes: str | None = None, count: int = 24, seed: int = 0
) -> list[list[str]]:
    """Models in the order of what it should cost to train each to the goal's behaviour.

    The cost is predicted from KL(goal || model), which ordered the measured steps best where this was tried;
    the angle from their common base stands beside it.
    """
    found = closeness([*names, goal], runs=runs, probes=probes, count=count, seed=seed, weights=False)
    last = len(names)
    order = sorted(range(last), key=lambda place: found["kl"][last][place])
    nearest = max(found["kl"][last][order[0]], 1e-9)
    rows = [["start from", "KL(goal || it)", "±", "times the nearest", "Jensen-Shannon", "angle"]]
    for place in order:
        kl, angle = found["kl"][last][place], found["angle"][last][place]
        error = found["standard_error"]["kl"][last][place]
        rows.append([
            found["models"][place], f"{kl:.4g}", "" if error is None else f"{error:.2g}",
            f"{kl / nearest:.3g}", f"{found['js'][last][place]:.4g}", "" if angle is None else f"{angle:.3g}",
        ])  # fmt: skip
    return rows


REPORTED = 6
"""Probes of a kind in a report."""
SHARE_OF_MEMORY = 0.25


def in_report(members: Sequence[Member]) -> dict[str, Any] | None:
    """The distances of all models of a report, where there are three of one vocabulary that fit together."""
    if len(members) < 3 or len({one.tokenizer.fingerprint for one in members}) > 1:
        return None
    needed = sum(4 * parameter_count(load_config(one.folder)) for one in members)
    if needed > SHARE_OF_MEMORY * machine.describe().device_memory:
        return None
    described, texts = probe_set(None, members, REPORTED, 0)
    try:
        return closeness_of(members, common_base(members), described, texts, weights=False)
    finally:
        for one in members:
            one.forget()
