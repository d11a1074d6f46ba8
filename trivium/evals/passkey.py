"""What a model finds in a long text: by how long the text is and how deep the thing lies in it."""

from collections.abc import Callable, Sequence
from typing import Any

from trivium import world
from trivium.evals.asking import Item, Subject, ask, first_sentence
from trivium.evals.knowledge import first_question
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.statistics import Interval, proportion
from trivium.evals.task import Found, as_task, listed, number_option
from trivium.kit.errors import TriviumError
from trivium.world.checks import fulfils

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS = ("passkey", "needle", "keys", "variables", "words")
ENOUGH = 0.9
ASKED_AS = {
    "kind": "kinds", "depth": "depths", "characters": "lengths", "tokens": "lengths",
    "characters_per_token": "lengths",
}  # fmt: skip
"""Options of the chronicle which the task sets itself, and what a person writes instead."""
ROOM = 16
SHORTEST = 64


def characters_per_token(subject: Subject, settings: Settings) -> float:
    """How many characters a token of a chronicle stands for in this tokenizer."""
    texts = [one.prompt for one in world.questions("chronicle", "validation", seed=settings.seed, limit=4)]
    return sum(map(len, texts)) / sum(len(subject.tokenizer.encode(text)) for text in texts)


def _first_of_each(
    settings: Settings, lengths: Any = None, depths: Any = None, kinds: Any = None, **options: Any
) -> None:
    for option, own in ASKED_AS.items():
        if option in options:
            raise TriviumError(f"The task passkey has no option '{option}'; write `{own}`.")
    wanted_lengths, wanted_depths, wanted_kinds = _grid(lengths, depths, kinds)
    if any(length < 1 for length in wanted_lengths):
        raise TriviumError(f"The task passkey has no use for lengths={lengths}; write how many tokens.")
    for kind in wanted_kinds:
        if kind not in KINDS:
            raise TriviumError(f"The task passkey has no kind '{kind}'; it has {', '.join(KINDS)}.")
        for depth in wanted_depths:
            first_question("chronicle")(settings, kind=kind, depth=depth, **options)


@as_task("passkey", ("accuracy",), ("samples",), _first_of_each)
def run_passkey(
    subject: Subject,
    settings: Settings,
    lengths: str | list[int] | None = None,
    depths: str | list[float] | None = None,
    kinds: str | list[str] | None = None,
    **options: Any,
) -> Found:
    """Things hidden in long texts: pass keys, a needle, several keys, chains of variables, common words.
    `effective context` is the longest length up to which 90 % of the keys are found at every length asked,
    so it is 0 where the shortest falls below that, whatever is found at longer ones; with fewer than 35
    keys a length the low end of its interval is 0.

    A grid of lengths (in tokens) and depths, for each kind of thing that is hidden.
    """
    wanted_lengths, wanted_depths, wanted_kinds = _grid(lengths, depths, kinds)
    wanted_lengths = wanted_lengths or [
        one for one in (subject.window // 4, subject.window // 2, subject.window - ROOM) if one >= SHORTEST
    ]
    if not wanted_lengths:
        raise TriviumError(f"The model's window of {subject.window} tokens is too short to hide anything in.")
    cells = [
        (kind, length, depth) for length in wanted_lengths for depth in wanted_depths for kind in wanted_kinds
    ]
    letters = characters_per_token(subject, settings)
    items = []
    for number in range(max(settings.limit, len(cells))):
        kind, length, depth = cells[number % len(cells)]
        items.append(_item(subject, settings, number, kind, length, depth, letters, options))
    records = ask(subject, items, settings, most=12, cut=first_sentence)
    found = effective_context(records) if "passkey" in wanted_kinds else None
    return Found(records, {} if found is None else {"effective context": found}, style="continue")


def _grid(lengths: Any, depths: Any, kinds: Any) -> tuple[list[int], list[float], list[str]]:
    """What a person wrote of the grid, or what stands for it; no lengths are left to the model's window."""
    return (
        [number_option("passkey", "lengths", one, int) for one in listed(lengths)],
        [number_option("passkey", "depths", one, float) for one in listed(depths)] or list(DEPTHS),
        [str(one) for one in listed(kinds)] or list(KINDS),
    )


def effective_context(records: Sequence[Record]) -> Interval:
    """The longest length up to which 90 % of the pass keys are found at every length asked; 0 for none."""
    keys = [record for record in records if record.groups["kind"] == "passkey"]
    lengths = sorted({int(record.groups["length"]) for record in keys})
    shares = {
        length: proportion([one.scores["accuracy"] for one in keys if one.groups["length"] == str(length)])
        for length in lengths
    }

    def longest(of: Callable[[Interval], float]) -> float:
        reached = 0.0
        for length in lengths:
            if of(shares[length]) < ENOUGH:
                break
            reached = float(length)
        return reached

    return Interval(
        longest(lambda one: one.value), longest(lambda one: one.low), longest(lambda one: one.high), len(keys)
    )


def _item(
    subject: Subject,
    settings: Settings,
    number: int,
    kind: str,
    length: int,
    depth: float,
    letters: float,
    options: dict[str, Any],
) -> Item:
    """A chronicle of at most so many tokens, a little shorter where it came out too long."""
    characters = round(length * letters)
    while True:
        question = next(
            world.questions(
                "chronicle", "test", seed=settings.seed, start=number, limit=1,
                **{**options, "kind": kind, "characters": characters, "depth": depth},
            )
        )  # fmt: skip
        if len(subject.text_ids(question.prompt)) <= length or characters < SHORTEST:
            break
        characters = round(characters * 0.95)
    # A chronicle is a text to be continued, whatever else the model has learnt.
    return Item(
        question.id, question.prompt, question.messages, question.answer,
        lambda text: {"accuracy": float(fulfils(text, question.check))},
        groups={"length": str(length), "depth": f"{depth:g}", "kind": kind,
                "length and depth": f"{length} {depth:g}"},
        style="continue",
    )  # fmt: skip
