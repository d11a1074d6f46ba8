"""The machines a plan can be made for: those of `machines.yaml`, a person's own, and this one as measured."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trivium.kit import machine as hardware
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import number

HERE = "here"
MOST_DEVICES = 4096
COPY = 0.75
GAPS = 0.05
"""What an allocator loses between tensors, where it was not measured."""
CATALOGUE = Path(__file__).with_name("machines.yaml")


@dataclass(frozen=True)
class Machine:
    """Some equal devices, and what one of them can do; rates are per second and per device."""

    key: str
    name: str
    peak: Mapping[str, float]
    """FLOP/s by the type of the factors."""
    memory: float
    bandwidth: float
    devices: int = 1
    node: int = 8
    inside: float = 450e9
    """Bytes/s between devices of a node."""
    between: float = 50e9
    """Bytes/s of a device to other nodes."""
    dollars: float = 0.0
    """Per device and hour."""
    ceiling: float = 0.5
    half_width: float = 700.0
    compiled: float = 1.16
    """How much faster compiled training is; `ceiling` is of compiled training."""
    float8: float = 1.5
    """How much faster the layers' products are in float8."""
    copy: float = COPY
    """The share of the links' and the memory's rate that is reached."""
    step_seconds: float = 0.001
    """What a decoding step costs beside reading weights and cache."""
    row_seconds: float = 0.0
    """What every row of a decoding step costs beside its products: sampling, and what is kept of a token."""
    request_seconds: float = 0.0
    """What an answer costs beside its tokens."""
    cache_rate: float = 0.0
    """Bytes/s of keys and values that decoding reads; 0: as fast as other memory."""
    gaps: float = GAPS
    """The share by which what a training takes of the memory is more than its tensors."""
    attention: tuple[tuple[float, float], ...] = ()
    """FLOP/s of attention's whole square by the length of documents, where it was measured apart."""
    runtime: float = 1.5e9
    """Bytes that the process and its libraries hold before there is a model."""
    answering: float = 0.0
    """Bytes that they hold more once a model has answered."""
    read: float = 2e6
    """Characters read and tokenised in a second."""
    conversation_seconds: float = 0.0
    """What a conversation costs that is laid into its template."""
    local: bool = False
    source: str = ""
    corrections: Mapping[str, float] = field(default_factory=dict)
    """By kind, how much longer finished stages took here than the formula says."""

    @property
    def precision(self) -> str:
        """The type of the factors that a training here uses."""
        return "bfloat16" if "bfloat16" in self.peak else "float32"

    def share(self, width: int, tensor: int = 1) -> float:
        """The share of the peak that the training of a model of this width reaches.

        Cut in `tensor` parts they reach less; the fourth root fits Llama 3.1 8B and 70B over 8 devices."""
        cut = width / tensor**0.25
        return self.ceiling * cut / (cut + self.half_width)

    def attention_rate(self, length: float) -> float | None:
        """FLOP/s of attention over documents of this length; None where it is a product like others."""
        if not self.attention:
            return None
        lengths, rates = zip(*self.attention)
        # Seconds for each FLOP between two lengths that were measured, by the length's logarithm.
        return 1 / float(np.interp(math.log(max(length, 1.0)), np.log(lengths), 1 / np.array(rates)))

    def described(self) -> str:
        """In one line, for a table."""
        count = "" if self.devices == 1 and self.local else f"{self.devices} x "
        return f"{count}{self.name}"


