"""Adapters: small trained matrices beside frozen ones; several may share a model, and a batch may mix them.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), PiSSA (Meng et al. 2024)."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.settings import Settings
from trivium.model.transformer import Transformer

Kind = Literal["lora", "rslora", "dora", "pissa"]
ONLY = "default"
"""The name of an adapter that is alone."""


class AdapterSettings(Settings):
    """What a person may set about an adapter."""

    kind: Kind = "lora"
    """The adapter's method."""
    rank: int = Field(default=16, ge=1)
    """The rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    targets: list[str] = []
    """Patterns such as `query`, `mlp.*`, `layers.0.*`; empty is every linear layer but routers and head."""
    ranks: dict[str, int] = {}
    """Another rank for the layers a pattern names; the last that fits counts."""
    alphas: dict[str, float] = {}
    """Another alpha for the layers a pattern names."""
    train: list[Literal["embedding", "head", "norms"]] = []
    """Parts trained whole, as new tokens need them."""
    base: Literal["float", "int8", "int4"] = "float"
    """How the frozen matrices are held meanwhile; with int4 this is QLoRA."""
    save: Literal["merged", "adapter", "both"] = "both"
    """The model as a whole, the adapter beside a reference to its base, or both."""

    @model_validator(mode="before")
    @classmethod
    def from_word(cls, value: Any) -> Any:
        """`adapter: lora` names the method alone; `qlora` holds the frozen matrices in four bits."""
        if value == "qlora":
            return {"base": "int4"}
        return {"kind": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Shape:
    """One adapter in one layer: its rank, its product's factor, and whether outputs are rescaled."""

    rank: int
    scale: float
    alpha: float
    normed: bool = False


class Selection:
    """Which adapter the rows of the pass under way take: one for all, or one for each part of them."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.parts: list[tuple[str, Tensor]] | None = None
        self.names: list[str] = []


class AdaptedLinear(nn.Linear):
    """A linear layer with any number of adapters; its weight keeps its place and its name."""

    def __init__(self, linear: nn.Linear, selection: Selection) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.selection = selection
        self.down, self.up, self.magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.shapes: dict[str, Shape] = {}
        # PiSSA's beginning, already taken out of the weight: what is learned is the difference to it.
        self.taken: dict[str, tuple[Tensor, Tensor]] = {}
        self.original: nn.Parameter | None = None

    def add(self, name: str, shape: Shape, down: Tensor, up: Tensor, magnitude: Tensor | None = None) -> None:
        """Lay an adapter on this layer."""
        self.shapes[name] = shape
        self.down[name], self.up[name] = nn.Parameter(down), nn.Parameter(up)
        if shape.normed:
            length = row_lengths(whole(self.weight) + shape.scale * up @ down)
            self.magnitude[name] = nn.Parameter(length if magnitude is None else magnitude)

    def forward(self, rows: Tensor) -> Tensor:
        if self.original is not None:
            return F.linear(rows, self.weight, self.bias)
        plain = F.linear(rows, self.weight)
        if self.selection.parts is None:
            result = self._adapted(rows, plain, self.selection.active)
        else:
            result = plain.clone()
            for name, places in self.selection.parts:
                places = places.to(rows.device)
                part = self._adapted(rows.index_select(0, places), plain.index_select(0, places), name)
                result.index_copy_(0, places, part)
        return result if self.bias is None else result + self.bias

    def _adapted(self, rows: Tensor, plain: Tensor, name: str | None) -> Tensor:
        """The layer's result without its bias, under one adapter."""
        if name is None or name not in self.shapes:
            # With its beginning taken out, the layer alone is no longer what it was.
            for taken, (down, up) in self.taken.items():
                plain = plain + self.shapes[taken].scale * (rows @ down.t()) @ up.t()
            return plain
        shape, down, up = self.shapes[name], self.down[name], self.up[name]
        result = torch.add(plain, (rows @ down.t()) @ up.t(), alpha=shape.scale)
        return result * self._stretch(name) if shape.normed else result

    def _stretch(self, name: str) -> Tensor:
        """DoRA: the wanted length of each output's weights over the real one, held constant (§4.3)."""
        with torch.no_grad():
            change = self.shapes[name].scale * self.up[name] @ self.down[name]
            length = row_lengths(whole(self.weight) + change)
        return self.magnitude[name] / length

    def change(self) -> Tensor:
        """What the acting adapter adds to the matrix that the layer is without it, differentiably."""
        name = self.selection.active
        if name is None or name not in self.shapes:
            return torch.zeros_like(whole(self.weight))
        added = self.shapes[name].scale * self.up[name] @ self.down[name]
        if self.shapes[name].normed:
            weight = whole(self.weight)
            added = (weight + added) * self._stretch(name)[:, None] - weight
        for taken, (down, up) in self.taken.items():
            added = added - self.shapes[taken].scale * up @ down
        return added

    @torch.no_grad()
    def merged(self, name: str | None) -> Tensor:
        """The one matrix that does what the layer does under an adapter."""
        weight = whole(self.weight)
        if name is None or name not in self.shapes:
            for taken, (down, up) in self.taken.items():
                weight = weight + self.shapes[taken].scale * up @ down
            return weight
        weight = weight + self.shapes[name].scale * self.up[name] @ self.down[name]
        return weight * self._stretch(name)[:, None] if self.shapes[name].normed else weight


