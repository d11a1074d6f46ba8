"""A graph of stages drawn as a tree."""

from collections.abc import Mapping, Sequence


def below_the_deepest(parents: Mapping[str, Sequence[str]]) -> dict[str | None, list[str]]:
    """The children of every name, each below the deepest of those it needs; those of None are the roots."""
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            depths[name] = 1 + max((depth(parent) for parent in parents[name]), default=-1)
        return depths[name]

    children: dict[str | None, list[str]] = {}
    for name, needed in parents.items():
        children.setdefault(max(needed, key=depth, default=None), []).append(name)
    return children
