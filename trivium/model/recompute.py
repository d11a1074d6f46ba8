"""Activations computed again in the backward pass, so that they need not be kept (Chen et al., 1604.06174).

`full` keeps only what enters a layer and runs the layer again: about a third more arithmetic for a fraction
of the memory. `selective` keeps in addition what is dear to compute, the outputs of attention and of every
other matrix product, and makes the rest again, which costs little.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trivium.model.float8 import as_now

Recompute = Literal["none", "selective", "full"]
PRODUCTS = frozenset({"mm", "addmm", "bmm", "linear", "_scaled_mm"})


def is_attention(operation: str) -> bool:
    """Whether an operation of this name is one of torch's fused attentions, on whatever device."""
    return "scaled_dot_product" in operation or operation in ("_varlen_attn", "_flash_attention_forward")


class Chooser:
    """Which results of one run of a layer are kept; the run that makes the others again counts alike."""

    def __init__(self) -> None:
        self.products = {False: 0, True: 0}

    def __call__(self, context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        name = operation.name().partition("::")[2].partition(".")[0]
        # What came from other processes would have to be sent again.
        if is_attention(name) or name == "all_to_all_single":
            return CheckpointPolicy.MUST_SAVE
        if name not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.products[context.is_recompute] += 1
        odd = self.products[context.is_recompute] % 2
        return CheckpointPolicy.MUST_SAVE if odd else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Any:
    """The two contexts of one run of a layer: to keep what is chosen, and to take it up again."""
    return create_selective_checkpoint_contexts(Chooser())


def run(layer: Callable[..., Tensor], how: Recompute, *arguments: Any) -> Tensor:
    """What a layer makes of its arguments; with gradients, keeping only what `how` says."""
    if how == "none" or not torch.is_grad_enabled():
        return layer(*arguments)
    options: dict[str, Any] = {}
    if how == "selective":
        options["context_fn"] = selective
    # Nothing in a layer draws random numbers.
    result: Tensor = checkpoint(
        as_now(layer), *arguments, use_reentrant=False, preserve_rng_state=False, **options
    )
    return result
