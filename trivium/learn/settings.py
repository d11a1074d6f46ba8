"""What a person may set about training, shared by every stage that trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trivium.kit.numbers import Count, Number
from trivium.kit.settings import Settings
from trivium.learn.precision import Precision
from trivium.model.lora import AdapterSettings
from trivium.model.recompute import Recompute

Decay = Literal["constant", "cosine", "linear", "sqrt", "1-sqrt", "inverse-sqrt"]


class LearningRate(Settings):
    """How fast the weights move, from the first step to the last."""

    start: Annotated[Number, Field(ge=0)] | Literal["parent", "preset"] = Field(
        default="preset", alias="from"
    )
    """A number, the rate the parent ended with, or what the model's size suggests."""
    warmup: Annotated[Number, Field(ge=0)] | Annotated[str, Field(pattern=r"^tokens=")] = 0.0
    """Steps from zero to the full rate, or `tokens=1M`; a number below one is a share of the stage."""
    decay: Decay | Literal["wsd"] = "linear"
    """The shape of the decay; `wsd` is constant, then linear over the last fifth."""
    decay_share: float = Field(default=1.0, gt=0, le=1)
    """The last part of the stage in which the rate decays; before it the rate is constant."""
    to: float = Field(default=0.0, ge=0)
    """What is left of the rate at the end, as a share of the full rate."""

    @model_validator(mode="before")
    @classmethod
    def from_number(cls, value: Any) -> Any:
        """A bare number, or `parent`, is the rate to start from; `dial` is an earlier name of `preset`."""
        value = value if isinstance(value, (dict, LearningRate)) else {"from": value}
        if isinstance(value, dict) and value.get("from") == "dial":
            value = {**value, "from": "preset"}
        return value

    @field_validator("warmup", mode="before")
    @classmethod
    def tokens_are_said(cls, value: Any) -> Any:
        """`1M tokens` is the same as `tokens=1M`, and never a million steps."""
        if isinstance(value, str) and value.strip().endswith("tokens"):
            return f"tokens={value.strip().removesuffix('tokens').strip()}"
        return value

    @model_validator(mode="after")
    def unfold_wsd(self) -> LearningRate:
        """`wsd` is the name of a constant rate that decays linearly over the last fifth."""
        if self.decay == "wsd":
            self.decay = "linear"
            if "decay_share" not in self.model_fields_set:
                self.decay_share = 0.2
        return self


class Checkpointing(Settings):
    """When the state is saved, and which saved states stay."""

    every_seconds: float = Field(default=120.0, gt=0)
    """Save the state for resuming after so many seconds."""
    every_steps: Count | None = Field(default=None, ge=1)
    """Save the state for resuming after so many steps, instead of seconds."""
    keep: int = Field(default=2, ge=1)
    """How many of the last states to keep."""
    at: list[str | Count] = []
    """Places whose model is kept for good, in steps or as `tokens=2M`, for `from: base@tokens=2M`."""


class Validating(Settings):
    """How often, and on how much, the validation loss is measured."""

    times: int = Field(default=5, ge=0)
    """How often the validation loss is measured, evenly over the stage."""
    tokens: Count = Field(default=32768, ge=1)
    """On how many tokens it is measured."""


class Sampling(Settings):
    """Texts the model continues while it learns, for a person to read."""

    prompts: list[str] = []
    """The beginnings of the texts."""
    times: int = Field(default=3, ge=1)
    """How often they are continued, evenly over the stage."""
    max_new_tokens: int = Field(default=32, ge=1)
    """How many tokens each continuation has at most."""


GROUPS = ("tensor", "context", "pipeline", "expert")
"""By what a group of processes may divide a model: one of them, or the first two."""


class Parallel(Settings):
    """How several processes share one training; in a world of one nothing is shared."""

    shard: Annotated[int, Field(ge=1)] | Literal["all", "auto"] = "auto"
    """Among how many processes weights, gradients and moments are divided (FSDP2); groups of so many hold the
    same. `auto` divides nothing where whole copies fit by the plan, else takes the fastest that fits."""

    tensor: int = Field(default=1, ge=1)
    """Among how many processes every matrix is divided, by heads, inner width and vocabulary (tensor
    parallelism); these compute on the same rows together, and `shard` divides their parts once more."""

    context: int = Field(default=1, ge=1)
    """Among how many processes tokens of a pass and the layers' weights are divided (context parallelism);
    not where answers share a prompt, as in preferences and reinforcement learning. With `tensor` each of
    these processes is a group that divides matrices."""

    pipeline: int = Field(default=1, ge=1)
    """Among how many processes the layers are divided, one group of them after the other (pipeline
    parallelism); `shard` divides each group's weights once more, and the other degrees are 1."""

    expert: int = Field(default=1, ge=1)
    """Among how many processes the experts of a mixture are divided; tokens are sent to those that hold what
    they picked (expert parallelism). `shard` is then 1 or a multiple of it, `tensor` and `context` are 1."""

    @model_validator(mode="after")
    def degrees_that_go_together(self) -> Parallel:
        groups = [name for name in GROUPS if getattr(self, name) > 1]
        if len(groups) > 1 and groups != ["tensor", "context"]:
            names = " and ".join(f"`{name}`" for name in groups)
            raise ValueError(f"{names} exclude each other; divide by one of them and `shard`")
        if isinstance(self.shard, int) and self.shard > 1 and self.shard % self.expert:
            raise ValueError(f"`shard` is {self.shard}, neither 1 nor a multiple of `expert`, {self.expert}")
        return self

    @model_validator(mode="before")
    @classmethod
    def from_word(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"shard": value}
        return value

    def described(self) -> str:
        """Such as `shard 4 x tensor 2`; empty where nothing is said."""
        parts = ((name, getattr(self, name)) for name in ("shard", *GROUPS))
        return " x ".join(f"{name} {many}" for name, many in parts if many not in ("auto", 1))


