"""Functions that `torch.compile` leaves alone, marked without importing it.

`torch.compiler.disable` imports `torch._dynamo`, which takes two seconds even where nothing is compiled.
Before something has imported it, nothing can be compiling, and there is nothing to mark.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, run as it is and never compiled, as is everything it calls."""
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*arguments, **options)
        # A compiler that traces this far stops here, and what follows runs as plain Python.
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*arguments, **options)

    return cast(Function, call)
