"""How far models lie from the first of them on some texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import write_text
from trivium.lab.behaviour import NO_KL, continued, divergence, passages
from trivium.lab.byte_distance import per_byte
from trivium.lab.compare_behaviour import distances
from trivium.lab.formatting import compact, with_ci
from trivium.lab.gather import find_all, stages_above, world_sources

LONGEST_ANSWER = 48


def distance(
    names: Sequence[str],
    *,
    runs: Path,
    prompts: Path | None = None,
    count: int = 24,
    seed: int = 0,
    to: Path | None = None,
) -> list[list[str]]:
    """A table of KL both ways and Jensen-Shannon; every other model against the first, by kind of text.

    Models that cut text into different tokens are compared on bytes.
    """
    if len(names) < 2:
        raise TriviumError("A distance takes two models; name a second one.")
    members = find_all(names, runs)
    first = members[0]
    if prompts is not None:
        texts = continued(first, _lines(prompts), LONGEST_ANSWER, seed)
    else:
        stages = stages_above(member.seen for member in members if member.seen)
        texts = passages(world_sources(stages), count, seed)
    found: list[dict[str, Any]] = []
    for member in members[1:]:
        pair = divergence(member, first, texts, runs / "store" / "answers")
        if pair["why_not"] == NO_KL:
            pair["per byte"] = per_byte(member, first, texts, seed)
        found.append(pair)
        member.forget()
    if to is not None:
        write_text(to, compact(found))
    rows = [["models", "texts", "KL", "KL the other way", "Jensen-Shannon", "n"]]
    for pair in found:
        between = f"{pair['model']} from {pair['before']}"
        for one in pair.get("per byte", []):
            ways = (with_ci(one[name]) for name in ("kl", "reverse"))
            rows.append([between, f"{one['kind']} (per byte)", *ways, "", str(one["kl"]["n"])])
        if pair["why_not"] and not pair.get("per byte"):
            rows.append([between, f"not measured: {pair['why_not']}", "", "", "", ""])
            continue
        for kind in dict.fromkeys(text["kind"] for text in pair["texts"]):
            one = distances([text for text in pair["texts"] if text["kind"] == kind])
            rows.append(
                [
                    between,
                    kind,
                    *(with_ci(one[name]) for name in ("kl", "reverse", "js")),
                    str(one["kl"]["n"]),
                ]
            )
    return rows


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise TriviumError(f"{path} is missing; name a text file with a prompt on each line.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise TriviumError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    if not lines:
        raise TriviumError(f"{path} holds no prompt; write one on each line.")
    return lines
