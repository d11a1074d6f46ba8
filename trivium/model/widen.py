"""A wider residual stream, more heads, wider inner layers, experts: the same function in more weights.

Two ways. **Tiled** (HyperCloning, arXiv:2409.12903): the stream x becomes k copies [x, ..., x]; every matrix
that reads it divides its weights among the copies, W x = sum_c W_c x with sum_c W_c = W. If all W_c were
W / k, the copies would have equal gradients in every step and the model no new capacity; so noise that sums
to zero over the copies is added, W_c = W / k + N_c. **Padded**: x becomes [x, 0]; nothing writes into the new
places yet, and the columns that read them start at random.

Norms (the rule of LEMON, arXiv:2310.07999): with k copies of d numbers among d', the mean square is
(k d / d') times the old one, so with eta = sqrt(k d / d') the scale becomes eta * gamma and epsilon
eta^2 * epsilon. LayerNorm also subtracts the mean: it is padded with the mean instead of zero. Heads keep
their width, as it decides 1 / sqrt(d_h) and the angles of RoPE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.config import ExpertsConfig, ModelConfig

WidthMethod = Literal["tile", "pad"]
NOISE = 0.05
"""The size of the noise that makes copies differ, as a share of the weights' own deviation."""
AS_EXPERTS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""The family that writes a model of this one with experts in place of its inner layers."""


@dataclass(frozen=True)
class Axis:
    """How one dimension grows: the old unit behind every new one, or -1 for one that is new."""

    source: Tensor
    """[new] of int64"""
    old: int

    @property
    def counts(self) -> Tensor:
        """How many copies every old unit has: [old]."""
        return torch.bincount(self.source[self.source >= 0], minlength=self.old)

    @property
    def fresh(self) -> Tensor:
        """Which of the new units copy none: [new] of bool."""
        return self.source < 0

    def times(self, size: int) -> Axis:
        """The same for units of `size` numbers each."""
        inner = torch.arange(size)
        spread = torch.where(self.source[:, None] < 0, -1, self.source[:, None] * size + inner)
        return Axis(spread.flatten(), self.old * size)


def copied(old: int, new: int) -> Axis:
    """Every new unit copies an old one, in turn."""
    return Axis(torch.arange(new) % old, old)


def tiled(old: int, new: int) -> Axis:
    """As many whole copies as fit, and new units after them."""
    source = torch.arange(new)
    return Axis(torch.where(source < new // old * old, source % old, -1), old)


def padded(old: int, new: int) -> Axis:
    """The old units, and new ones after them."""
    source = torch.arange(new)
    return Axis(torch.where(source < old, source, -1), old)


@dataclass(frozen=True)
class Widening:
    """The shapes before and after, and how each dimension of the weights grows."""

    before: ModelConfig
    after: ModelConfig
    stream: Axis
    inner: Axis
    heads: Axis
    key_value_heads: Axis

    @property
    def eta(self) -> float:
        """By how much the root mean square of the stream shrinks."""
        return math.sqrt(int(self.stream.counts[0]) * self.before.width / self.after.width)


def widening(
    config: ModelConfig, method: WidthMethod, *,
    width: int | None, heads: int | None, key_value_heads: int | None, inner_width: int | None,
) -> Widening:  # fmt: skip
    """How this model becomes that wide; what is not given grows in proportion, heads in number only."""
    wide = width or config.width
    if wide < config.width:
        raise TriviumError(f"The model is {config.width} wide, so it cannot grow to {wide}: ask for more.")
    factor = wide / config.width
    group = config.heads // config.key_value_heads
    # Where queries are normalised over all heads together, new heads would change what the old ones say.
    together = config.query_key_norm == "full"
    if heads is None and key_value_heads is None:
        shared = round(config.key_value_heads * factor)
        if together and (method == "pad" or shared % config.key_value_heads):
            shared = config.key_value_heads
    else:
        shared = key_value_heads or -(-(heads or 0) // group)
    queries = heads or shared * group
    if together and queries != config.heads and (method == "pad" or queries % config.heads):
        raise TriviumError(
            f"{config.family} normalises queries over all heads together, so new heads would change what the "
            f"old ones say: ask for a multiple of {config.heads} heads with `width_method: tile`."
        )
    if queries != shared * group or shared < config.key_value_heads:
        raise TriviumError(
            f"{queries} heads over {shared} key-value heads: keep {group} heads for each key-value head, and "
            f"at least {config.key_value_heads} of those, so that every head reads the keys it read before."
        )
    inner = inner_width or max(config.inner_width, round(config.inner_width * factor))
    if inner < config.inner_width:
        raise TriviumError(f"The inner layer is {config.inner_width} wide and cannot grow to {inner}.")
    after = config.changed(
        width=wide,
        heads=queries,
        key_value_heads=shared,
        inner_width=inner,
        head_width=config.head_width,
        experts=None if config.experts is None else replace(
            config.experts, inner_width=round(config.experts.inner_width * inner / config.inner_width)
        ),
    )  # fmt: skip
    spread = copied if method == "tile" else padded
    stream = (tiled if method == "tile" else padded)(config.width, wide)
    eta = math.sqrt(int(stream.counts[0]) * config.width / wide)
    after = after.changed(norm_epsilon=config.norm_epsilon * eta**2)
    if config.embedding_scale == math.sqrt(config.width):
        after = after.changed(embedding_scale=math.sqrt(wide))
    key_values = spread(config.key_value_heads, shared)
    return Widening(
        config, after, stream, spread(config.inner_width, inner), key_values.times(group), key_values
    )


class Spread:
    """Writes the weights of a wider model; all noise comes from one generator, in the order of the names."""

    def __init__(self, how: Widening, noise: float, seed: int) -> None:
        self.how = how
        self.noise = noise
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, like: Tensor, *shape: int) -> Tensor:
        """Random numbers of the deviation that `like` has."""
        values = torch.randn(*shape, generator=self.generator)
        return values * float(like.float().std()) if like.numel() > 1 else values

    def read(self, weight: Tensor, reads: Axis) -> Tensor:
        """A matrix [out, old] over an input that has grown: [out, new].

        Copies share the old weight and differ by noise that sums to zero; new inputs are read at random.
        """
        counts = reads.counts
        source = reads.source.clamp(min=0)
        found = weight[:, source] / counts[source]
        noise = self.random(weight, *found.shape) * self.noise
        # The mean noise of the copies of every old input, subtracted from each of them.
        sums = torch.zeros_like(weight).index_add_(1, source, noise.masked_fill(reads.fresh, 0.0))
        noise = (noise - (sums / counts)[:, source]) * (counts[source] > 1)
        found = found + noise
        if reads.fresh.any():
            found[:, reads.fresh] = self.random(weight, len(weight), int(reads.fresh.sum()))
        return found

    def into_stream(self, weight: Tensor) -> Tensor:
        """A matrix or bias that writes into the stream, [old, ...]: copied; new places get 0, or the mean."""
        axis = self.how.stream
        found = weight[axis.source.clamp(min=0)].clone()
        if axis.fresh.any():
            centred = self.how.before.norm == "layer"
            found[axis.fresh] = weight.mean(0) if centred else torch.zeros_like(weight[0])
        return found

    def rows(self, weight: Tensor, axis: Axis) -> Tensor:
        """A matrix or bias whose rows are units, [old, ...]: copied, and random rows for new units."""
        found = weight[axis.source.clamp(min=0)].clone()
        if axis.fresh.any():
            fresh = int(axis.fresh.sum())
            found[axis.fresh] = (
                self.random(weight, fresh, *weight.shape[1:]) if weight.dim() > 1 else torch.zeros(fresh)
            )
        return found

    def silent(self, weight: Tensor, axis: Axis) -> Tensor:
        """A matrix [out, old] over units of which the new ones are not heard yet: [out, new]."""
        found = self.read(weight, axis)
        found[:, axis.fresh] = 0.0
        return found

    def norm(self, weight: Tensor) -> Tensor:
        """The scale of a norm over the stream."""
        one = 1.0 if self.how.before.norm_plus_one else 0.0
        axis = self.how.stream
        found = (weight + one)[axis.source.clamp(min=0)] * self.how.eta
        found[axis.fresh] = self.how.eta
        return found - one


def widened(
    how: Widening, weights: Mapping[str, Tensor], *, noise: float = NOISE, seed: int
) -> dict[str, Tensor]:
    """The weights of the wider model, from those of the model it grows from; all in float32."""
    spread = Spread(how, noise, seed)
    return {name: _grown(spread, name, weights[name].float()) for name in sorted(weights)}


WRITES = ("output", "down")
"""The modules of a layer that write into the stream; the other matrices read it."""


def _grown(spread: Spread, name: str, weight: Tensor) -> Tensor:
    """One tensor of the wider model, by what reads it and what it writes."""
    how = spread.how
    *_, module, kind = name.split(".")
    matrix = weight.dim() > 1
    if module in ("embedding", "position_embedding"):
        written = spread.into_stream(weight.T).T * (how.before.embedding_scale / how.after.embedding_scale)
        return written.contiguous()
    if name in ("norm.weight", "norm.bias"):
        return _last_norm(spread, weight, kind)
    units = _units(how, module, weight)
    if module in ("query_norm", "key_norm"):
        return weight.clone() if units is None else weight[units.source].clone()
    if module.endswith("norm"):
        return spread.norm(weight) if kind == "weight" else _norm_bias(spread, weight)
    if module in WRITES:
        return spread.into_stream(weight if units is None else spread.silent(weight, units))
    rows = weight if units is None else spread.rows(weight, units)
    return spread.read(rows, how.stream) if matrix else rows


def _units(how: Widening, module: str, tensor: Tensor) -> Axis | None:
    """How the heads or inner units grow that are a tensor's rows, or its columns where it writes into the
    stream; None where it has none."""
    if module in WRITES and tensor.dim() == 1:
        return None
    if module in ("query_norm", "key_norm") and how.before.query_key_norm == "head":
        return None
    if module in ("query", "output", "query_norm"):
        return how.heads.times(how.before.head_width)
    if module in ("key", "value", "key_norm"):
        return how.key_value_heads.times(how.before.head_width)
    if module in ("gate", "up", "down"):
        return _inner(how, tensor.shape[-1 if module == "down" else 0])
    assert module in ("head", "router") or module.endswith("norm"), f"no rule for {module}"
    return None


def _inner(how: Widening, width: int) -> Axis:
    """How an inner layer of this width grows: an expert's may be narrower than a layer's."""
    if width == how.before.inner_width:
        return how.inner
    assert how.before.experts is not None
    assert how.after.experts is not None
    kind = padded if how.inner.fresh.any() else copied
    return kind(how.before.experts.inner_width, how.after.experts.inner_width)


def _norm_bias(spread: Spread, bias: Tensor) -> Tensor:
    """The bias of a LayerNorm over the stream; what stands in new places is the mean, which becomes 0."""
    axis = spread.how.stream
    return bias[axis.source.clamp(min=0)].masked_fill(axis.fresh, 0.0)


def _last_norm(spread: Spread, weight: Tensor, kind: str) -> Tensor:
    """The norm before the head. A tied head reads the stream with the rows that write it, which cannot be
    divided among copies, so the scale is divided instead; and what Gemma's embeddings were scaled by."""
    how = spread.how
    found = spread.norm(weight) if kind == "weight" else _norm_bias(spread, weight)
    if not how.before.tied:
        return found
    scale = how.after.embedding_scale / how.before.embedding_scale / int(how.stream.counts[0])
    one = 1.0 if how.before.norm_plus_one and kind == "weight" else 0.0
    found = (found + one) * scale
    # A tied head has no random columns: new places of the stream are read by the rows that write them.
    return found - one