def whole(weight: Tensor) -> Tensor:
    """A weight in numbers to reckon with, whatever form it is held in."""
    values = weight.dequantize() if hasattr(weight, "tensor_data_names") else weight
    return values.detach()


def row_lengths(weight: Tensor) -> Tensor:
    """The length of each output's weights."""
    return torch.linalg.vector_norm(weight, dim=1)


def adaptable(model: Transformer) -> dict[str, nn.Linear]:
    """The layers an adapter may lie on: every projection in the layers but the routers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.") and not name.endswith(".router")
    }


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern names this layer: by its whole name or by how the name ends."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def last_fitting(name: str, table: Mapping[str, float], default: float) -> float:
    """The value of the last pattern that names this layer."""
    for pattern, value in table.items():
        default = value if fits(name, pattern) else default
    return default


def targeted(model: Transformer, patterns: Sequence[str]) -> list[str]:
    """The layers that the patterns name; each pattern has to name one."""
    names = list(adaptable(model))
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            parts = ", ".join(sorted({name.rsplit(".", 1)[1] for name in names}))
            raise TriviumError(f"adapter.targets: {pattern!r} names no layer; there are {parts}.")
    return [name for name in names if not patterns or any(fits(name, pattern) for pattern in patterns)]


def selection_of(model: nn.Module) -> Selection | None:
    """What decides the adapter of a pass, if the model has adapters."""
    return next((one.selection for one in adapted_layers(model).values()), None)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that carry adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def make_room(model: Transformer, names: Sequence[str]) -> dict[str, AdaptedLinear]:
    """The named layers, made ready to carry adapters."""
    selection = selection_of(model) or Selection()
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, AdaptedLinear):
            assert isinstance(layer, nn.Linear)
            layer = AdaptedLinear(layer, selection)
            model.set_submodule(name, layer)
        found[name] = layer
    return found


def note(model: Transformer, name: str) -> None:
    """Make an adapter known and let it act."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise TriviumError(f"an adapter cannot be called {name!r}: use letters, digits, - and _.")
    selection = selection_of(model)
    assert selection is not None
    if name in selection.names:
        raise TriviumError(f"the model already has an adapter {name!r}; choose another name.")
    selection.names.append(name)
    selection.active = name


def adapter_names(model: Transformer) -> list[str]:
    """The adapters that lie on a model."""
    selection = selection_of(model)
    return [] if selection is None else list(selection.names)


