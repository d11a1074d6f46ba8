"""The country's words and sentences, read from the files in `text/`."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

TEXT = Path(__file__).parent / "text"


@cache
def sentences(name: str) -> dict[str, Any]:
    """The content of a file of words or sentences."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content: dict[str, Any] = yaml.load((TEXT / f"{name}.yaml").read_text(encoding="utf-8"), loader)
    return content


def words(line: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(line.split())


def listed(name: str) -> tuple[str, ...]:
    """One of the word lists."""
    return words(sentences("words")[name])


CRAFTS = listed("crafts")
ANIMALS = listed("animals")
GOODS = listed("goods")
REGIONS = listed("regions")
AGES = listed("ages")
THINGS = listed("things")
LOOKS = listed("looks")
