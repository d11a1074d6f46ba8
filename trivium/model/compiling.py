"""A model whose layers are compiled by `torch.compile`, each kind of layer once."""

import copy
from types import MethodType
from typing import Any

import torch

from trivium.model.recompute import run
from trivium.model.transformer import Layer, Transformer

PROGRAMS = 256
"""How many variants of a function torch may compile in a process; beyond its 8 it goes on uncompiled, and the
stages of a recipe, each with its own model, would soon get there."""


def allow_programs() -> None:
    """Let torch compile the same function anew for the model of every stage, and once for all its layers."""
    import torch._dynamo.config as settings

    # Otherwise a layer's index is a constant of its program: each layer is compiled again, and from the
    # ninth on none is.
    settings.allow_unspec_int_on_nn_module = True
    settings.recompile_limit = max(settings.recompile_limit, PROGRAMS)


def compiled(model: Transformer, **options: Any) -> Transformer:
    """The same model with compiled layers: one program for each kind of layer, whatever their number.

    Weights and modules are the model's own. What lies around the layers (counts of arithmetic, embedding,
    last norm) runs as it is: no graph breaks there, and 48 layers take as long to compile as one. A second
    number of tokens makes a second program, in which that number is a symbol, and there is no third.
    """
    allow_programs()
    fast = copy.copy(model)
    fast.run_layer = torch.compile(run, **options)
    return fast


def compile_between_hooks(model: Transformer, **options: Any) -> None:
    """Compile the layers in place, where hooks before and after a layer gather its weights and let them go.

    No compiler can look into what waits for other processes: it is what the hooks enclose that is compiled.
    """
    allow_programs()
    forward = torch.compile(Layer.forward, **options)
    for layer in model.layers:
        layer.forward = MethodType(forward, layer)