@cache
def _shipped() -> dict[str, Any]:
    return _read(CATALOGUE)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TriviumError(
            f"{path} cannot be read ({error.strerror}); name a file like machines.yaml."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TriviumError(f"{path} is not YAML: {str(error).splitlines()[0]}; correct it.") from None
    if not isinstance(found, dict) or not isinstance(found.get("machines"), dict):
        raise TriviumError(f"{path} has no `machines:`; write one entry a machine, as in {CATALOGUE.name}.")
    return found


def machines(file: Path | None = None) -> dict[str, Any]:
    """All entries: those that ship, with a person's own laid over them."""
    known: dict[str, Any] = dict(_shipped()["machines"])
    for key, entry in (_read(file)["machines"] if file is not None else {}).items():
        known[key] = {**known.get(key, {}), **entry}
    return known


def machine(wanted: str, file: Path | None = None) -> Machine:
    """`h100:8` and the like; `here` is this machine as far as it was measured."""
    key, _, count = wanted.partition(":")
    devices = number(count) if count else 1
    if not isinstance(devices, int) or not 1 <= devices <= MOST_DEVICES:
        raise TriviumError(
            f"--on {wanted}: {count!r} is no number of devices from 1 to {MOST_DEVICES:,}; write {key}:8."
        )
    if key == HERE:
        return replace(this_machine({}), devices=devices)
    known = machines(file)
    if key not in known:
        near = difflib.get_close_matches(key, [*known, HERE], 1, 0.0)[0]
        raise TriviumError(
            f"--on {wanted}: there is no machine {key!r}, did you mean {near!r}? There are "
            f"{', '.join([HERE, *known])}; add yours in a file for --machines."
        )
    entry = known[key]
    try:
        share, price = entry["share"], entry["price"]
        rates = {name: float(entry[name]) for name in OPTIONAL if name in entry}
        known_machine = Machine(
            key, str(entry["name"]), {name: float(value) for name, value in entry["peak"].items()},
            float(entry["memory"]), float(entry["bandwidth"]), devices, int(entry["node"]),
            float(entry["inside"]), float(entry["between"]), float(price["dollars"]),
            float(share["ceiling"]), float(share["half_width"]), source=str(share["source"]),
        )  # fmt: skip
        return _changed(known_machine, rates)
    except (KeyError, TypeError, ValueError) as error:
        raise TriviumError(
            f"machine {key!r}: {error!s} is missing or no number; see {CATALOGUE.name}."
        ) from None


OPTIONAL = ("compiled", "float8", "copy", "step_seconds", "runtime", "read")


MEASURED = (
    "ceiling", "half_width", "step_seconds", "row_seconds", "request_seconds", "conversation_seconds",
    "cache_rate", "gaps", "runtime", "answering", "read",
)  # fmt: skip
"""What `doctor` measures of this machine, by the names of `Machine`."""
RUNTIME, GAPS_HERE = 3.45e8, 0.3
"""What `doctor` found on a processor: bytes of a process with torch and no model, and what the C library's
allocator loses to documents whose lengths change with every pass."""


def this_machine(measured: Mapping[str, Any]) -> Machine:
    """This machine: what `doctor` measured, else a quick measurement and what such machines usually reach."""
    here = hardware.describe()
    gpu = here.device.startswith("cuda")
    kind = here.dtype
    peak = measured.get("peak") or _quick_peak()
    bandwidth = measured.get("bandwidth") or (3e12 if gpu else 1.2e10)
    published = {name: float(measured[name]) for name in MEASURED if name in measured}
    attention = tuple((float(length), float(rate)) for length, rate in measured.get("attention", ()))
    # Where nothing was measured: half of the peak, and what torch takes up by itself.
    defaults = {"ceiling": 0.5, "half_width": 0.0, "runtime": 1.5e9 if gpu else RUNTIME,
                "gaps": GAPS if gpu else GAPS_HERE,
                "step_seconds": 0.001 if gpu else 0.0005}  # fmt: skip
    found = Machine(
        HERE, f"this machine ({here.device_name}, {here.cores} cores)" if not gpu else here.device_name,
        {kind: float(peak)}, float(here.device_memory), float(bandwidth), local=True, compiled=1.0,
        source="measured by `trivium doctor`" if "ceiling" in measured
        else "measured now; `trivium doctor` measures more",
        corrections=dict(measured.get("corrections", {})), attention=attention,
    )  # fmt: skip
    return _changed(found, {**defaults, **published})


def shared(one: Machine, processes: int, node: int | None = None) -> Machine:
    """This machine for several processes, `node` on each of it: each has a GPU or its part of a processor."""
    node = processes if node is None else node
    part = node if one.precision == "float32" else 1
    return replace(
        one, devices=processes, node=node, memory=one.memory / part, bandwidth=one.bandwidth / part,
        inside=one.inside if part == 1 else one.bandwidth / part,
        peak={kind: rate / part for kind, rate in one.peak.items()},
        attention=tuple((length, rate / part) for length, rate in one.attention),
    )  # fmt: skip


def _changed(known_machine: Machine, rates: Mapping[str, float]) -> Machine:
    return replace(known_machine, **rates)  # type: ignore[arg-type]


@cache
def _quick_peak() -> float:
    return hardware.matmul_peak(0.1)
