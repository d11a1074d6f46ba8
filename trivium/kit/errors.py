"""The errors that are told to a person in one sentence."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class TriviumError(Exception):
    """One sentence for a person: what is wrong, where, and how to fix it."""


class DamagedError(TriviumError):
    """A file is not what was written to it; an older copy or another run can replace it."""


@contextmanager
def needing(sentence: str) -> Iterator[None]:
    """Say so where what is imported within is not installed."""
    try:
        yield
    except ImportError as error:
        raise TriviumError(sentence) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` when something known is near, else nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""