@torch.no_grad()
def add_adapter(
    model: Transformer, settings: AdapterSettings, *, seed: int = 0, name: str = ONLY
) -> dict[str, AdaptedLinear]:
    """Lay a new adapter on a model and freeze everything else; at first it changes no output."""
    if settings.kind == "pissa" and (adapter_names(model) or settings.base != "float"):
        raise TriviumError("adapter: pissa changes the base, which must be alone and float; choose lora.")
    named = targeted(model, settings.targets)
    # Every rounded matrix gets its place, so that merging makes all of them whole numbers' real values.
    layers = make_room(model, named if settings.base == "float" else list(adaptable(model)))
    layers = {name: layers[name] for name in named}
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for layer_name, layer in layers.items():
        rank = int(last_fitting(layer_name, settings.ranks, settings.rank))
        rank = min(rank, layer.in_features, layer.out_features)
        alpha = last_fitting(layer_name, settings.alphas, settings.alpha)
        scale = alpha / math.sqrt(rank) if settings.kind == "rslora" else alpha / rank
        shape = Shape(rank, scale, alpha, normed=settings.kind == "dora")
        if settings.kind == "pissa":
            down, up = principal(layer.weight, rank, scale)
            layer.weight.sub_(scale * up @ down)
            layer.taken[name] = (down.clone(), up.clone())
        else:
            bound = layer.in_features**-0.5
            drawn = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            down = drawn.to(whole(layer.weight))
            up = down.new_zeros(layer.out_features, rank)
        layer.add(name, shape, down, up)
    note(model, name)
    for parameter in whole_parts(model, settings.train).values():
        parameter.requires_grad_(True)
    return layers


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA: the `rank` strongest directions of a matrix, as an adapter of this scale."""
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype).contiguous()


def whole_parts(model: Transformer, parts: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of the parts that are trained whole; a tied head is its embedding."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        kind = "norms" if "norm" in name else name.split(".", 1)[0].removeprefix("position_")
        if kind in parts or (name.startswith("embedding") and "head" in parts and model.head is None):
            found[name] = parameter
    return found


@contextmanager
def selected(model: Transformer, name: str | None) -> Iterator[None]:
    """Inside the block one adapter acts, or with None none does: the model is its base."""
    selection = selection_of(model)
    if selection is None:
        assert name is None
        yield
        return
    before = selection.active, selection.parts
    selection.active, selection.parts = name, None
    try:
        yield
    finally:
        selection.active, selection.parts = before


@contextmanager
def mixing(selection: Selection | None, names: Sequence[str | None], counts: Sequence[int]) -> Iterator[None]:
    """Inside the block a batch mixes adapters: each name has its count of rows; None is what acts anyway."""
    if selection is None or not any(names):
        yield
        return
    owners = [name or selection.active for name in names]
    ends = torch.tensor(counts).cumsum(0).tolist()
    selection.parts = []
    for owner in dict.fromkeys(one for one in owners if one is not None):
        spans = [
            torch.arange(end - count, end)
            for name, end, count in zip(owners, ends, counts, strict=True)
            if name == owner
        ]
        selection.parts.append((owner, torch.cat(spans)))
    try:
        yield
    finally:
        selection.parts = None


def merge(model: Transformer) -> None:
    """Put the acting adapter into the weights; `unmerge` takes it out again without a trace."""
    for layer in adapted_layers(model).values():
        assert layer.original is None, "merged twice"
        matrix = layer.merged(layer.selection.active)
        assert isinstance(layer.weight, nn.Parameter)
        layer.original = layer.weight
        layer.weight = nn.Parameter(matrix, requires_grad=False)


def unmerge(model: Transformer) -> None:
    """Put the weights back that were there before `merge`, bit for bit."""
    for layer in adapted_layers(model).values():
        assert layer.original is not None, "not merged"
        layer.weight, layer.original = layer.original, None


@contextmanager
def merged(model: Transformer) -> Iterator[None]:
    """Inside the block the acting adapter is part of the weights."""
    merge(model)
    try:
        yield
    finally:
        unmerge(model)


def bake(model: Transformer) -> None:
    """Make the acting adapter part of the weights for good: plain linear layers are left."""
    for name, layer in adapted_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.merged(layer.selection.active), requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
