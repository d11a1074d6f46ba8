"""Who answers: the teacher of a synthesis, and the models that single steps name in its place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trivium.evals.searching import Searcher
from trivium.generate.asking.asker import Asker
from trivium.generate.asking.budget import Budget, Ledger
from trivium.generate.asking.journal import ANSWERS, Journal, answers_beside, keep_answers
from trivium.generate.asking.writers import EndpointWriter, LocalWriter, Writer
from trivium.generate.endpoint import EndpointSettings
from trivium.generate.engines import EngineChoice
from trivium.model.hub import resolve
from trivium.synthesize.prompted import PromptedStep
from trivium.synthesize.step import Step
from trivium.synthesize.steps.diversify import Diversify


def teachers(
    steps: Sequence[Step], start: str | None, endpoint: EndpointSettings | None,
    place_of: Callable[[str], Path], *, max_rows: int, engine: EngineChoice,
) -> tuple[Writer | None, dict[int, Writer]]:  # fmt: skip
    """The teacher, and who answers single steps in its place; a model that several name is opened once."""
    known: dict[str, Writer] = {}

    def local(name: str) -> Writer:
        if name not in known:
            known[name] = LocalWriter(name, resolve(str(place_of(name))), max_rows, engine, Searcher)
        return known[name]

    def remote(settings: EndpointSettings) -> Writer:
        return known.setdefault(settings.model_dump_json(), EndpointWriter(settings))

    teacher = local(start) if start else remote(endpoint) if endpoint else None
    others: dict[int, Writer] = {}
    for place, step in enumerate(steps):
        if isinstance(step, PromptedStep) and step.model is not None:
            others[place] = local(step.model)
        elif isinstance(step, PromptedStep) and step.endpoint is not None:
            others[place] = remote(step.endpoint)
        elif isinstance(step, Diversify) and step.embed not in ("own", "none"):
            others[place] = local(step.embed)
    return teacher, others


@contextmanager
def asking(writers: Sequence[Writer | None], budget: Budget, folder: Path) -> Iterator[Asker]:
    """Ask within a budget, with every answer in the stage's journal; then close all and keep the answers."""
    opened = [one for one in writers if one is not None]
    journal = Journal(
        folder / "checkpoints" / ANSWERS, [one.identity for one in opened], answers_beside(folder)
    )
    try:
        yield Asker(journal, Ledger(budget, spent=journal.spent))
    finally:
        journal.close()
        for one in opened:
            one.close()
    keep_answers([journal.path], folder / ANSWERS)
