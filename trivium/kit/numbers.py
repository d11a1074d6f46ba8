"""Numbers as people write them in recipes: 4096, 16k, 20M, 1.5B."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9, "T": 10**12}
_WRITTEN = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKmMbBT]?)")


def number(value: Any) -> Any:
    """A number from its written form; what is not one comes back unchanged, for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = _WRITTEN.fullmatch(value.strip().removesuffix("tokens").strip())
    if match is None:
        return value
    result = float(match[1].replace("_", "")) * _FACTORS[match[2]]
    return int(result) if result.is_integer() else result


def short(value: float) -> str:
    """A number in four characters or so: 950, 16.4k, 20M, 1.5B."""
    for factor, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.4g}"


def with_unit(value: float, unit: str) -> str:
    """A measured number with its unit's prefix: 120 GFLOP/s."""
    written = short(value)
    letter = written[-1] if written[-1].isalpha() else ""
    return f"{written.removesuffix(letter)} {letter.replace('B', 'G')}{unit}"


_SCHEMA = {
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+0-9._eE]+ *[kKmMbBT]?( *tokens)?$"}]
}

Count = Annotated[int, BeforeValidator(number), Field(ge=0), WithJsonSchema(_SCHEMA)]
Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False), WithJsonSchema(_SCHEMA)]
