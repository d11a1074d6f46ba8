"""Muon for matrices, AdamW for everything else: one optimiser with named groups and plain tensors."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from trivium.learn.holders import gathered
from trivium.learn.sharding import divided_as, shared_out
from trivium.model.arithmetic import note_products
from trivium.model.compiling import allow_programs

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic (2024): it drives all singular values towards 1 in five steps, roughly and fast."""
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class LearningRates:
    """Each group's full learning rate, and the numbers the methods share."""

    matrices: float
    embeddings: float
    head: float
    scalars: float
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-10
    new_parts: float = 1.0
    """How many times faster the encoders and projectors of other modalities learn."""

    def of(self, group: str) -> float:
        return float(getattr(self, group))

    def factor_of(self, name: str) -> float:
        """By how much the rate of a parameter differs from its group's."""
        return self.new_parts if name.startswith("modalities.") else 1.0


def group_of(name: str, parameter: Tensor) -> str:
    """Which group a parameter belongs to: what it is, not its shape alone, decides how it should move."""
    if "embedding" in name:
        return "embeddings"
    # A value or reward head is an output too, and one row has no singular values to even out.
    if name.startswith(("head.", "extra.")) or ".head." in name:
        return "head" if parameter.dim() >= 2 else "scalars"
    return "matrices" if parameter.dim() >= 2 else "scalars"


def newton_schulz(updates: Tensor, dtype: torch.dtype) -> Tensor:
    """The iteration over matrices [n, rows, columns] that are not tall; its result is in float32."""
    a, b, c = COEFFICIENTS
    x = updates.float()
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.float()


@cache
def compiled_newton_schulz() -> Callable[[Tensor, torch.dtype], Tensor]:
    """The same in one program for each shape of a stack, of which a model has few."""
    allow_programs()
    return torch.compile(newton_schulz, dynamic=False)


