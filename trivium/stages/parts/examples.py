"""Examples to learn from, in any of their forms, and what a person is told of them before training begins."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trivium.data.conversations import Learned
from trivium.data.door import Door, Examples
from trivium.data.examples import described, report
from trivium.data.ingredients import Ingredient
from trivium.data.packed import PackedBatches
from trivium.data.preview import previewed
from trivium.data.settings import MixtureSource
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer

ROWS_PER_BATCH = 8


@dataclass
class ExampleSources:
    """The sources of a stage that learns from examples, opened."""

    door: Door
    mixture: Mapping[str, MixtureSource]
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    def tell(self, work: Work, batches: PackedBatches, tokenizer: Tokenizer) -> None:
        """Say what became of every source, and show an example."""
        held_out = {name: self.door.held_out(one) for name, one in self.mixture.items()}
        self.report = report(batches, held_out)
        for name, facts in self.report.items():
            for line in described(name, facts, held_out=facts["held_out_rows"]):
                work.say(line)
        example = previewed(batches.rows(0)[0], tokenizer, colour=sys.stderr.isatty())
        work.say(f"the first row of the first batch:\n{example}")


def open_examples(
    work: Work, tokenizer: Tokenizer, mixture: Mapping[str, MixtureSource], context: int, learned: Learned
) -> ExampleSources:
    """The sources of a mixture, read with this tokenizer as examples of at most `context` tokens."""
    door = Door(work, tokenizer, Examples(context, learned), order=list(mixture))
    return ExampleSources(door, mixture)


def batch_of_examples(wish: int | None, ingredients: Sequence[Ingredient], context: int) -> int:
    """The size of a batch in tokens: what a person says, else a few rows."""
    # Of little data a batch takes one pass at most, or `epochs` would not mean what it says.
    rows = max(1, min(ROWS_PER_BATCH, -(-sum(one.tokens for one in ingredients) // context)))
    return max(wish or rows * context, context)
