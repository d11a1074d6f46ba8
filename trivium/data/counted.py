"""Examples that are counted and not packed: preference pairs, and solutions whose steps have labels.

Each source is read, reported and divided by prompt; a batch is so many examples, whatever their length.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from trivium.data.batches import PlannedBatches
from trivium.data.conversations import Tally
from trivium.data.door import Place, documents
from trivium.data.examples import described
from trivium.data.mixture import MixturePlan, PlannedSource, weights_over
from trivium.data.settings import MixtureSource, all_weighted_or_none
from trivium.data.shapes import Fields
from trivium.data.sources import Document, Reading
from trivium.data.split import in_validation, prompt_hash
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint


class Counted(Protocol):
    """An example with a prompt, by which sources are divided."""

    @property
    def id(self) -> str: ...

    @property
    def prompt(self) -> np.ndarray: ...


Item = TypeVar("Item", bound=Counted)


class RowReader(Generic[Item]):
    """Makes examples of the rows of one source; counts what became of each."""

    def __init__(self) -> None:
        self.tally = Tally()

    def read(self, documents: Iterable[Document], *, skip: bool = False) -> Iterator[Item]:
        """Every example that fits; a row that cannot be read stops the reading, or is counted."""
        for document in documents:
            self.tally.rows += 1
            try:
                parsed = self.parsed(document.fields)
            except TriviumError as error:
                if not skip:
                    raise TriviumError(f"{document.id} {error}; fix it or set `on_bad: skip`.") from None
                self.tally.unfit += 1
                self.tally.name(document, str(error))
                continue
            fitted = self.fitted(document, *parsed)
            if fitted is not None:
                yield fitted

    def parsed(self, fields: Fields) -> tuple[Any, ...]:
        """What a row holds, tokenised: the further arguments of `fitted`."""
        raise NotImplementedError

    def fitted(self, document: Document, *parsed: Any) -> Item | None:
        """As much of it as the context has room for, counted; None where nothing is left to learn."""
        raise NotImplementedError


@dataclass(frozen=True)
class CountedSource(Generic[Item]):
    """One source of a mixture of counted examples, and how it takes part."""

    name: str
    items: Sequence[Item]
    weights: tuple[tuple[float, float], ...] | None = None
    max_repeats: float | None = None


@dataclass(frozen=True)
class CountedSources(Generic[Item]):
    """All sources of a stage: what is learned from, what is held out, and what became of each row."""

    training: list[CountedSource[Item]] = field(default_factory=list)
    validation: list[CountedSource[Item]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_counted(
    work: Place,
    mixture: Mapping[str, MixtureSource],
    reader_of: Callable[[], RowReader[Item]],
    *,
    called: str,
    cut: str,
    learned: str,
    accept: Callable[[str, list[Item]], list[Item]] = lambda name, items: items,
) -> CountedSources[Item]:
    """Read every source; examples of one prompt are all learned from, or all held out.

    `accept` refuses or changes what a source holds; `called`, `cut` and `learned` are words of the report.
    """
    all_weighted_or_none(work.stage, mixture)
    found: CountedSources[Item] = CountedSources()
    for name, source in mixture.items():
        reading, reader = Reading(), reader_of()
        items = list(reader.read(documents(work, [source], reading), skip=source.on_bad == "skip"))
        tally = {**reader.tally.facts(), "bad": reading.bad, "empty": reading.empty}
        tally["named"] = [*reading.named, *tally["named"]]
        if not items:
            because = f"; {tally['named'][0]}" if tally["named"] else ""
            raise TriviumError(f"{name}: none of its {tally['rows']} rows can be learned from{because}.")
        items = accept(name, items)
        is_held = [in_validation(prompt_hash(one.prompt), source.validation) for one in items]
        if all(is_held):
            raise TriviumError(
                f"{name}: `validation: {source.validation:g}` holds out all of its {len(items)} {called}, so "
                "nothing is left to learn from; lower it or give the source more prompts."
            )
        seen = [one for one, held in zip(items, is_held, strict=True) if not held]
        held_out = [one for one, held in zip(items, is_held, strict=True) if held]
        weights = None if source.weight is None else weights_over(source.weight)
        found.training.append(CountedSource(name, seen, weights, source.max_repeats))
        found.validation.append(CountedSource(name, held_out))
        tally |= {"learned_from": len(seen), "held_out": len(held_out)}
        for line in described(name, tally, held_out=len(held_out), cut=cut, learned=learned):
            work.say(line)
        found.facts[name] = tally
    return found


class CountedBatches(PlannedBatches, Generic[Item]):
    """Counted examples as batches: so many of them make an optimiser step."""

    def __init__(
        self,
        sources: Sequence[CountedSource[Item]],
        *,
        batch: int,
        seed: int,
        steps: int | None = None,
        epochs: float | None = None,
    ) -> None:
        self.sources = [source for source in sources if len(source.items)]
        self.plan = MixturePlan.of_examples(
            [
                PlannedSource(
                    name=source.name,
                    rows=len(source.items),
                    weights=source.weights or ((0.0, float(len(source.items))),),
                    max_repeats=source.max_repeats,
                    fingerprint=fingerprint([self.identity(one) for one in source.items]),
                )
                for source in self.sources
            ],
            batch=batch, seed=seed, steps=steps, epochs=epochs,
        )  # fmt: skip

    def identity(self, item: Item) -> Any:
        """What tells an example from others in the fingerprint of its source."""
        return item.id

    @property
    def fingerprint(self) -> str:
        """Changes when any batch could change."""
        return fingerprint([self.plan.hash, self.plan.batch])
