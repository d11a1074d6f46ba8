"""Stages that do not need each other, side by side: one process each, with its share of cores or its GPU.

The graph is walked here; a stage is handed to a worker (`worker`) once everything it needs is done. Each
worker takes the lock of its stage as a run alone does, so several runs of one recipe, as those of a SLURM
array, share the work: a stage that another run makes is left to it, and the next one is taken.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.progress import Board
from trivium.kit.stopping import StopRequested, requested, without_requests

if TYPE_CHECKING:
    from trivium.pipeline.run import Run

GRACE = 120.0
"""Seconds that workers have to save what they were doing after a polite stop."""
AGAIN = 1.0
"""Seconds after which a stage that another run makes is looked at again."""


@contextmanager
def crew(jobs: int | None) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that get ready for work while this one still reads the recipe: imports take seconds."""
    processes = [_begun(jobs) for _ in range(jobs)] if jobs is not None else []
    try:
        yield processes
    finally:
        for process in processes:
            _end_group(process)


def _begun(jobs: int) -> subprocess.Popen[str]:
    """A process that waits to be told what to do, with its part of the processor's cores."""
    return subprocess.Popen(
        [sys.executable, "-m", "trivium.pipeline.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A Ctrl-C of the terminal reaches this process alone, which then stops each worker once.
        # So does the request to stop.
        start_new_session=True,
        env={**without_requests(dict(os.environ)), "OMP_NUM_THREADS": str(threads(jobs))},
    )  # fmt: skip


@dataclass(eq=False)
class Worker:
    """A process that makes one stage after another."""

    slot: int
    process: subprocess.Popen[str]
    stage: str | None = None
    line: str = ""

    def give(self, order: Mapping[str, Any]) -> None:
        """Send one line; a worker that is gone is noticed by its end."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()


@dataclass
class SideBySide:
    """A run of a recipe's stages with up to `jobs` of them at a time."""

    prepared: Run
    chosen: Sequence[str]
    jobs: int
    begun: list[subprocess.Popen[str]]
    """Processes that wait for a stage to run."""
    order: Mapping[str, Any]
    """What a worker needs to read the same recipe: file, runs folder, changes, store."""
    reuse: Callable[[Run, str], str]
    """Links and compares a stage that is done already."""
    wait: bool = True
    workers: list[Worker] = field(default_factory=list)
    events: queue.Queue[tuple[Worker, dict[str, Any] | None]] = field(default_factory=queue.Queue)
    failed: dict[str, str] = field(default_factory=dict)
    later: dict[str, float] = field(default_factory=dict)
    """Stages that another run makes, and when to look at them again."""

    def run(self) -> dict[str, str]:
        """What became of each stage; raises once all that could be done is done, if anything failed."""
        places = shares(self.jobs)
        with Board() as board, _stopped_politely():
            try:
                while self._hand_out(places, board):
                    self._listen(board)
                    if requested() and self._left():
                        raise StopRequested
            except BaseException:
                board.say("stopping: every stage saves what it has")
                self._stop(board)
                raise
            self._end()
        if self.failed:
            raise TriviumError(self._failures())
        return {name: self.prepared.became[name] for name in self.chosen}

    def _hand_out(self, places: Sequence[Mapping[str, str]], board: Board) -> bool:
        """Give ready stages to idle workers; False once nothing is left that could still be done."""
        at_work = {worker.stage for worker in self.workers if worker.stage is not None}
        waiting = [name for name in self._left() if name not in at_work]
        for name in waiting:
            if (
                self._needs(name) - self.prepared.became.keys()
                or self.later.get(name, 0.0) > time.monotonic()
            ):
                continue
            if self.prepared.entry(name).state == "done":
                self._finished(name, self.reuse(self.prepared, name), board)
                return True
            idle = next((worker for worker in self.workers if worker.stage is None), None)
            if idle is None and len(self.workers) < len(places):
                free = next(slot for slot in range(len(places)) if slot not in {w.slot for w in self.workers})
                idle = self._start(free, places[free])
            if idle is None:
                break
            idle.stage, idle.line = name, name
            idle.give({"stage": name, "fingerprint": self.prepared.nodes[name].fingerprint})
        self._show(board)
        return bool(self._left())

    def _left(self) -> list[str]:
        """The stages that are not done and whose ancestors have not failed, in the order of the graph."""
        lost: set[str] = set(self.failed)
        found = []
        for name in self.chosen:
            if self._needs(name) & lost:
                lost.add(name)
            elif name not in self.prepared.became and name not in lost:
                found.append(name)
        return found

    def _needs(self, name: str) -> set[str]:
        return {parent.stage for parent in self.prepared.nodes[name].parents.values()}

    def _start(self, slot: int, share: Mapping[str, str]) -> Worker:
        process = self.begun.pop() if self.begun else _begun(self.jobs)
        worker = Worker(slot, process)
        self.workers.append(worker)
        for stream, is_event in ((process.stdout, True), (process.stderr, False)):
            threading.Thread(target=self._read, args=(worker, stream, is_event), daemon=True).start()
        worker.give({**self.order, "environment": share})
        return worker

    def _read(self, worker: Worker, stream: IO[str], is_event: bool) -> None:
        for line in stream:
            self.events.put((worker, json.loads(line) if is_event else {"say": line.rstrip("\n")}))
        if is_event:
            self.events.put((worker, None))

    def _listen(self, board: Board) -> None:
        """Take in what workers say, at least one event or a moment of silence."""
        with suppress(queue.Empty):
            worker, event = self.events.get(timeout=0.2)
            while True:
                self._take_in(worker, event, board)
                worker, event = self.events.get_nowait()

    def _take_in(self, worker: Worker, event: dict[str, Any] | None, board: Board) -> None:
        name = worker.stage
        if event is None:
            self.workers.remove(worker)
            status = worker.process.wait()
            _end_group(worker.process)
            if name is not None:
                how = f"signal {-status}" if status < 0 else f"status {status}"
                self._fail(name, f"the process that made it ended with {how}", board)
            return
        if "say" in event:
            board.say(event["say"])
        if "update" in event:
            worker.line = event["update"]
            self._show(board)
        if name is None:
            return
        if "became" in event:
            worker.stage = None
            self._finished(name, event["became"], board)
        elif "busy" in event:
            worker.stage = None
            if not self.wait:
                self._fail(name, event["busy"], board)
            elif name not in self.later:
                board.say(f"{event['busy']}; going on with what else is ready")
            self.later[name] = time.monotonic() + AGAIN
        elif "failed" in event:
            worker.stage = None
            if event.get("trace"):
                board.say(event["trace"])
            self._fail(name, event["failed"], board)

    def _finished(self, name: str, became: str, board: Board) -> None:
        self.prepared.became[name] = became
        self.later.pop(name, None)
        self._show(board)

    def _fail(self, name: str, why: str, board: Board) -> None:
        self.failed[name] = why
        board.say(f"{name} failed: {why}")

    def _show(self, board: Board) -> None:
        at_work = [worker for worker in self.workers if worker.stage is not None]
        done = sum(name in self.prepared.became for name in self.chosen)
        total = f"{done} of {len(self.chosen)} stages done, {len(at_work)} running"
        board.show(
            [worker.line for worker in at_work],
            f"{total}, {len(self.failed)} failed" * bool(self.failed) or total,
        )

    def _stop(self, board: Board) -> None:
        """Ask every worker to save and stop; what runs after a while, or at a second Ctrl-C, is ended."""
        for worker in self.workers:
            with suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE
        with suppress(KeyboardInterrupt):
            while any(worker.process.poll() is None for worker in self.workers) and time.monotonic() < end:
                with suppress(queue.Empty):
                    worker, event = self.events.get(timeout=0.1)
                    if event is not None and "say" in event:
                        board.say(event["say"])
        for worker in self.workers:
            _end_group(worker.process)

    def _end(self) -> None:
        """Let the workers go: without a next line each ends by itself."""
        for worker in self.workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=GRACE)
            _end_group(worker.process)

    def _failures(self) -> str:
        first, *more = self.failed.items()
        lost = [name for name in self.chosen if name not in self.prepared.became and name not in self.failed]
        parts = [f"{name} failed: {why.rstrip('.')}" for name, why in (first, *more)]
        skipped = f"; not run, because they need it: {', '.join(lost)}" if lost else ""
        return f"{'; '.join(parts)}{skipped}. All else is done; fix that and run the same command again."


def shares(jobs: int) -> list[dict[str, str]]:
    """What tells each worker which GPU is its own; nothing where there is none."""
    import torch

    devices = torch.cuda.device_count()
    if not devices:
        return [{} for _ in range(jobs)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = named if named != [""] else [str(number) for number in range(devices)]
    if jobs > len(visible):
        raise TriviumError(
            f"--jobs {jobs} needs so many GPUs; there are {len(visible)}, write --jobs {len(visible)}."
        )
    return [{"CUDA_VISIBLE_DEVICES": device, "LOCAL_RANK": "0"} for device in visible[:jobs]]


def threads(jobs: int) -> int:
    """How many of the processor's cores each of so many workers uses."""
    found = max(1, machine.cores() // jobs)
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(found, int(said)) if said.isdigit() and int(said) else found


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a worker and whatever it started: it leads a process group of its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _stopped_politely() -> Any:
    """SIGTERM, as SLURM sends it, stops as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def plain(overrides: Iterable[str] | Mapping[str, Any]) -> Any:
    """Changes to a recipe in a form that another process can read."""
    return dict(overrides) if isinstance(overrides, Mapping) else list(overrides)
