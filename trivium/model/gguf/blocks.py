"""Matrices in GGUF's block formats, among them the two that the `gguf` package reads but does not write.

`Q4_K` holds 256 weights as 8 groups of 32: `w = d s q - m z`, with q in 4 bits, a scale s and an offset z
of 6 bits for each group, and d and m in float16 for the block. `Q6_K` holds 256 weights as 16 groups of 16:
`w = d s q` with q in 6 bits and s in 8. Both are found here by least squares: for a few grids about the
extremes of a group the weights are rounded, then the scale (and offset) that fit them best are computed,
and the best grid is kept.
"""

from typing import Any

import numpy as np

from trivium.model.gguf.read import gguf_package

Array = np.ndarray[Any, Any]
BLOCK = 256
_SHRINKS = np.linspace(0.85, 1.05, 9, dtype=np.float32)
_AT_ONCE = 4096


def stored_as(kind: str, width: int) -> str:
    """The type a row of this width is stored in where `kind` is asked for; blocks have to fill rows."""
    if kind in ("Q4_K", "Q6_K") and width % BLOCK:
        kind = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}[kind]
    return "F16" if kind not in ("F32", "F16", "BF16") and width % 32 and kind[-1] != "K" else kind


def encode(values: Array, kind: str) -> Array:
    """Float32 values [..., width] as a GGUF file stores them."""
    gguf = gguf_package()
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind in ("Q4_K", "Q6_K"):
        one = _q4_k if kind == "Q4_K" else _q6_k
        blocks = values.reshape(-1, BLOCK)
        pieces = [one(blocks[start : start + _AT_ONCE]) for start in range(0, len(blocks), _AT_ONCE)]
        return np.concatenate(pieces).reshape(*values.shape[:-1], -1)
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def _q4_k(blocks: Array) -> Array:
    groups = blocks.reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1, keepdims=True), 0.0)
    high = groups.max(-1, keepdims=True)
    best = np.full(low.shape, np.inf, dtype=np.float32)
    scale, offset = np.zeros_like(low), np.zeros_like(low)
    for shrink in _SHRINKS:
        step = (high - low) * shrink / 15
        whole = _whole(groups - low, step, 0, 15)
        slope, start = _fit(whole, groups)
        # An offset is stored without a sign and taken away: a line that starts above 0 goes through 0.
        steep = _divide((whole * groups).sum(-1, keepdims=True), (whole * whole).sum(-1, keepdims=True))
        slope, start = np.where(start > 0, steep, slope), np.minimum(start, 0.0)
        error = ((slope * whole + start - groups) ** 2).sum(-1, keepdims=True)
        better = (error < best) & (slope >= 0)
        best, scale = np.where(better, error, best), np.where(better, slope, scale)
        offset = np.where(better, -start, offset)
    scale, offset = scale[..., 0], offset[..., 0]
    d, s = _shared_scale(scale, 63)
    m, z = _shared_scale(offset, 63)
    step, start = (d * s)[..., None], (m * z)[..., None]
    whole = _whole(groups + start, step, 0, 15).astype(np.uint8)
    pairs = whole.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    s, z = s.astype(np.uint8), z.astype(np.uint8)
    scales = np.concatenate(
        [
            s[:, :4] | ((s[:, 4:] >> 4) << 6),
            z[:, :4] | ((z[:, 4:] >> 4) << 6),
            (s[:, 4:] & 15) | ((z[:, 4:] & 15) << 4),
        ],
        axis=1,
    )
    return np.concatenate([_halves(d), _halves(m), scales, packed], axis=1)


def _q6_k(blocks: Array) -> Array:
    groups = blocks.reshape(-1, 16, 16)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    best = np.full(extreme.shape, np.inf, dtype=np.float32)
    scale = np.zeros_like(extreme)
    for shrink in _SHRINKS:
        # The largest weight is given -32, of which there is no positive counterpart.
        whole = _whole(groups, -extreme * shrink / 32, -32, 31)
        slope = _divide((whole * groups).sum(-1, keepdims=True), (whole * whole).sum(-1, keepdims=True))
        error = ((slope * whole - groups) ** 2).sum(-1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, slope, scale)
    scale = scale[..., 0]
    largest = np.take_along_axis(scale, np.abs(scale).argmax(-1, keepdims=True), -1)
    d = (largest / -128).astype(np.float16).astype(np.float32)
    s = np.clip(np.rint(_divide(scale, d)), -128, 127)
    whole = (_whole(groups, (d * s)[..., None], -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = whole & 15, whole >> 4
    lower = np.concatenate([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=-1)
    upper = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    scales = s.astype(np.int8).view(np.uint8)
    return np.concatenate([lower.reshape(-1, 128), upper.reshape(-1, 64), scales, _halves(d)], axis=1)


def _whole(values: Array, step: Array, least: int, most: int) -> Array:
    """Values divided by a step and rounded; 0 where the step is 0."""
    return np.clip(np.rint(_divide(values, step)), least, most)


def _divide(above: Array, below: Array) -> Array:
    shape = np.broadcast_shapes(above.shape, below.shape)
    return np.divide(above, below, out=np.zeros(shape, np.float32), where=below != 0)


def _fit(whole: Array, values: Array) -> tuple[Array, Array]:
    """The line through (whole, values) of each group by least squares: its slope and where it starts."""
    mean, middle = whole.mean(-1, keepdims=True), values.mean(-1, keepdims=True)
    spread = ((whole - mean) ** 2).sum(-1, keepdims=True)
    slope = _divide(((whole - mean) * (values - middle)).sum(-1, keepdims=True), spread)
    return slope, middle - slope * mean


def _shared_scale(values: Array, most: int) -> tuple[Array, Array]:
    """Values at least 0 of a block's groups [N, groups] as whole numbers times one float16 [N, 1]."""
    shared = (values.max(-1, keepdims=True) / most).astype(np.float16).astype(np.float32)
    return shared, np.clip(np.rint(_divide(values, shared)), 0, most)


def _halves(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint8).reshape(len(values), 2)
