"""How a search is asked for: the method, how much it may draw, and how the answer is read out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings

Method = Literal["best_of", "majority", "weighted", "beam", "dvts", "mcts", "backtrack"]
ReadOut = Literal["best", "weighted", "majority"]
SAMPLES = ("best_of", "majority", "weighted")
"""Methods that draw whole solutions and only choose among them."""


class SearchSettings(Settings):
    """One search; the defaults are those of search-and-learn where it has them."""

    model_config = ConfigDict(frozen=True)

    method: Method = "best_of"
    """`best_of` (the best score), `majority` (self-consistency), `weighted` (scores summed per answer),
    `beam`, `dvts` (independent subtrees), `mcts` (PUCT), or `backtrack` (depth first)."""
    n: Count = Field(default=8, ge=1)
    """Solutions drawn; for `beam` and `dvts` the steps drawn in a round, for `mcts` the simulations."""
    width: Count = Field(default=4, ge=1)
    """Next steps drawn from a node; `beam` keeps n / width nodes, `dvts` has as many subtrees."""
    scorer: str | dict[str, Any] | None = None
    """What scores partial texts: a reward model (a stage or a folder), `{model: prm, aggregate: min}`,
    `file.py:function`, or `logprob`, the model's own probability, as where it is left out."""
    read_out: ReadOut | None = None
    """How the answer is chosen among solutions: as the method's name says, else the best score."""
    separator: str = Field(default="\n", min_length=1)
    """The text that ends a step."""
    temperature: float = Field(default=0.8, gt=0)
    """The sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together reach this probability."""
    max_new_tokens: Count | None = Field(default=None, ge=1)
    """The longest solution in tokens; None: the caller's limit."""
    max_steps: Count = Field(default=40, ge=1)
    """The most steps of a solution."""
    token_budget: Count | None = Field(default=None, ge=1)
    """No round is begun once so many tokens were drawn."""
    lookahead: Count = 0
    """Steps that are drawn greedily beyond a node before it is scored, and then forgotten."""
    exploration: float = Field(default=1.0, ge=0)
    """The weight of the prior in PUCT (`mcts`)."""
    threshold: float = 0.5
    """The score below which `backtrack` draws a step again."""
    seed: int = 0
    """Seeds every draw."""

    @model_validator(mode="after")
    def the_parts_fit(self) -> SearchSettings:
        """Beams are kept in whole numbers, and what a method does not do is not asked of it."""
        if self.method in ("beam", "dvts") and self.n % self.width:
            raise ValueError(f"`n: {self.n}` is no multiple of `width: {self.width}`, the steps per node")
        if self.method in ("majority", "weighted") and self.read_out not in (None, self.method):
            raise ValueError(f"the method {self.method} is a read-out itself; leave `read_out` out")
        if self.lookahead and self.method in SAMPLES:
            raise ValueError(f"`lookahead` looks beyond steps, and {self.method} draws whole solutions")
        return self

    @property
    def reads(self) -> ReadOut:
        """The read-out in force."""
        if self.method == "majority" or self.method == "weighted":
            return self.method
        return self.read_out or "best"

    @property
    def kept(self) -> int:
        """How many nodes `beam` keeps, or subtrees `dvts` has."""
        return max(1, self.n // self.width)

    def most_tokens(self, longest: int) -> int | None:
        """How many tokens it draws at most where a solution has `longest`; None where nothing bounds them."""
        if self.token_budget is not None:
            # What a last round draws beyond the budget, a look-ahead of its steps, and the end of a solution.
            return self.token_budget + (2 * max(self.n, self.width) + 1) * longest
        return self.n * longest if self.method in SAMPLES else None


def search_settings(written: Any, what: str = "search") -> SearchSettings:
    """Settings from what a person wrote: a mapping, or the name of a method alone."""
    if isinstance(written, SearchSettings):
        return written
    given = {"method": written} if isinstance(written, str) else written
    try:
        return SearchSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([what, *map(str, first["loc"])])
        raise TriviumError(f"{place}: {first['msg'].removeprefix('Value error, ')}.") from None
