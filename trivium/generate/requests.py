"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from trivium.generate.kv_cache import BLOCK
from trivium.generate.sampling import Sampling

if TYPE_CHECKING:
    from trivium.generate.constraints import Constraint
    from trivium.tokens.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
Texts = Sequence[Sequence[int]]
"""The ids of several texts."""


@dataclass(frozen=True)
class Slide:
    """A window for texts without end: the first `sinks` tokens stay, the oldest of the others are forgotten.

    Keeping the first tokens is what lets a model run past its window (attention sinks, Xiao et al. 2023).
    """

    sinks: int = 4
    window: int | None = None
    """How many tokens are remembered; None is the model's own context."""

    def places(self, context: int) -> int:
        """How many tokens a model of this context remembers at most."""
        return min(self.window or context, context) // BLOCK * BLOCK

    def at_once(self, places: int) -> int:
        """How many tokens are forgotten when so many places are full."""
        return max(BLOCK, (places - self.sinks) // 4 // BLOCK * BLOCK)

    def forgotten(self, tokens: int, context: int) -> int:
        """How many of so many tokens are forgotten by the time the next one is drawn."""
        places = self.places(context)
        batch = self.at_once(places)
        return max(0, -(-(tokens - places) // batch)) * batch


@dataclass(frozen=True)
class Request:
    """A prompt, how to continue it, and how many times."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    adapter: str | None = None
    slide: Slide | None = None
    constraint: Constraint | None = None
    """The form that `sampling` asks for, if it was compiled beforehand."""


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    text: str
    tokens: list[int]
    """Everything that was drawn, the token or the tokens of the stop text that ended it included."""
    logprobs: list[float]
    """Of the drawn tokens, under the temperature and filters they were drawn with; empty unless asked for."""
    finish_reason: FinishReason
    prompt_tokens: int
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """The model's most likely tokens at each place, and what was drawn, before temperature and filters."""


class Scores(NamedTuple):
    """How likely a model finds the tokens of a text, one by one."""

    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    """At each token the most likely ones and the text's own; empty unless asked for."""


class Event(NamedTuple):
    """A token as it is drawn; the text may lag behind it until characters and stop texts are complete."""

    sample: int
    token: int
    text: str
    logprob: float | None
    alternatives: dict[int, float] | None
    completion: Completion | None = None
    """Set in the last event of a sample."""
    ends: bool = False
    """Whether the token ends the text and is no part of it."""
    unsettled: int = 0
    """How many of the latest tokens may yet belong to a stop text; in the last event, how many do."""
    failure: Exception | None = None
    """Why the whole request failed; it has no further event."""


Listener = Callable[[Event], None]


class RequestHandle:
    """A request under way."""

    def __init__(self, request: Request, listener: Listener | None) -> None:
        self.request, self.listener = request, listener
        self.results: list[Completion | None] = [None] * request.n
        self.cancelled = False
        self.failure: BaseException | None = None
        """Why the request failed, where it did; the samples that had ended by then are kept."""

    @property
    def done(self) -> bool:
        """Whether every sample has ended, or the request has failed."""
        return self.failure is not None or all(result is not None for result in self.results)

    @property
    def completions(self) -> list[Completion]:
        """The samples that have ended, in order."""
        return [result for result in self.results if result is not None]


class GenerationEngine(Protocol):
    """Prompt ids in, token ids and log-probabilities out: what callers may rely on.

    `engine.Engine` is the one here; another one, such as vLLM or an endpoint, keeps to the same names.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into the ids of its prompts."""

    @property
    def window(self) -> int:
        """How many tokens a prompt and its completion may have together."""

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request, in the order of its samples."""

    def score(
        self, prompts: Texts, completions: Texts, *, top: int = 0, adapter: str | None = None
    ) -> list[Scores]:
        """The log-probability of every token of each completion after its prompt."""
