"""How long the rows of mid-training are, and what every method is configured by."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count, Number
from trivium.kit.settings import Settings
from trivium.model.config import ModelConfig
from trivium.model.context_extension import Method, describe_positions, extend_context
from trivium.model.transformer import Transformer

OPTIONS: dict[str, tuple[str, ...]] = {
    "extrapolate": (),
    "interpolate": ("factor",),
    "ntk": ("base", "factor"),
    "dynamic": ("base", "factor"),
    "yarn": ("base", "factor", "beta_fast", "beta_slow"),
    "longrope": ("base", "factor", "short_factor", "long_factor"),
    "llama3": ("base", "factor", "low_freq_factor", "high_freq_factor"),
    "base": ("base",),
    "nope": ("every",),
}
"""What each method is configured by."""
Length = Annotated[Count, Field(ge=2)]
Lengths = int | str | list[int | str]


def _listed(value: Any) -> Any:
    """A single length is a list of one."""
    return value if isinstance(value, list) else [value]


class ContextExtension(Settings):
    """How long the rows are, and how the positions are made to reach so far."""

    length: Annotated[
        list[Length], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=Lengths)
    ]
    """One length, or several through which the rows grow in equal parts of the stage."""
    method: Method | None = None
    """How the positions are scaled."""
    base: Number | None = None
    """The RoPE base (theta), where the method takes one."""
    factor: float | None = Field(default=None, ge=1)
    """By how much positions are scaled; the ratio of the lengths where it is left out."""
    beta_fast: float | None = Field(default=None, gt=0)
    """YaRN: rotations within the original context above which a pair is not scaled."""
    beta_slow: float | None = Field(default=None, gt=0)
    """YaRN: rotations below which a pair is scaled in full."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """Llama 3: wavelengths longer than the original context over this are scaled in full."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """Llama 3: wavelengths shorter than the original context over this are not scaled."""
    short_factor: list[float] | None = None
    """LongRoPE: a factor per pair for sequences within the original context."""
    long_factor: list[float] | None = None
    """LongRoPE: a factor per pair beyond the original context."""
    every: int | None = Field(default=None, ge=1)
    """`nope`: every n-th layer loses its rotary positions."""

    @model_validator(mode="after")
    def methods_take_their_own(self) -> Self:
        for name in self.options:
            if self.method is None:
                raise ValueError(f"`{name}` is part of a `method` that scales positions; name one")
            if name not in OPTIONS[self.method]:
                raise ValueError(f"`{self.method}` takes no `{name}`; leave it out")
        low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        if low >= high:
            raise ValueError(f"`low_freq_factor` {low:g} has to lie below `high_freq_factor` {high:g}")
        if self.beta_fast is not None and self.beta_fast <= (self.beta_slow or 1.0):
            raise ValueError(
                f"`beta_fast` {self.beta_fast:g} has to lie above `beta_slow`, which is 1 unless said"
            )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What the method is told."""
        return self.model_dump(exclude={"length", "method"}, exclude_none=True)

    @property
    def longest(self) -> int:
        """What the positions have to reach."""
        return max(self.length)


def _length(value: Any) -> Any:
    """A bare number, or a list of them, is a length."""
    return {"length": value} if isinstance(value, (int, str, list)) else value


ContextSetting = Annotated[
    ContextExtension, BeforeValidator(_length, json_schema_input_type=Lengths | ContextExtension)
]


def check_reach(stage: str, config: ModelConfig, asked: ContextExtension | None) -> None:
    """Refuse rows that the positions do not reach, and an extension of what reaches far enough."""
    method = asked.method if asked is not None else None
    context = asked.longest if asked is not None else config.reach
    if method is None and context > config.reach:
        raise TriviumError(
            f"{stage}: the model reads {config.reach} tokens at most and `context` is {context}; "
            "add a `method` that scales its positions, for instance yarn."
        )
    if method not in (None, "base", "nope") and context <= config.reach:
        raise TriviumError(
            f"{stage}: the model reads {config.reach} tokens already, so `{method}` has nothing to "
            f"extend for {context}; leave `method` out or raise `length`."
        )
    if asked is not None and asked.options and config.positions != "rope":
        raise TriviumError(
            f"{stage}: this model's positions do not turn, so `{next(iter(asked.options))}` "
            "says nothing about them; leave it out."
        )


def extended(model: Transformer, asked: ContextExtension | None, seed: int) -> tuple[str, str]:
    """Extend the model's positions where a method is named; what they were and what they are, in words."""
    if asked is None or asked.method is None:
        now = describe_positions(model.config)
        return now, now
    return extend_context(model, asked.longest, asked.method, seed=seed, **asked.options)
