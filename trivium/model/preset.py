"""One number, `depth`, sets a whole model and how to train it; every derived value can be overridden."""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig
from trivium.model.flops import active_matrix_parameters, parameter_count

WIDTH_PER_LAYER = 64
MOST_PARAMETERS = 10**13
"""More than any model so far has; a larger number is a slip of the pen."""
TOKENS_PER_PARAMETER = 20
"""Chinchilla's compute-optimal ratio (Hoffmann et al. 2022), on the parameters outside the embedding."""


@dataclass(frozen=True)
class Preset:
    """Every number that follows from a depth."""

    config: ModelConfig
    values: dict[str, Any]
    """Every derived value under the name by which it can be overridden."""

    @property
    def learning_rates(self) -> dict[str, float]:
        """By group of weights: `matrices` for Muon, the others for AdamW."""
        return {name: self.values[f"{name}_learning_rate"] for name in GROUPS}

    def __getattr__(self, name: str) -> Any:
        values = object.__getattribute__(self, "values")
        if name in values:
            return values[name]
        raise AttributeError(name)


GROUPS = ("matrices", "embeddings", "head", "scalars")
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"query_key_norm": "head"},
    "llama": {},
    "gpt2": {
        "positions": "learned", "norm": "layer", "norm_epsilon": 1e-5, "activation": "gelu_tanh",
        "gated": False, "query_key_value_bias": True, "attention_output_bias": True, "inner_bias": True,
    },
}  # fmt: skip
"""The shapes that can be trained from nothing; llama can lose its positions, gpt2 learns a table of them."""


def nearest_power(number: float, low: int, high: int) -> int:
    """The power of two nearest to a number on a logarithmic scale."""
    return 2 ** min(max(round(math.log2(number)), low), high)


def preset(
    depth: int, vocabulary: int, context: int = 512, *, family: str = "qwen3", **overrides: Any
) -> Preset:
    """A model of `depth` layers, Qwen3-shaped unless said otherwise, and the settings that train it well."""
    given = {name: value for name, value in overrides.items() if value is not None}
    values: dict[str, Any] = {}

    def derive(name: str, default: Any) -> Any:
        values[name] = given.pop(name, default)
        return values[name]

    layers = derive("layers", depth)
    vocabulary, context = derive("vocabulary", vocabulary), derive("context", context)
    width = derive("width", WIDTH_PER_LAYER * depth)
    head_width = derive("head_width", 128 if width >= 1536 else 64 if width >= 128 else 32)
    heads = derive("heads", max(1, width // head_width))
    # Sharing keys saves the cache of large models; a small one needs every head it has.
    shared = heads // 4 if heads % 4 == 0 and heads >= 16 else heads
    key_value_heads = derive("key_value_heads", shared)
    inner_width = derive("inner_width", (4 if family == "gpt2" else 3) * width)
    tied = derive("tied", family == "gpt2")
    rope_theta = derive("rope_theta", 10000.0)
    _refuse_absurd(int(layers), int(width), int(inner_width), int(vocabulary))
    config = ModelConfig(
        family=family, vocabulary=vocabulary, width=width, layers=layers, heads=heads, context=context,
        key_value_heads=key_value_heads, head_width=head_width, inner_width=inner_width, tied=tied,
        rope={"rope_type": "default", "rope_theta": float(rope_theta)}, **FAMILIES[family],
    )  # fmt: skip
    values["parameters"] = parameter_count(config)
    token_budget = derive("token_budget", TOKENS_PER_PARAMETER * active_matrix_parameters(config))
    # The best batch grows about as the square root of the tokens to come: 4k for 5M tokens, 100k for 2.5B.
    batch = nearest_power(2 * math.sqrt(token_budget), 11, 22)
    derive("batch_tokens", max(batch, context))
    # Muon's updates have a fixed size, so one rate serves every width; AdamW's rates shrink with it.
    # Swept at 3 layers x 192 over 300k tokens (one seed): matrices 0.01, 0.02, 0.04, 0.07 gave 2.39, 2.35,
    # 2.31, 2.41 bits per byte, so this stands below the best, away from where it breaks; a third of the
    # embeddings' rate tried first was 0.01 better, three times it 0.03 worse; head and scalars are flat.
    narrow = (width / 768) ** -0.5
    derive("matrices_learning_rate", 0.03)
    derive("embeddings_learning_rate", round(0.02 * narrow if tied else 0.05 * narrow, 6))
    derive("head_learning_rate", round(0.004 * narrow, 6))
    derive("scalars_learning_rate", 0.01)
    derive("weight_decay", 0.1)
    if given:
        name = next(iter(given))
        close = difflib.get_close_matches(name, values, 1, 0.0)[0]
        raise TriviumError(f"a preset has no {name!r}: did you mean {close!r}?")
    return Preset(config, values)


def _refuse_absurd(layers: int, width: int, inner_width: int, vocabulary: int) -> None:
    """Say what memory a model would need that no machine has, before anything is counted layer by layer."""
    parameters = layers * (4 * width * width + 3 * width * inner_width) + 2 * vocabulary * width
    if parameters > MOST_PARAMETERS:
        raise TriviumError(
            f"a model of {layers:,} layers and width {width:,} has about {parameters:.2g} parameters and "
            f"needs about {parameters * 16 / 2**40:,.0f} TiB of memory to train; lower `depth`."
        )
