"""A model whose layers are compiled by `torch.compile`, each kind of layer once."""

import copy
from typing import Any

import torch

from trivium.model.recompute import run
from trivium.model.transformer import Transformer


def compiled(model: Transformer, **options: Any) -> Transformer:
    """The same model with compiled layers: one program for each kind of layer, whatever their number.

    Weights and modules are the model's own. What lies around the layers (counts of arithmetic, embedding,
    last norm) runs as it is: no graph breaks there, and 48 layers take as long to compile as one. A second
    number of tokens makes a second program, in which that number is a symbol, and there is no third.
    """
    import torch._dynamo.config as settings

    # Otherwise a layer's index is a constant of its program: each layer is compiled again, and from the
    # ninth on none is.
    settings.allow_unspec_int_on_nn_module = True
    fast = copy.copy(model)
    fast.run_layer = torch.compile(run, **options)
    return fast
