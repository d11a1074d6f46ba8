"""`docs/economics.md`: questions about money, answered by plans, with the command under every table.

python -m trivium.pipeline.economics > docs/economics.md
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trivium.kit.progress import duration
from trivium.lab.planner.catalogue import machines
from trivium.lab.planner.estimate import Estimate
from trivium.pipeline.plan import planned

QUESTIONS = "recipes/questions"
INTRODUCTION = """# What it costs

Every number on this page comes from `trivium plan`, by the command under its table, and a test computes them
all again. FLOPs are counted from shapes; times and prices follow from the catalogue of machines
(`trivium/lab/planner/machines.yaml`): {dollars} dollars for an H100 and hour, and the share of its peak that
published trainings reached. The recipes are in `recipes/questions`; their data are stand-ins. A real budget
adds failed runs, experiments, data and people.
"""


@dataclass(frozen=True)
class Question:
    """A question, the recipe that asks it, the stages whose plan answers it, and what follows."""

    title: str
    recipe: str
    on: str
    stages: tuple[str, ...]
    says: str
    """A sentence with `{name:ratio}` places, filled from the plan."""
    changes: tuple[str, ...] = ()


ASKED = (
    Question(
        "What does a context of 2k cost in pre-training?", "context", "h100:512", ("base",),
        "A trillion tokens at 2k: attention is a small part.",
    ),
    Question(
        "And of 32k?", "context", "h100:512", ("base",),
        "The same tokens at 32k cost about twice as much, all of it attention.", ("stages.base.context=32k",),
    ),
    Question(
        "And 32k in mid-training alone?", "context", "h100:512", ("base", "long"),
        "A twentieth of the tokens at 32k, after a base at 2k: the long context costs a tenth of the base "
        "in place of doubling it.",
    ),
    Question(
        "A language by mid-training, or from nothing?", "language", "h100:512", ("added", "scratch"),
        "Where a base exists, the language costs the tokens that teach it. From nothing it costs all again.",
    ),
    Question(
        "What does each stage cost of the whole, for a model like Llama 3.1 8B?", "llama", "h100:512",
        ("base", "mid", "long", "sft", "dpo", "rl"),
        "Nearly everything is pre-training: what makes an assistant of a base is a small part of its price.",
    ),
    Question(
        "And for a model of 280B parameters on 13T tokens?", "large", "h100:4096",
        ("base", "mid", "long", "sft", "dpo", "rl"),
        "The shares are alike; the sum is thirty times as large.",
    ),
    Question(
        "Why not do everything in pre-training?", "everything", "h100:512", ("base",),
        "Once, it costs the same. But with every new wish the whole sum is due again; in a stage of its own "
        "a wish costs what `mid` or `long` cost above.",
    ),
    Question(
        "Grow, then train?", "grow", "h100:512", ("base", "grown"),
        "Half the depth for half the tokens saves a quarter of the layers' work, if the grown model ends as "
        "well (`experiments/growth` asks that).",
    ),
)  # fmt: skip


def command(one: Question) -> str:
    """What to type for a table."""
    changes = "".join(f" --set {change}" for change in one.changes)
    return f"trivium plan {QUESTIONS}/{one.recipe}.yaml --on {one.on}{changes}"


@cache
def answers(one: Question, root: Path) -> dict[str, Estimate]:
    """The plan of every stage of a question's recipe."""
    with tempfile.TemporaryDirectory() as runs:
        found = planned(root / QUESTIONS / f"{one.recipe}.yaml", runs, one.changes, on=one.on)
    return {estimate.job.stage: estimate for estimate in found.estimates}


def table(one: Question, root: Path) -> Iterator[str]:
    """The rows of a question's table, as Markdown."""
    found = answers(one, root)
    whole = sum(estimate.dollars for estimate in found.values() if estimate.flops.total)
    yield "| stage | tokens | FLOPs | in attention | layout | GiB a device | time | dollars | share |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in one.stages:
        each = found[name]
        yield (
            f"| {name} | {each.job.tokens:.3g} | {each.flops.total:.3g} | "
            f"{each.flops.attention / each.flops.total:.1%} | {each.layout.described()} | "
            f"{each.memory.total / 2**30:.0f} | {duration(each.seconds)} | {each.dollars:,.0f} | "
            f"{each.dollars / whole:.2%} |"
        )
        if len(each.phases) > 1 and "generation" in each.phases:
            for phase, spent in each.phases.items():
                yield (
                    f"| {name}: {phase} | {spent['tokens']:.3g} | {spent['flops']:.3g} | | | | "
                    f"{duration(spent['seconds'])} | | |"
                )


def page(root: Path) -> str:
    """The whole page."""
    dollars = machines()["h100"]["price"]["dollars"]
    parts = [INTRODUCTION.format(dollars=f"{dollars:.2f}")]
    for one in ASKED:
        parts.append(f"## {one.title}\n\n{one.says}\n")
        parts.append("\n".join(table(one, root)) + f"\n\n```\n{command(one)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(Path(".")), end="")