class Training(Settings):
    """The settings every training stage has."""

    tokens: Count | None = Field(default=None, ge=1)
    """How many tokens to train on; one of `tokens`, `steps` and `epochs` says how long the stage lasts."""
    steps: Count | None = Field(default=None, ge=1)
    """How many optimiser steps to train for."""
    epochs: Number | None = Field(default=None, gt=0)
    """How often to go through the data."""
    batch: Count | None = Field(default=None, ge=1)
    """Tokens per optimiser step."""
    micro_batch: Annotated[Count, Field(ge=1)] | Literal["auto"] = "auto"
    """Tokens per forward pass; it never changes the result beyond rounding."""
    learning_rate: LearningRate = LearningRate()
    """The learning rate: a number, `parent`, or a schedule."""
    optimiser: Literal["muon", "adamw"] = "muon"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""
    optimiser_state: Literal["keep", "reset"] = "reset"
    """Whether the parent's moments are taken over."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay; the preset's or the parent's where it is left out."""
    clip: float = Field(default=1.0, gt=0)
    """The largest norm of the gradient; a larger one is scaled down to it."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition function in the loss (PaLM), which keeps logits small."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a running mean of the weights, which becomes the stage's model."""
    precision: Precision = "auto"
    """The type matrices are multiplied in; the weights themselves stay float32. `float8` is for the layers of
    wide models, on a GPU that has it; attention and the head are then in bfloat16."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether to compile the model; `auto` does it where the stage is long enough to repay it."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass to save memory: nothing, what is cheap, or whole layers."""
    parallel: Parallel = Parallel()
    """How processes that torchrun starts share the work: `auto`, `all`, or `{shard: 8, tensor: 2}`."""
    deterministic: bool = False
    """Use only kernels that add in a fixed order, so that a resumed run is bit-identical on a GPU too."""
    max_bad_steps: int = Field(default=5, ge=1)
    """After so many steps in a row with a loss or gradient that is not finite, the stage stops."""
    checkpoint: Checkpointing = Checkpointing()
    """When the training state is saved."""
    validation: Validating = Validating()
    """How the validation loss is measured."""
    samples: Sampling = Sampling()
    """Texts the model continues during training."""
    adapter: AdapterSettings | None = None
    """Train small matrices beside the frozen ones."""
    train_only: list[str] = []
    """The parts that are trained, such as `layers.3` or `head`, the rest being frozen; `new_layers` are those
    that a `grow` stage added to the parent."""
    qat: Literal["int8", "int4"] | None = None
    """Round the matrices in every pass as the `quantize` stage will, so that the model learns to bear it."""

    @model_validator(mode="after")
    def float8_multiplies_whole_matrices(self) -> Training:
        """Adapters, rounded weights and parts of matrices have products of their own."""
        if self.precision == "float8":
            for name in ("adapter", "qat"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`precision: float8` and `{name}` exclude each other; say bfloat16")
            if self.parallel.tensor > 1:
                raise ValueError("`precision: float8` does not divide matrices; say `shard`, not `tensor`")
        return self

    @model_validator(mode="after")
    def adapters_learn_with_adamw(self) -> Training:
        """An adapter's matrices have no full set of singular values for Muon to even out."""
        if self.adapter is None:
            return self
        if self.train_only:
            raise ValueError("an adapter says itself what is trained, in `train`; leave `train_only` out")
        if self.qat is not None:
            raise ValueError("`adapter` and `qat` exclude each other; say `base: int4` in the adapter")
        if self.optimiser == "muon":
            if "optimiser" in self.model_fields_set:
                raise ValueError("an adapter learns with `optimiser: adamw`, not with muon")
            self.optimiser = "adamw"
        return self


# What cannot change the result, and so does not count in a stage's fingerprint.
UNAFFECTING = frozenset(
    {
        "micro_batch",
        "checkpoint",
        "validation",
        "samples",
        "compile",
        "recompute",
        "parallel",
        "deterministic",
        "max_bad_steps",
    }
)
