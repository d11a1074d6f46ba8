"""The families of word problems: how each tells of a number that grows, shrinks and doubles."""

from dataclasses import dataclass

from trivium.world.words import sentences


@dataclass(frozen=True)
class Family:
    """One kind of story, told in its own words, over one running number."""

    name: str
    people: int
    things: tuple[str, ...]
    openings: tuple[str, ...]
    events: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]


def _families(which: str) -> tuple[Family, ...]:
    return tuple(
        Family(
            name=name,
            people=one["people"],
            things=tuple(one["things"]),
            openings=tuple(one["openings"]),
            events={operation: tuple(told) for operation, told in one["events"].items()},
            questions=tuple(one["questions"]),
        )
        for name, one in sentences("problems")[which].items()
    )


FAMILIES = _families("families")
(UNSEEN,) = _families("unseen")
