"""What a synthesis may spend, and what it has spent: reserved before a request, settled after it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from pydantic import Field

from trivium.kit.numbers import Count
from trivium.kit.settings import Settings

BYTES_OF_A_TOKEN = 16
"""A token has fewer bytes on average; a server that counts fewer tokens than this makes of a text is not
believed."""


class Budget(Settings):
    """The most that may be spent; what is left out is not limited."""

    tokens: Count | None = Field(default=None, ge=1)
    """Tokens of prompts and answers together."""
    requests: Count | None = Field(default=None, ge=1)
    """Requests, failed ones included."""
    money: float | None = Field(default=None, gt=0)
    """In the currency of the endpoint's prices."""


@dataclass
class Cost:
    """An amount of each."""

    tokens: int = 0
    requests: int = 0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.requests + other.requests, self.money + other.money)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.tokens - other.tokens, self.requests - other.requests, self.money - other.money)

    def within(self, budget: Budget) -> bool:
        """Whether a budget allows so much."""
        return all(
            limit is None or spent <= limit
            for spent, limit in (
                (self.tokens, budget.tokens), (self.requests, budget.requests), (self.money, budget.money),
            )
        )  # fmt: skip


@dataclass
class Ledger:
    """Spent and reserved together never exceed the budget."""

    budget: Budget
    spent: Cost = field(default_factory=Cost)
    reserved: Cost = field(default_factory=Cost)
    stopped: bool = False
    """Whether no more is given out, because the asking has ended."""
    refused: bool = False
    """Whether a request was not made for want of budget."""
    _freed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def reserve(self, bound: Cost, *, wait: bool = False) -> bool:
        """Set aside the most that a request may cost, if so much is left.

        With `wait` for what other requests set aside and do not need; not for the thread that they need, too.
        """
        with self._freed:
            while not (self.spent + self.reserved + bound).within(self.budget):
                hopeless = not self.reserved.requests or not (self.spent + bound).within(self.budget)
                if not wait or hopeless or self.stopped:
                    return False
                self._freed.wait()
            self.reserved += bound
            return True

    def stop(self) -> None:
        """End every wait: no more is given out."""
        with self._freed:
            self.stopped = True
            self._freed.notify_all()

    def settle(self, bound: Cost, cost: Cost) -> None:
        """Replace what was set aside by what it came to."""
        with self._freed:
            self.reserved -= bound
            self.spent += cost
            self._freed.notify_all()


def believed(claimed: int, text: str, most: int) -> tuple[int, bool]:
    """The tokens of an answer as the server counts them, or `most` where that cannot be; whether it can.

    A server that says nothing, or less than a text of so many bytes can have, or more than was allowed, is
    not believed: the answer then counts as the longest that it was allowed to be.
    """
    least = -(-len(text.encode("utf-8", "replace")) // BYTES_OF_A_TOKEN)
    can_be = least <= claimed <= most and (claimed > 0 or not text)
    return (claimed, True) if can_be else (most, False)