def widened_moments(how: Widening, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state where every number belongs to one old number, scaled as its gradient is.

    A tensor that writes n copies of a unit has 1 / n of the old gradient in each, as the matrices that read
    them divide their weights by n; a norm's scale has 1 / eta of that. New units begin at zero, and so do
    tied tables, whose gradient has two parts that scale differently.
    """
    if how.before.norm == "layer" and how.stream.fresh.any():
        # LayerNorm subtracts the mean of the new places too: no gradient is a multiple of the old one.
        return {name: tensor for name, tensor in moments.items() if name == "steps"}
    found: dict[str, Tensor] = {}
    for name, tensor in moments.items():
        kind, _, weight = name.partition(".")
        if kind not in ("first", "second"):
            found[name] = tensor
            continue
        power = 1 if kind == "first" else 2
        grown = _grown_moment(how, weight, tensor, power)
        if grown is not None:
            found[name] = grown
    return found


def _grown_moment(how: Widening, name: str, moment: Tensor, power: int) -> Tensor | None:
    *_, module, _ = name.split(".")
    if how.before.tied and (module in ("embedding", "head") or name.startswith("norm.")):
        return None
    if module in ("embedding", "position_embedding"):
        scale = how.after.embedding_scale / how.before.embedding_scale
        return _moved(moment.T, how.stream, power).T.contiguous() * scale**power
    units = _units(how, module, moment)
    if module in ("query_norm", "key_norm"):
        return moment if units is None else _moved(moment, units, power)
    if module.endswith("norm"):
        return _moved(moment, how.stream, power) / how.eta**power
    if module in WRITES:
        return _moved(moment if units is None else _columns(moment, units), how.stream, power)
    rows = moment if units is None else _moved(moment, units, power)
    return _columns(rows, how.stream) if moment.dim() > 1 else rows


def _moved(moment: Tensor, axis: Axis, power: int) -> Tensor:
    """Rows of a moment for every new unit, divided by the number of its copies."""
    source = axis.source.clamp(min=0)
    shape = (-1,) + (1,) * (moment.dim() - 1)
    found = moment[source] / (axis.counts[source] ** power).view(shape)
    found[axis.fresh] = 0.0
    return found


def _columns(moment: Tensor, axis: Axis) -> Tensor:
    """Columns of a moment for every new input, whose values are those of its source."""
    found = moment[:, axis.source.clamp(min=0)].clone()
    found[:, axis.fresh] = 0.0
    return found


def with_experts(config: ModelConfig, count: int, per_token: int) -> ModelConfig:
    """The config of the same model with experts in place of its inner layers."""
    if config.experts is not None:
        raise TriviumError("The model has experts already: only inner layers without can become experts.")
    family = AS_EXPERTS.get(config.family)
    if family is None or config.inner_bias or (family == "mixtral" and config.query_key_value_bias):
        raise TriviumError(
            f"No family writes a {config.family} model with experts: {', '.join(AS_EXPERTS)} can become one."
        )
    experts = ExpertsConfig(count=count, per_token=per_token, inner_width=config.inner_width, normalise=True)
    return config.changed(family=family, experts=experts)


def as_experts(
    weights: Mapping[str, Tensor], count: int, *, noise: float = 0.0, seed: int
) -> dict[str, Tensor]:
    """Sparse up-cycling (arXiv:2212.05055): every expert a copy of the inner layer, behind a random router.

    As the chosen experts' shares sum to 1 and all experts agree, the function stays; the tokens they are sent
    make them differ, and so does `noise` (which is not exact).
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name in sorted(weights):
        weight = weights[name].float()
        match = re.fullmatch(r"(layers\.\d+\.mlp\.)(gate|up|down)(\.weight)", name)
        if match is None:
            found[name] = weight.clone()
            continue
        for expert in range(count):
            spread = noise * weight.std() * torch.randn(weight.shape, generator=generator) if noise else 0.0
            found[f"{match[1]}experts.{expert}.{match[2]}{match[3]}"] = weight + spread
        if match[2] == "up":
            router = torch.randn(count, weight.shape[1], generator=generator) * 0.02
            found[f"{match[1]}router.weight"] = router
    return found
