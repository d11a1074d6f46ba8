"""What a decoder is made of: one frozen record that covers every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trivium.kit.errors import TriviumError


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the inner layer."""

    count: int
    per_token: int
    inner_width: int
    normalise: bool = True
    """Whether the chosen experts' probabilities are divided by their sum."""
    balance: float = 0.0
    """The coefficient of the load-balancing loss that the family's files name."""
    layers: tuple[bool, ...] = ()
    """Which layers are mixtures; empty means all of them."""


LARGEST = {
    "vocabulary": 2**24, "width": 2**20, "layers": 1000, "heads": 2**16, "key_value_heads": 2**16,
    "head_width": 2**16, "inner_width": 2**24, "context": 2**30,
}  # fmt: skip
"""More than any model has: refused before anything of that size is made."""
MOST_EXPERTS = 100_000
"""In all layers together."""


@dataclass(frozen=True)
class ModelConfig:
    """Every choice that distinguishes one decoder from another."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner_width: int
    context: int
    key_value_heads: int = 0
    """Zero means as many as there are query heads."""
    head_width: int = 0
    """Zero means `width // heads`."""
    family: str = "qwen3"
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    norm_plus_one: bool = False
    """Gemma stores `weight - 1`: the scale is `1 + weight`."""
    norm_before: bool = True
    norm_after: bool = False
    """Norms stand before a sub-layer, after it (OLMo 2), or both (Gemma)."""
    query_key_norm: Literal["none", "head", "full"] = "none"
    """Per head (Qwen3, Gemma 3) or over all heads together (OLMo 2)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    query_key_value_bias: bool = False
    attention_output_bias: bool = False
    inner_bias: bool = False
    tied: bool = False
    positions: Literal["rope", "learned", "none"] = "rope"
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    """`rope_parameters` as Hugging Face writes them."""
    local_rope: dict[str, Any] | None = None
    """The rope of the layers with a window, where it differs (Gemma 3)."""
    rotates: tuple[bool, ...] = ()
    """Which layers rotate queries and keys (SmolLM3's NoPE layers do not); empty means all."""
    windows: tuple[int | None, ...] = ()
    """How far back each layer sees; empty means no layer has a window."""
    attention_scale: float | None = None
    """None means `head_width ** -0.5`."""
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What each sub-layer's result is multiplied by before it is added to the stream (Granite)."""
    logit_divisor: float = 1.0
    """What the scores over the vocabulary are divided by (Granite)."""
    experts: ExpertsConfig | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that do not change the computation (token ids and the like), kept for saving."""

    def __post_init__(self) -> None:
        """Fill in what follows from the rest and refuse what cannot be."""
        if not self.key_value_heads:
            object.__setattr__(self, "key_value_heads", self.heads)
        if not self.head_width:
            object.__setattr__(self, "head_width", self.width // max(self.heads, 1))
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value < 1:
                raise TriviumError(f"The model's {name} is {value}: make it at least 1.")
            if value > largest:
                raise TriviumError(f"The model's {name} is {value:,}: no model has more than {largest:,}.")
        if self.experts is not None:
            experts = self.experts
            if not 1 <= experts.per_token <= experts.count or experts.inner_width < 1:
                raise TriviumError(
                    f"A token cannot go to {experts.per_token} of {experts.count} experts of width "
                    f"{experts.inner_width}: choose from 1 to all of them, each at least 1 wide."
                )
            if experts.count * self.layers > MOST_EXPERTS:
                raise TriviumError(
                    f"{experts.count:,} experts in each of {self.layers} layers: no model has more than "
                    f"{MOST_EXPERTS:,} in all."
                )
        if self.heads % self.key_value_heads:
            raise TriviumError(
                f"{self.heads} heads cannot share {self.key_value_heads} key-value heads evenly: "
                "make the first a multiple of the second."
            )
        if self.positions == "rope" and self.head_width % 2:
            raise TriviumError(f"Rotary positions need an even head width, not {self.head_width}.")
        for name in ("rotates", "windows"):
            if getattr(self, name) and len(getattr(self, name)) != self.layers:
                raise TriviumError(f"The model's {name} must name all {self.layers} layers or none.")
        if not (self.norm_before or self.norm_after):
            raise TriviumError("A layer needs a norm before or after its parts.")

    @property
    def reach(self) -> int:
        """How many tokens the model is made to read: more than `context` under dynamic scaling."""
        if self.positions == "rope" and self.rope.get("rope_type") == "dynamic":
            return round(self.context * self.rope["factor"])
        return self.context

    def window(self, layer: int) -> int | None:
        """How many tokens back, itself included, this layer sees; None is all of them."""
        return self.windows[layer] if self.windows else None

    def rotates_at(self, layer: int) -> bool:
        """Whether this layer turns its queries and keys by their positions."""
        return self.positions == "rope" and (not self.rotates or self.rotates[layer])

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer's inner part is a mixture of experts."""
        return self.experts is not None and (not self.experts.layers or self.experts.layers[layer])

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

    def of_layers(self, sources: Sequence[int]) -> ModelConfig:
        """The same for a model of these layers, each with its own window, rotation and experts."""
        experts = self.experts
        if experts is not None and experts.layers:
            experts = replace(experts, layers=tuple(experts.layers[one] for one in sources))
        windows = tuple(self.windows[one] for one in sources) if self.windows else ()
        rotates = tuple(self.rotates[one] for one in sources) if self.rotates else ()
        return self.changed(layers=len(sources), experts=experts, windows=windows, rotates=rotates)

    def changed(self, **fields: Any) -> ModelConfig:
        return replace(self, **fields)
