"""How many tokens a pass may have: on a GPU as many as fit, found by trying before the first step.

Memory grows linearly with the tokens of a pass: weights, gradients and moments are there whatever its size,
activations are so many bytes a token. So passes of one row, two, four... are run forward and backward, and
what the last two took says how many tokens a share of the memory holds. No pass has to run out of memory
first, which among several processes would leave the others waiting for ever.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch

from trivium.data.rows import PackedSequence
from trivium.kit.processes import largest_of_all
from trivium.model.arithmetic import uncounted

CPU_TOKENS = 2048
"""Tokens per pass on a processor: measured, what its cache likes best."""
UNSIZED = 2**31
"""The tokens of a pass before anything was tried: all."""
SHARE = 0.9
"""Of the memory that a pass may fill; the rest is lost between tensors, or the optimiser's."""


class MemoryMeter(Protocol):
    """Tells how much memory a pass takes, in bytes."""

    def limit(self) -> float:
        """All that this process could hold."""

    def start(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> float:
        """The most that was held since."""


class CudaMeter:
    """The memory of a GPU, as torch's allocator sees it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def limit(self) -> float:
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated(self.device)


def first_budget(micro_batch: int | Literal["auto"], device: torch.device) -> int:
    """The tokens of a pass to begin with."""
    if micro_batch != "auto":
        return micro_batch
    return CPU_TOKENS if device.type == "cpu" else UNSIZED


def meter_of(device: torch.device) -> MemoryMeter | None:
    """What measures the memory of a device; a processor's is not worth filling."""
    return CudaMeter(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; a processor's allocator has no error class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def trial(device: torch.device) -> Iterator[None]:
    """Inside the block nothing is counted as arithmetic, and the random numbers stay the step's."""
    with uncounted(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def tokens_that_fit(
    rows: Sequence[PackedSequence], attempt: Callable[[Sequence[PackedSequence]], bool], meter: MemoryMeter
) -> int:
    """How many tokens a pass may have, the same in all processes.

    `attempt` runs some rows as one pass, forward and backward, and says whether they fitted.
    """
    # All processes try equally many passes, and believe the one with the least room.
    limit = SHARE * _smallest_of_all(meter.limit())
    longest_first = sorted(rows, key=len, reverse=True)
    count = int(_smallest_of_all(len(rows)))
    tried: list[tuple[float, float]] = []
    fits, many = UNSIZED - 1, 1
    while many <= count:
        taken = longest_first[:many]
        tokens = _smallest_of_all(sum(map(len, taken)))
        if tokens > fits:
            break
        meter.start()
        fitted = attempt(taken)
        tried.append((tokens, largest_of_all(float(meter.peak()) if fitted else math.inf)))
        fits = _predicted(tried, limit)
        many *= 2
    return fits


def _predicted(tried: Sequence[tuple[float, float]], limit: float) -> int:
    """The tokens at which memory reaches the limit, by the line through the last two sizes."""
    tokens, peak = tried[-1]
    if len(tried) == 1:
        return UNSIZED - 1 if peak < limit else int(tokens)
    smaller, less = tried[-2]
    if peak <= less or tokens <= smaller:
        return UNSIZED - 1
    slope = (peak - less) / (tokens - smaller)
    # Where the larger one ran out of memory, the slope is infinite and the smaller one is all that fits.
    return int(min(UNSIZED - 1, max(tried[0][0], smaller + max(0.0, limit - less) / slope)))


def _smallest_of_all(value: float) -> float:
    return -largest_of_all(-float(value))
