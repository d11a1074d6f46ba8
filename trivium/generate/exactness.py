"""Which numbers of this machine do not depend on what else is in a batch: found by trying, not assumed.

A matrix library picks a kernel by the shape of a product, and each kernel adds in an order of its own. So the
bits of a row may depend on how many rows are multiplied with it, and on its place among them. How depends
on the processor: one library sums alike from two rows on, another from four, a third only in multiples of
six. `probe` multiplies matrices of a model's shapes with many copies of one row: the numbers of rows for
which all copies of the result are equal, and equal among these numbers, are the ones that may be used, and
no others are (`VerifiedSizes`). It also attends to the same queries cut and batched in several ways; where
that shows, each row, and each block of a prompt, is attended to on its own, which is the same call whatever
else is there.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trivium.generate.attention import NEVER, mix
from trivium.generate.kv_cache import BLOCK, reach_for
from trivium.generate.packed import HalfMatrix, Product, reordered, reordered_product
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, write_json
from trivium.kit.kernels import Kernels, kernels
from trivium.model.arithmetic import note_product
from trivium.model.config import ModelConfig
from trivium.model.lora import AdaptedLinear
from trivium.model.transformer import Transformer


@dataclass(frozen=True)
class VerifiedSizes:
    """The numbers of rows for which every row of a product has the same bits; empty where there are none."""

    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As ranges: `2-32, 36, 40`."""
        ranges: list[list[int]] = []
        for size in self.sizes:
            if ranges and ranges[-1][1] == size - 1:
                ranges[-1][1] = size
            else:
                ranges.append([size, size])
        return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

    def padded(self, count: int) -> int:
        """The smallest number of rows, `count` or more, that can be cut into such sizes."""
        return sum(_pieces(self.sizes, count)) if self.sizes else count

    def cuts(self, count: int) -> list[slice]:
        """The products into which a padded number of rows is cut."""
        ends = list(accumulate(_pieces(self.sizes, count))) if self.sizes else [count]
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    def apply(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """`multiply` on rows [N, in], a verified number at a time: [N, out]."""
        count = len(rows)
        padded = self.padded(count)
        if padded > count:
            # copies of a row that is there, since a kernel that rounds rows may not like zeros
            rows = torch.cat((rows, rows[:1].expand(padded - count, -1)))
        cuts = self.cuts(padded)
        if len(cuts) == 1:
            return multiply(rows)[:count]
        return torch.cat([multiply(rows[cut]) for cut in cuts])[:count]


ROWS_PER_READ = 8
"""So many more rows cost about as much as reading a matrix once more (SmolLM2-135M, 8 rows instead of 1)."""


@lru_cache(maxsize=4096)
def _pieces(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Sizes that add up to as little above `count` as can be, the largest first, or one for several."""
    for total in range(max(count, sizes[0]), count + sizes[-1] + 1):
        pieces, rest = [], total
        while rest >= sizes[0]:
            pieces.append(sizes[bisect_right(sizes, rest) - 1])
            rest -= pieces[-1]
        if rest == 0:
            # each piece reads the whole matrix, which takes as long as to multiply it with some rows
            if count <= sizes[-1]:
                one = sizes[bisect_left(sizes, count)]
                if one <= total + ROWS_PER_READ * (len(pieces) - 1):
                    return (one,)
            return tuple(pieces)
    raise AssertionError("a multiple of the largest size is always there")


_PRODUCTS = (F.linear, torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__)


class InVerifiedSizes(TorchFunctionMode):
    """Inside the block every product of rows with a matrix is computed in these numbers of rows."""

    def __init__(self, rows: VerifiedSizes) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs and args[0].dim() == 2 and args[1].dim() == 2 and len(args[0]):
            count = len(args[0])
            # What the model notes itself are the rows it was given; these come on top.
            note_product(self.rows.padded(count) - count, args[1])
            return self.rows.apply(args[0], lambda rows: func(rows, *args[1:]))
        return func(*args, **kwargs)


VERSION = 1
"""Raised when the probe changes, so that what an older one found is not taken over."""

BIT_EXACT = "bit-exact"
CLOSE = "same tokens, log-probabilities within 1e-5"

SMALL = (*range(1, 33), 36, 40, 44, 48, 52, 54, 56, 60, 64)
FEW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LARGE = (128, 256, 512)
LEAST_PADDING, WORTHWHILE = 16, 32
OPERATIONS_PER_THREAD = 1.5e9
"""Beyond so many FLOPs fewer numbers of rows are tried, and products are cut into 64 rows at most."""


@dataclass(frozen=True)
class Heads:
    """What decides how attention is computed."""

    keys: int
    group: int
    """Queries of each key head."""
    width: int
    cap: float | None

    @classmethod
    def of(cls, config: ModelConfig) -> Heads:
        """The heads of a model."""
        keys = config.key_value_heads
        cap = config.attention_soft_cap
        # the fused kernel computes one head after the other; of batched products, two show what there is
        return cls(1 if cap is None else min(keys, 2), config.heads // keys, config.head_width, cap)


@dataclass(frozen=True)
class Exactness:
    """What was found for the shapes of one model."""

    rows: VerifiedSizes = field(default_factory=VerifiedSizes)
    prompts: bool = True
    """Whether prompts may be attended to in any chunks, several at once."""
    steps: bool = True
    """Whether rows of unlike lengths may be attended to in one call."""
    promise: str = CLOSE


def of_model(model: Transformer, products: Iterable[Product], dtype: torch.dtype | None = None) -> Exactness:
    """What holds for this model here; only float32 on a processor is probed. `dtype` is that of its rows."""
    if (unprobed := _unprobed(model.device.type, dtype or model.dtype)) is not None:
        return unprobed
    return probed(tuple(sorted(set(products), key=repr)), Heads.of(model.config))


def _unprobed(device: str, dtype: torch.dtype) -> Exactness | None:
    """What holds without a probe where kernels are not told how many rows to take."""
    if dtype != torch.float32:
        return Exactness(promise=f"none in {str(dtype).removeprefix('torch.')}")
    return None if device == "cpu" else Exactness()


def of_modules(model: Transformer) -> list[Product]:
    """The products of a model that is run through its modules."""
    products = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            form = "linear" if module.bias is None or isinstance(module, AdaptedLinear) else "linear bias"
            products.append(Product(module.in_features, module.out_features, form))
        if isinstance(module, AdaptedLinear):
            for shape in module.down.values():
                rank = shape.shape[0]
                products += [Product(module.in_features, rank, "linear")]
                products += [Product(rank, module.out_features, "linear")]
    outputs, inputs = model.head_weight.shape
    return [*products, Product(inputs, outputs, "linear")]


def typical() -> Exactness:
    """What holds for a small model on this machine's device, which is said before a model is known."""
    device = machine.device()
    if (unprobed := _unprobed(device.partition(":")[0], machine.compute_dtype(device))) is not None:
        return unprobed
    shapes = ((128, 256), (128, 128), (128, 352), (352, 128))
    products = [Product(inputs, outputs, form) for inputs, outputs in shapes for form in ("mm", "addmm")]
    return probed(tuple(products), Heads(1, 2, 32, None))


def probed(products: tuple[Product, ...], heads: Heads) -> Exactness:
    """What was found before with the same kernels, in this process or another, or else by probing now."""
    return _probed(kernels(), products, heads)


@lru_cache(maxsize=256)
def _probed(here: Kernels, products: tuple[Product, ...], heads: Heads) -> Exactness:
    shapes = {"products": [list(asdict(one).values()) for one in products], "heads": asdict(heads)}
    question = {"version": VERSION, "kernels": asdict(here), **shapes}
    file = _file(question)
    if file is not None and (kept := _read(file, question)) is not None:
        return kept
    answer = probe(products, heads)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**question, "found": {**asdict(answer), "rows": answer.rows.sizes}})
        except (OSError, TriviumError):
            pass  # a folder that cannot be written costs the next process a probe
    return answer