def orthogonalised(updates: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton–Schulz over a stack of matrices [n, rows, columns]: singular values to about 1.

    Its products are of factors of type `dtype`; bfloat16, as in Jordan's own code, is ten times as fast on a
    GPU, where it is compiled. The norm that brings the singular values below 1 is taken in float32 before.
    """
    tall = updates.shape[-2] > updates.shape[-1]
    x = updates.mT if tall else updates
    gram = x[..., : x.shape[-2]]
    note_products(x, x.mT, 2 * NEWTON_SCHULZ_STEPS)
    note_products(gram, gram, NEWTON_SCHULZ_STEPS)
    made = (compiled_newton_schulz() if x.device.type == "cuda" else newton_schulz)(x, dtype)
    return made.mT if tall else made


@dataclass(frozen=True)
class Inherited:
    """Which parameters took saved moments over, which did so for their old rows, and which begin at zero."""

    kept: list[str]
    grown: list[str]
    fresh: list[str]


class Optimiser:
    """Steps every named parameter by its group's method; its state is tensors under the parameters' names."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rates: LearningRates,
        *,
        muon: bool,
        products: torch.dtype = torch.float32,
        peers: Mapping[str, Any] | None = None,
    ) -> None:
        """`products` is the type of the factors in Muon's matrix products; all state stays in float32.

        `peers` are the groups of processes that hold a parameter, by name, of those that not all hold."""
        self.parameters = dict(parameters)
        self.rates = rates
        self.products = products
        self.peers = peers or {}
        self.groups: dict[str, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            self.groups[group_of(name, parameter)].append(name)
        self.muon = [] if not muon else self.groups["matrices"]
        matrices = set(self.muon)
        self.adam: dict[tuple[str, float, Any], list[str]] = defaultdict(list)
        for group, names in self.groups.items():
            for name in names:
                if name not in matrices:
                    mesh = getattr(self.parameters[name], "device_mesh", None)
                    self.adam[group, rates.factor_of(name), mesh].append(name)
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            self.first[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            if name not in matrices:
                self.second[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        self.steps = 0
        self.counts = dict.fromkeys(self.parameters, 0)
        """The updates in each parameter's second moment, by which AdamW corrects what began at zero."""

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Move every parameter that has a gradient; `factor` is the schedule's share of the full rates."""
        self.steps += 1
        self._muon_step(factor)
        for (group, faster, _), names in self.adam.items():
            self._adam_step(names, group, factor * faster)

    def _moving(self, names: list[str]) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Of these parameters, those that have a gradient: their names, themselves, their gradients."""
        kept = [name for name in names if self.parameters[name].grad is not None]
        gradients = [gradient for name in kept if (gradient := self.parameters[name].grad) is not None]
        return kept, [self.parameters[name] for name in kept], gradients

    def _muon_step(self, factor: float) -> None:
        shapes: dict[tuple[tuple[int, ...], float, Any, Any], list[str]] = defaultdict(list)
        for name in self.muon:
            one = self.parameters[name]
            mesh, peers = getattr(one, "device_mesh", None), self.peers.get(name)
            shapes[tuple(one.shape), self.rates.factor_of(name), mesh, peers].append(name)
        for (shape, faster, _, peers), same in shapes.items():
            rate = self.rates.matrices * factor * faster
            names, parameters, gradients = self._moving(same)
            if not names:
                continue
            momenta = [self.first[name] for name in names]
            torch._foreach_lerp_(momenta, gradients, 1 - self.rates.momentum)
            # Nesterov: look one momentum step ahead.
            ahead = torch._foreach_lerp(gradients, momenta, self.rates.momentum)
            # Whole matrices: a part of one has other singular values.
            stack = torch.stack([gathered(update).flatten(1) for update in ahead])
            moves = shared_out(stack, partial(orthogonalised, dtype=self.products), peers)
            # An update whose every singular value is 1 should move tall matrices further (Jordan, 2024).
            scale = max(1.0, stack.shape[1] / stack.shape[2]) ** 0.5
            if self.rates.weight_decay:
                torch._foreach_mul_(parameters, 1 - rate * self.rates.weight_decay)
            whole = [move.view(shape).to(parameters[0].dtype) for move in moves]
            mine = [divided_as(move, one) for move, one in zip(whole, parameters, strict=True)]
            torch._foreach_add_(parameters, mine, alpha=-rate * scale)

    def _adam_step(self, names: list[str], group: str, factor: float) -> None:
        names, parameters, gradients = self._moving(names)
        if not names:
            return
        first, second = [self.first[name] for name in names], [self.second[name] for name in names]
        beta1, beta2 = self.rates.betas
        # Decay shrinks what multiplies activations; norms and biases have nothing to shrink towards.
        decayed = group not in ("scalars", "embeddings")
        for name in names:
            self.counts[name] += 1
        device = parameters[0].device
        counts = {count: torch.tensor(float(count), device=device) for count in set(self.counts.values())}
        # One pass over memory instead of ten: measured six times as fast as the same sum of parts.
        torch._fused_adamw_(
            parameters, gradients, first, second, [], [counts[self.counts[name]] for name in names],
            amsgrad=False, maximize=False, lr=self.rates.of(group) * factor, beta1=beta1, beta2=beta2,
            weight_decay=self.rates.weight_decay if decayed else 0.0, eps=self.rates.epsilon,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """The moments under the parameters' names, and the numbers of steps behind them."""
        tensors = {f"first.{name}": moment for name, moment in self.first.items()}
        tensors |= {f"second.{name}": moment for name, moment in self.second.items()}
        tensors |= {f"count.{name}": torch.tensor(count) for name, count in self.counts.items()}
        return {**tensors, "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> Inherited:
        """Take over saved moments where they fit; new rows of a table that grew have none yet."""
        found = Inherited([], [], [])
        self.steps = int(tensors["steps"])
        for name in self.parameters:
            pairs = [
                (moments[name], tensors.get(f"{kind}.{name}"))
                for kind, moments in (("first", self.first), ("second", self.second))
                if name in moments
            ]
            if not all(saved is not None and _holds(name, moment, saved) for moment, saved in pairs):
                found.fresh.append(name)
                continue
            for moment, saved in pairs:
                assert saved is not None
                whole = saved.shape == moment.shape
                (moment if whole else moment[: len(saved)]).copy_(saved)
            (found.kept if whole else found.grown).append(name)
            self.counts[name] = int(tensors.get(f"count.{name}", tensors["steps"]))
        return found


def _holds(name: str, moment: Tensor, saved: Tensor) -> bool:
    """Whether a moment has room for a saved one: the tables of tokens may have grown since."""
    if saved.shape == moment.shape:
        return True
    grows = name in ("embedding.weight", "head.weight") and saved.shape[1:] == moment.shape[1:]
    return grows and len(saved) < len(moment)
