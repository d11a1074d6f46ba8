"""ContextExtension context: every way to make a model's positions reach further than it was trained for."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig
from trivium.model.positions import Rotary, checked_rope, ntk_base
from trivium.model.transformer import Layer, Transformer

Method = Literal["extrapolate", "interpolate", "ntk", "dynamic", "yarn", "longrope", "llama3", "base", "nope"]
METHODS: tuple[str, ...] = get_args(Method)
KEEPING = ("extrapolate", "base", "nope")
"""Methods that leave the parent's own scaling as it is."""


def interpolated_table(table: Tensor, length: int) -> Tensor:
    """A learned position table stretched between its two ends: row m is the old row m(L-1)/(L'-1)."""
    old = table.detach().float()
    places = torch.arange(length, device=table.device) * ((len(old) - 1) / (length - 1))
    below = places.floor().long().clamp(max=len(old) - 2)
    share = (places - below)[:, None]
    return ((1 - share) * old[below] + share * old[below + 1]).to(table.dtype)


def extended_table(table: Tensor, length: int, seed: int) -> Tensor:
    """A learned position table with new rows past its end, drawn at the old rows' mean and spread."""
    old = table.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length - len(old), old.shape[1], generator=generator)
    return torch.cat((old, old.mean(0) + noise * old.std(0))).to(table)


def often_turns(original: int) -> float:
    """How many turns within the trained length let a pair stay: the usual 32 spare none if it is short."""
    return min(32.0, max(2.0, original / 25))


def longrope_factors(head_width: int, base: float, original: int, factor: float) -> list[float]:
    """How much each pair is slowed without a search: fully if it turns less than once, else by less."""
    fast = often_turns(original)
    factors = []
    for pair in range(head_width // 2):
        turns = original / (2 * math.pi * base ** (2 * pair / head_width))
        kept = min(1.0, max(0.0, (turns - 1) / (fast - 1)))
        factors.append(1.0 / ((1 - kept) / factor + kept))
    return factors


def original_context(config: ModelConfig) -> int:
    """The length the model's unstretched positions were trained on."""
    if config.rope["rope_type"] == "linear":
        return round(config.context / config.rope["factor"])
    return int(config.rope.get("original_max_position_embeddings", config.context))


def extended_rope(
    config: ModelConfig, length: int, method: Method, options: dict[str, Any]
) -> dict[str, Any]:
    """The rope parameters, in Hugging Face's form, that reach `length` by this method."""
    original = original_context(config)
    base = float(options.get("base") or config.rope["rope_theta"])
    factor = float(options.get("factor") or length / original)
    plain = {"rope_theta": base}
    if method in ("extrapolate", "base"):
        if method == "base" and not options.get("base"):
            raise TriviumError(
                "context: method 'base' needs the new base frequency; add for instance 'base: 500000'"
            )
        return {**checked_rope(config.rope, config.context, config.head_width, "the model's rope"), **plain}
    if method == "interpolate":
        return {"rope_type": "linear", "factor": factor, **plain}
    if method == "ntk":
        return {"rope_type": "default", "rope_theta": ntk_base(base, factor, config.head_width)}
    if method == "dynamic":
        return {"rope_type": "dynamic", "factor": factor, **plain}
    stretched = {"factor": factor, "original_max_position_embeddings": original, **plain}
    if method == "yarn":
        fast = options.get("beta_fast") or often_turns(original)
        slow = options.get("beta_slow") or 1.0
        if fast <= slow:
            raise TriviumError(
                f"context: `beta_slow` {slow:g} has to lie below `beta_fast`, which is {fast:g} for a model "
                f"trained on {original} tokens"
            )
        return {
            "rope_type": "yarn",
            "beta_fast": fast,
            "beta_slow": slow,
            **stretched,
        }
    if method == "longrope":
        half = config.head_width // 2
        long = options.get("long_factor") or longrope_factors(config.head_width, base, original, factor)
        short = options.get("short_factor") or [1.0] * half
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **stretched}
    assert method == "llama3", method
    return {
        "rope_type": "llama3",
        "low_freq_factor": options.get("low_freq_factor") or 1.0,
        "high_freq_factor": options.get("high_freq_factor") or 4.0,
        **stretched,
    }


def describe_positions(config: ModelConfig) -> str:
    """The model's positions in a few words, for the record of what a stage changed."""
    if config.positions != "rope":
        return f"{config.positions} positions, {config.context} tokens"
    facts = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in config.rope.items()
        if key != "rope_type" and not isinstance(value, list)
    )
    resting = config.rotates.count(False)
    silent = f", {resting} of {config.layers} layers without positions" if resting else ""
    return f"rope {config.rope['rope_type']} ({facts}){silent}, {config.context} tokens"


def extend_context(
    model: Transformer, length: int, method: Method, *, seed: int = 0, **options: Any
) -> tuple[str, str]:
    """Make the model's positions reach `length` tokens; returns what they were and what they are."""
    config = model.config
    before = describe_positions(config)
    if method not in METHODS:
        raise TriviumError(f"context: there is no method '{method}'; choose one of {', '.join(METHODS)}")
    if config.positions == "learned":
        extend_table(model, length, method, seed)
    elif config.positions == "rope":
        extend_rope(model, length, method, options)
    else:
        model.config = config.changed(context=length)
    return before, describe_positions(model.config)


def extend_table(model: Transformer, length: int, method: Method, seed: int) -> None:
    """Lengthen a learned table; only interpolation and extrapolation have a meaning there."""
    assert model.position_embedding is not None
    table = model.position_embedding.weight
    if method == "interpolate":
        rows = interpolated_table(table, length)
    elif method == "extrapolate":
        rows = extended_table(table, length, seed)
    else:
        raise TriviumError(
            f"context: '{method}' changes rotary positions, but this model learned a table of positions; "
            "use 'interpolate' or 'extrapolate'"
        )
    model.position_embedding = nn.Embedding(length, rows.shape[1], _weight=rows)
    model.config = model.config.changed(context=length)


def extend_rope(model: Transformer, length: int, method: Method, options: dict[str, Any]) -> None:
    """Change the rotary positions of every layer that sees the whole context."""
    config = model.config
    # Shorter texts with another base or without positions take no reach away.
    length = max(length, config.reach) if method in ("base", "nope") else length
    if config.rope["rope_type"] == "dynamic" and method in KEEPING and length > config.reach:
        raise TriviumError(
            f"context: the parent's dynamic scaling reaches {config.reach} tokens and '{method}' keeps it; "
            "extend it with 'dynamic' or another method"
        )
    if method == "nope":
        if config.family not in ("llama", "smollm3"):
            raise TriviumError(
                f"context: a {config.family} model has no way to write layers without positions; "
                "use another method, or a llama or smollm3 model"
            )
        every = int(options.get("every") or 1)
        rotates = tuple(
            config.rotates_at(layer) and (layer + 1) % every != 0 for layer in range(config.layers)
        )
        context = config.context if config.rope["rope_type"] == "dynamic" else length
        model.config = config.changed(context=context, rotates=rotates, family="smollm3")
        for layer, turns in zip(model.layers, rotates):
            assert isinstance(layer, Layer)
            layer.attention.rotates = turns
        return
    rope = extended_rope(config, length, method, options)
    # Dynamic scaling reads the trained length from the model's own context, so that must stay what it was.
    context = original_context(config) if rope["rope_type"] == "dynamic" else length
    model.config = config.changed(context=context, rope=rope)
    model.rotary = Rotary(rope, config.head_width, context)