def _file(question: dict) -> Path | None:
    """Where the answer to a question is kept, if anywhere: `TRIVIUM_CACHE`, or the user's cache folder."""
    folder = os.environ.get("TRIVIUM_CACHE")
    if folder is None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(folder, "trivium")
    name = hashlib.sha256(repr(question).encode()).hexdigest()[:16]
    return Path(folder) / "exactness" / f"{name}.json" if folder else None


def _read(file: Path, question: dict) -> Exactness | None:
    """What a file of the cache says, or None if it is absent, damaged or of another question."""
    try:
        content = read_json(file)
        answer = content.pop("found")
        if content != question:
            return None
        sizes = tuple(int(size) for size in answer["rows"])
        return Exactness(
            VerifiedSizes(sizes), bool(answer["prompts"]), bool(answer["steps"]), str(answer["promise"])
        )
    except (OSError, TriviumError, ValueError, KeyError, TypeError, AttributeError):
        return None


@torch.inference_mode()
def probe(products: Sequence[Product], heads: Heads) -> Exactness:
    """Try the shapes; about 10 ms for a small model, 50 ms for one of width 512."""
    rows = VerifiedSizes(_sizes(products))
    return Exactness(
        rows, _prompts_are_alike(heads), _steps_are_alike(heads), BIT_EXACT if rows.sizes else CLOSE
    )


def _sizes(products: Sequence[Product]) -> tuple[int, ...]:
    """The numbers of rows that give the same bits in every product, or none."""
    operations = sum(2 * one.inputs * one.outputs for one in products)
    limit = OPERATIONS_PER_THREAD * torch.get_num_threads()
    tried = list(SMALL if operations * sum(SMALL) < limit else FEW)
    for size in LARGE:
        if operations * (sum(tried) + size) < limit:
            tried.append(size)
    kinds: dict[int, tuple[bytes, ...]] = dict.fromkeys(tried, ())
    for product in products:
        results = _results(product, list(kinds))
        kinds = {size: (*kinds[size], result) for size, result in results.items()}
    classes: dict[tuple[bytes, ...], list[int]] = {}
    for size, kind in kinds.items():
        classes.setdefault(kind, []).append(size)
    usable = [tuple(sizes) for sizes in classes.values() if sizes[-1] >= 8]
    return max(usable, key=_worth, default=())


