"""What a stage computes, as plain numbers from which cost on any machine follows."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from trivium.learn.settings import Parallel
from trivium.model.config import ModelConfig
from trivium.model.flops import (
    Flops,
    expert_parameter_count,
    layer_matrix_parameters,
    muon_flops,
    parameter_count,
    pass_flops,
)
from trivium.model.recompute import Recompute

NONE = Flops()
PhaseName = Literal["generation", "scoring", "training"]


@dataclass(frozen=True)
class Phase:
    """Passes of one kind: tokens are generated, only read, or learned from."""

    name: PhaseName
    tokens: float
    """That go through the layers."""
    length: float
    """How many keys each of them meets, masked ones too: the mean length of documents, weighted by length."""
    predicted: float
    """The tokens whose successor is scored."""
    trained: float | None = None
    """The share of the layers' weights that get a gradient; None without a backward pass."""
    head_trained: bool = True
    last_layer: float | None = None
    """For how many tokens the last layer computes its output, where that is not all of them."""
    head_again: bool = False
    """Whether the backward pass computes the scores again, as losses of log-probabilities do."""
    beside: float = 0.0
    """The weights of an adapter that is trained."""
    decode_steps: float = 0.0
    """Generation: how often the weights are read, each time for one token of every row."""
    rows: float = 1.0
    """Generation: how many rows are decoded at once."""
    requests: float = 0.0
    """Generation: how many answers are asked for."""
    config: ModelConfig | None = None
    """The shape of the model in these passes, where it is not the one the stage ends with."""
    also: Flops = NONE
    """What is computed besides the layers and the head."""
    encoder: bool = False
    """Whether an encoder of pictures or sounds makes them, before the model."""
    frozen: bool = False
    """Whether gradients only pass through the model, to something that learns before it."""

    def flops(self, config: ModelConfig) -> Flops:
        """What it costs a model of this shape."""
        return self.also + pass_flops(
            self.config or config, self.tokens, self.length, self.predicted, trained=self.trained,
            head_trained=self.head_trained, last_layer=self.last_layer, head_again=self.head_again,
            beside=self.beside,
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A stage as the planner sees it."""

    stage: str
    kind: str
    config: ModelConfig | None = None
    phases: tuple[Phase, ...] = ()
    steps: float = 0.0
    """Optimiser steps."""
    tokens: float = 0.0
    """The tokens that are trained on, or generated, or read, whichever the stage is for."""
    batch: float = 0.0
    """Tokens of an optimiser step."""
    context: int = 0
    """The longest packed sequence."""
    optimiser: Literal["muon", "adamw", "none"] = "none"
    trained_parameters: float = 0.0
    """The weights that have a gradient and an optimiser state."""
    copies: int = 0
    """Frozen models held beside: a reference, a parent."""
    recompute: Recompute = "none"
    parallel: Parallel | None = None
    """How processes share the training, where the recipe says it."""
    divisible: bool = True
    """Whether passes can be divided, by matrices or tokens: plain matrices that are all trained."""
    shares_prompts: bool = False
    """Whether answers share a prompt, so that the tokens of a pass cannot be divided."""
    cached_tokens: float = 0.0
    """Tokens in the key/value cache at once."""
    kept_states: int = 0
    """Saved states for resuming that lie on the disk at once."""
    kept_models: int = 1
    characters: float = 0.0
    """Text that is read and tokenised."""
    conversations: float = 0.0
    """Rows with messages or columns that are laid into a chat template."""
    float8: bool = False
    compiled: bool = True
    chunked_loss: bool = True
    """Whether the head is computed in chunks, so that no tokens x vocabulary tensor exists."""
    told: float = 0.0
    """FLOPs that the stage estimates itself, where no phases are known."""
    advice: tuple[str, ...] = field(default=())

    @cached_property
    def parameters(self) -> int:
        return parameter_count(self.config) if self.config is not None else 0

    @cached_property
    def layer_parameters(self) -> int:
        """The weights of the layers' matrices that a token meets."""
        return layer_matrix_parameters(self.config) if self.config is not None else 0

    @cached_property
    def expert_parameters(self) -> int:
        """The weights of all experts of all layers."""
        return expert_parameter_count(self.config) if self.config is not None else 0

    @cached_property
    def optimiser_flops(self) -> float:
        """Muon's own."""
        if self.config is None or self.optimiser != "muon" or not self.steps:
            return 0.0
        learned = [one for one in self.phases if one.trained is not None and not one.encoder]
        tokens = sum(one.tokens for one in learned)
        # A model that grows makes its first steps with smaller matrices; a frozen one makes none.
        return sum(
            muon_flops(one.config or self.config, self.steps * one.tokens / tokens)
            for one in learned
            if not one.frozen
        )

    def flops(self) -> Flops:
        total = Flops(optimiser=self.optimiser_flops)
        if self.config is not None:
            for phase in self.phases:
                total = total + phase.flops(self.config)
        return total
