"""Metrics sent on, as they are logged, to TensorBoard, Weights & Biases or Trackio."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog

Tracker = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a stage before its first number."""

    recipe: str
    entry: str
    """The stage with its fingerprint: the same when it goes on after it was cut off, and no other's."""
    runs: Path
    settings: Mapping[str, Any]


class Receiver(Protocol):
    """Where numbers go."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Send what has not been sent."""


class TensorBoard:
    """Event files in `runs/tensorboard/<recipe>/<stage>`: `tensorboard --logdir runs/tensorboard`."""

    def __init__(self, tracked: Tracked) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(tracked.runs / "tensorboard" / tracked.recipe / tracked.entry))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Hosted:
    """Weights & Biases, and Trackio, which speaks as it does: a recipe is a project, a stage a run."""

    def __init__(self, package: str, tracked: Tracked, **own: Any) -> None:
        self._run = import_module(package).init(
            project=tracked.recipe, name=tracked.entry, config=dict(tracked.settings), resume="allow", **own
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Tracked], Receiver]] = {
    "tensorboard": TensorBoard,
    "trackio": lambda tracked: Hosted("trackio", tracked),
    "wandb": lambda tracked: Hosted("wandb", tracked, id=tracked.entry, dir=str(tracked.runs)),
}


def check(names: Sequence[str]) -> None:
    """Name a tracker whose package is not installed, before any work is done."""
    for name in names:
        if find_spec(name) is None:
            raise TriviumError(f"track: {name} is not installed; pip install '{name}', or take it away.")


class TrackedLog(MetricsLog):
    """A metrics log whose numbers go to trackers, too; they begin with the first number there is."""

    def __init__(
        self, path: Path, names: Sequence[str], tracked: Tracked, say: Callable[[str], None]
    ) -> None:
        super().__init__(path)
        self._names = names
        self._tracked = tracked
        self._say = say
        self._trackers: dict[str, Receiver] | None = None

    def write(self, row: dict[str, Any]) -> None:
        super().write(row)
        numbers = {name: float(value) for name, value in row.items() if name != "step" and _is_number(value)}
        if "step" not in row or not numbers:
            return
        if self._trackers is None:
            self._trackers = {}
            for name in self._names:
                self._try(name, partial(self._begin, name))
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, numbers, int(row["step"])))

    def _begin(self, name: str) -> None:
        assert self._trackers is not None
        self._trackers[name] = TRACKERS[name](self._tracked)

    def close(self) -> None:
        for name, tracker in list((self._trackers or {}).items()):
            self._try(name, tracker.close)
        self._trackers = None

    def _try(self, name: str, act: Callable[[], None]) -> None:
        """Training outlives a tracker: one that fails is named, and asked no more."""
        try:
            act()
        except Exception as error:
            assert self._trackers is not None
            self._trackers.pop(name, None)
            self._say(f"{name} takes no more numbers ({error}); {self.path} goes on.")


@contextmanager
def tracking(
    log: MetricsLog, names: Sequence[str], tracked: Tracked, say: Callable[[str], None]
) -> Iterator[MetricsLog]:
    """The log itself, or one that sends its numbers on until the stage ends."""
    if not names:
        yield log
        return
    sending = TrackedLog(log.path, names, tracked, say)
    try:
        yield sending
    finally:
        sending.close()


def _is_number(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return isinstance(value, (int, float)) and not isinstance(value, bool)