def _worth(sizes: tuple[int, ...]) -> tuple[bool, bool, int, int]:
    """Little padding for a lone row first, then large products for prompts."""
    least, most = sizes[0], sizes[-1]
    return (least <= LEAST_PADDING, most >= WORTHWHILE, -least, most)


def _results(product: Product, sizes: Sequence[int]) -> dict[int, bytes]:
    """The bits of a row's result for each number of rows in which all places give the same."""
    row, weight, added = _factors(product)
    bias = None
    if product.form.endswith("bias"):
        bias = added
    if product.form not in ("mm", "addmm", "bias"):
        weight = weight.t().contiguous()
    if product.form == "fbgemm":
        half = HalfMatrix([weight])
    elif product.form == "onednn":
        weight = reordered(weight)
    results = {}
    for size in sizes:
        rows = row.repeat(size, 1)
        if product.form.startswith("linear"):
            out = F.linear(rows, weight, bias)
        elif product.form == "fbgemm":
            out = half.product(rows)
        elif product.form == "onednn":
            out = reordered_product(rows, weight)
        elif bias is not None:
            out = torch.addmm(bias, rows, weight)
        elif product.form == "addmm":
            out = added.repeat(size, 1)
            torch.addmm(out, rows, weight, out=out)
        else:
            out = torch.mm(rows, weight)
        if torch.equal(out, out[:1].expand_as(out)):
            results[size] = out[0].numpy().tobytes()
    return results


def _factors(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """A row [1, in], a matrix [in, out] and what may be added [out], made to show the order of a sum.

    The second half of each sum takes back the first but for a thousandth: what is left is fine enough to
    show how the large parts were rounded, even where only the last column is added in another order.
    """
    generator = torch.Generator().manual_seed(product.inputs)
    numbers = torch.randn(8191, generator=generator)
    half = product.inputs // 2
    count = product.inputs * product.outputs
    weight = numbers.repeat(-(-count // len(numbers)))[:count].view(product.inputs, product.outputs)
    row = numbers.flip(0).repeat(-(-product.inputs // len(numbers)))[None, : product.inputs]
    row[:, product.inputs - half :] = row[:, :half].flip(1)
    weight[product.inputs - half :].mul_(1e-3).sub_(weight[:half].flip(0))
    added = numbers.repeat(-(-product.outputs // len(numbers)))[: product.outputs]
    return row, weight, added * 1e-3


def _prompts_are_alike(heads: Heads) -> bool:
    """Whether a block of a prompt gets the same bits in chunks of any size, and wherever a chunk ends."""
    # the kernel for many queries takes 32, 64 or 256 of them at once, by whether there are 192 or 768
    many = min(-(-768 // heads.group // BLOCK), 32)
    chunks = [(blocks, 256, 256) for blocks in (1, 2, 3, 4, 5, 6, 13, 17, many)]
    reaches = ((208, 208), (208, 256), (256, 512), (512, 512), (512, 1024), (1024, 1024), (1024, 1536))
    chunks += [(blocks, length, reach) for blocks in (1, 3) for length, reach in reaches]
    results: dict[int, set[bytes]] = {}
    for blocks, length, reach in chunks:
        places = heads.group * blocks * BLOCK
        out = _attended(heads, 1, places, length, reach)
        results.setdefault(length, set()).update(_bits(out.transpose(1, 2).flatten(0, 1)))
    return all(len(kinds) == 1 for kinds in results.values())


def _steps_are_alike(heads: Heads) -> bool:
    """Whether a row's next token gets the same bits among rows of other lengths."""
    for length in (16, 128, 256, 384, 512, 1024):
        results = set()
        for rows, longest in ((1, length), (3, length + 16), (2, length + 130), (1, length + 300)):
            reach = reach_for(longest, lone=heads.group == 1)
            results |= _bits(_attended(heads, rows, heads.group, length, reach))
        if len(results) > 1:
            return False
    return True


def _attended(heads: Heads, rows: int, places: int, length: int, reach: int) -> Tensor:
    """What equal queries see in equal rows, [rows, K, places, D], of `length` tokens among `reach` places."""
    cached = _cached(heads)
    query = cached[-1, 0, :, None].expand(rows, -1, places, -1)
    keys, values = (part.expand(rows, -1, -1, -1) for part in cached[:reach].transpose(0, 2).unbind(1))
    mask = torch.zeros(rows, 1, places if rows == 1 else 1, reach)
    mask[..., length:] = NEVER
    return mix(query.contiguous(), keys, values, mask, heads.width**-0.5, heads.cap)


@lru_cache(maxsize=1)
def _cached(heads: Heads) -> Tensor:
    """Random keys and values as they lie in a cache, [L, 2, K, D]."""
    generator = torch.Generator().manual_seed(heads.width)
    return torch.randn(1536, 2, heads.keys, heads.width, generator=generator)


def _bits(parts: Tensor) -> set[bytes]:
    return {part.contiguous().numpy().tobytes() for part in parts}
