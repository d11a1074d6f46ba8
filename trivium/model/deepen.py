"""More layers from the ones there are: identity blocks, stacking, interpolation, overlapping copies.

A pre-norm block adds to the residual stream: h <- h + f(h). A new block whose f is 0 leaves every hidden
state as it was, so the grown model starts as exactly the old function (LLaMA Pro, arXiv:2401.02415). Its
inner weights are a copy of the block before it; only what writes into the stream is silenced: the output
projections, or, in families that normalise after the sub-layer, that norm's scale. Nothing else is zero, so
these get a gradient at once and the others from the second step on.

Stacking (G_stack, arXiv:2405.15319), overlapping copies (SOLAR, arXiv:2312.15166) and interpolation do not
preserve the function; they start higher up and are measured by what they reach.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig

DepthMethod = Literal["identity", "masked", "learned", "stack", "interpolate", "overlap", "random"]
Place = Literal["interleaved", "between", "end"]
Start = Literal["copied", "silent", "random"]
STARTS: dict[str, Start] = {"identity": "silent", "masked": "copied", "random": "random"}
"""How the layers begin that a method puts between the old ones."""
LAYER = re.compile(r"layers\.(\d+)\.(.+)")
WRITES = re.compile(r"(attention\.output|mlp\.(experts\.\d+\.)?down)\.(weight|bias)")
"""The weights of a block that write into the residual stream."""


@dataclass(frozen=True)
class Block:
    """Where a layer of the deeper model comes from."""

    source: int
    """The old layer that it copies, and that says whether it has a window or experts."""
    following: float = 0.0
    """How far its weights lie towards those of the layer after the source."""
    start: Start = "copied"
    """Whether it computes what its source does, adds nothing yet, or starts from random weights."""
    kept: bool = False
    """Whether it is the old layer itself, whose optimiser state it keeps."""


def blocks_for(old: int, new: int, method: DepthMethod, place: Place = "interleaved") -> list[Block]:
    """The plan of a model of `new` layers made from one of `old`."""
    if new <= old:
        raise TriviumError(f"The model has {old} layers already, so it cannot grow to {new}: ask for more.")
    if method in STARTS:
        return _inserted(old, new - old, place, STARTS[method])
    if method in ("stack", "learned"):
        return [Block(layer % old, kept=layer < old) for layer in range(new)]
    if method == "overlap":
        return _overlapping(old, new)
    found: list[Block] = []
    for layer in range(new):
        position = layer * (old - 1) / (new - 1)
        source = min(int(position), max(old - 2, 0))
        found.append(Block(source, position - source) if old > 1 else Block(0))
    return _first_copies_kept(found)


def _inserted(old: int, added: int, place: Place, start: Start) -> list[Block]:
    """All old layers in their order and `added` new ones after some of them."""
    if place == "end":
        after = [old - 1] * added
    elif place == "between":
        after = [(old + 1) // 2 - 1] * added
    else:
        # Evenly: after the layers that end each of `added` groups, as in block expansion.
        after = [-(-old * (one + 1) // added) - 1 for one in range(added)]
    found: list[Block] = []
    for layer in range(old):
        found.append(Block(layer, kept=True))
        found += [Block(layer, start=start)] * after.count(layer)
    return found


def _overlapping(old: int, new: int) -> list[Block]:
    """Two copies of the model, the last m layers of the first and the first m of the second left out."""
    left_out, odd = divmod(2 * old - new, 2)
    if odd or left_out < 0:
        nearest = min(new + 1, 2 * old) if odd else 2 * old
        raise TriviumError(
            f"`overlap` joins two copies of {old} layers and leaves as many out of each: it gives an even "
            f"number of layers up to {2 * old}, such as {nearest}, not {new}."
        )
    first = [Block(layer, kept=True) for layer in range(old - left_out)]
    return first + [Block(layer) for layer in range(left_out, old)]


def _first_copies_kept(blocks: Sequence[Block]) -> list[Block]:
    """The same plan with the first exact copy of every old layer marked as that layer itself."""
    seen: set[int] = set()
    found = []
    for block in blocks:
        whole = block.following in (0.0, 1.0)
        exact = block.source + int(block.following)
        if whole and exact not in seen:
            seen.add(exact)
            block = Block(exact, kept=True)
        found.append(block)
    return found


def deepened_config(config: ModelConfig, blocks: Sequence[Block]) -> ModelConfig:
    """The config of the deeper model: every layer keeps its source's window, rotation and experts."""
    return config.of_layers([block.source for block in blocks])


def deepened(
    config: ModelConfig, weights: Mapping[str, Tensor], blocks: Sequence[Block], *, seed: int
) -> dict[str, Tensor]:
    """The weights of the deeper model, from those of the model it grows from."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: tensor for name, tensor in weights.items() if not LAYER.match(name)}
    parts: list[dict[str, Tensor]] = [{} for _ in range(config.layers)]
    for name, tensor in weights.items():
        if match := LAYER.match(name):
            parts[int(match[1])][match[2]] = tensor
    for layer, block in enumerate(blocks):
        for part, tensor in parts[block.source].items():
            if block.following:
                tensor = torch.lerp(tensor, parts[block.source + 1][part], block.following)
            if block.start == "random" and tensor.dim() > 1:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                tensor = noise * tensor.shape[1] ** -0.5
            elif block.start == "silent":
                tensor = silenced(config, part, tensor)
            found[f"layers.{layer}.{part}"] = tensor.clone()
    return found


def silenced(config: ModelConfig, part: str, tensor: Tensor, share: float = 0.0) -> Tensor:
    """A weight of a block that adds nothing to the stream, or a share of what it would."""
    if config.norm_after:
        # The norm would divide a zero by the root of epsilon in the backward pass, so its scale is silenced.
        if part in ("attention_post_norm.weight", "mlp_post_norm.weight"):
            one = 1.0 if config.norm_plus_one else 0.0
            return (tensor + one) * share - one
        return tensor
    return tensor * share if WRITES.fullmatch(part) else tensor


def deepened_moments(moments: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The optimiser's state of the old layers under their new names; new layers have none."""
    found = {}
    place = {block.source: layer for layer, block in enumerate(blocks) if block.kept}
    for name, tensor in moments.items():
        kind, _, rest = name.partition(".")
        match = LAYER.match(rest)
        if match is None:
            found[name] = tensor
        elif int(match[1]) in place:
            found[f"{kind}.layers.{place[int(match[1])]}.{match[2]}"] = tensor
    return found
