"""A watch over the processes of one training: which is slower than the others, and which no longer answers.

A thread of every process writes where its training is into the rendezvous' key-value store. The first
process reads all of it, the others read the first one's. So a collective that can never end ends the run:

- A process that writes nothing for `TRIVIUM_SILENT_SECONDS` is frozen, or its machine is gone.
- Where all processes write and none moves for `TRIVIUM_STALLED_SECONDS`, the one that came least far is it.

The training itself only notes where it is; no collective is added to it.
"""

import faulthandler
import json
import os
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from trivium.kit.errors import TriviumError
from trivium.kit.processes import World, attempt, flight_recorder, seconds_of, world

SILENT, SILENT_SECONDS = "TRIVIUM_SILENT_SECONDS", 120.0
STALLED, STALLED_SECONDS = "TRIVIUM_STALLED_SECONDS", 1800.0
COMPARED, COMPARED_SECONDS = "TRIVIUM_COMPARED_SECONDS", 60.0
"""How often the times of the processes are compared."""
SLOW = 1.5
"""A process that takes so many times the median is named."""
SAMPLES = 3
"""Steps that every process must have timed before they are compared."""
SAID_AGAIN = 600.0
"""Seconds before the same process is named again."""
STATUS = 70
"""The exit status of a process that the watch ends."""
LOST = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting",
    "remote process exited", "connection refused", "socket closed", "ncclremoteerror", "peer closed",
)  # fmt: skip
"""What gloo and NCCL say when another process is gone."""
_trainings = 0


class RankWatch:
    """Where this process is in its training; among several, a thread watches over the others as well."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.step = 0
        self.place = "start"
        self.moves = 0
        self.samples, self.sampled_seconds = 0, 0.0
        self._began = time.perf_counter()

    def at(self, step: int, place: str) -> None:
        """Note that this process has come to `place` of a step; steps count from 1."""
        self.step, self.place = step, place
        self.moves += 1
        self._began = time.perf_counter()

    def worked(self) -> None:
        """Note that what began at the last place is this process's own work and is done now."""
        self.samples += 1
        self.sampled_seconds += time.perf_counter() - self._began

    def took(self, seconds: float) -> None:
        """Note the seconds of a piece of work that is the same on every process."""
        self.samples += 1
        self.sampled_seconds += seconds


@contextmanager
def watching(watch: RankWatch) -> Iterator[None]:
    """Watch over all processes of a training inside the block; nothing happens in a world of one."""
    here = world()
    if here.size == 1:
        yield
        return
    guard = _Guard(watch, here)
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        if guard.ending.is_set():
            # The other thread says why, and ends this process.
            time.sleep(60)
        # Without the place in gloo's source, and without its advice.
        first = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]
        raise TriviumError(
            f"rank {here.rank} of {here.size} lost another process at step {watch.step} ({watch.place}): "
            f"{first}. Its log says why; the same command goes on from the last saved state."
        ) from error
    finally:
        guard.stop()


def _is_lost(error: BaseException) -> bool:
    return any(sign in str(error).lower() for sign in LOST)


class _Guard:
    """The threads that write this process's place, read those of others, and judge."""

    def __init__(self, watch: RankWatch, here: World) -> None:
        global _trainings
        _trainings += 1
        self.watch, self.here = watch, here
        self.silent = seconds_of(SILENT, SILENT_SECONDS)
        self.stalled = seconds_of(STALLED, STALLED_SECONDS)
        self.compared = seconds_of(COMPARED, COMPARED_SECONDS)
        self.interval = min(5.0, self.silent / 4, self.stalled / 4, self.compared / 2)
        self.prefix = f"trivium/watch/{attempt()}/{_trainings}"
        # A connection of its own: the group's may be waiting for something.
        self.store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=max(self.silent, 1.0)),
        )  # fmt: skip
        self.others = range(here.size) if here.leads else (0,)
        self.beats: dict[int, dict[str, Any]] = {}
        self.heard: dict[int, float] = {}
        self.moved = self.exchanged = time.monotonic()
        self.before: dict[int, tuple[int, float]] = {}
        self.compared_at = time.monotonic()
        self.named: dict[int, float] = {}
        self.done, self.ending = threading.Event(), threading.Event()
        self._beat = 0
        for target in (self._exchange_always, self._judge_always):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        self.done.set()

    # what is written and read

    def _exchange_always(self) -> None:
        while not self.done.is_set():
            # A store that does not answer is judged by the time since it last did.
            with suppress(RuntimeError):
                self._exchange()
                self.exchanged = time.monotonic()
            self.done.wait(self.interval)

    def _exchange(self) -> None:
        self._beat += 1
        watch = self.watch
        mine = {
            "beat": self._beat, "step": watch.step, "place": watch.place, "moves": watch.moves,
            "samples": watch.samples, "seconds": watch.sampled_seconds,
            "host": socket.gethostname(), "pid": os.getpid(), "local": self.here.local_rank,
        }  # fmt: skip
        self.store.set(f"{self.prefix}/{self.here.rank}", json.dumps(mine))
        verdict = f"{self.prefix}/verdict"
        if not self.here.leads and self.store.check([verdict]):
            self._end(self.store.get(verdict).decode(), is_first=False)
        unseen = [rank for rank in self.others if rank not in self.beats]
        present = [rank for rank in self.others if rank in self.beats]
        present += [rank for rank in unseen if self.store.check([f"{self.prefix}/{rank}"])]
        if not present:
            return
        now = time.monotonic()
        contents = self.store.multi_get([f"{self.prefix}/{rank}" for rank in present])
        for rank, content in zip(present, contents, strict=True):
            beat = json.loads(content)
            before = self.beats.get(rank)
            if before is None or before["beat"] != beat["beat"]:
                self.heard[rank] = now
            if before is None or before["moves"] != beat["moves"]:
                self.moved = now
            self.beats[rank] = beat

    # what follows from it

    def _judge_always(self) -> None:
        looked = time.monotonic()
        while not self.done.wait(self.interval):
            now = time.monotonic()
            if now - looked > self.silent / 2:
                # This process itself was asleep, as all may have been: nothing can be said of that time.
                self.heard = dict.fromkeys(self.heard, now)
                self.moved = self.exchanged = now
            looked = now
            sentence = self._judgement(now)
            if sentence is not None and not self.done.is_set():
                self._end(sentence, is_first=True)
            if self.here.leads:
                self._compare(time.monotonic())

    def _judgement(self, now: float) -> str | None:
        """What is wrong, in one sentence; None while all is well."""
        if now - self.exchanged > self.silent + self.interval:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return (
                f"rank 0 of {self.here.size} at {place}, or the network to it, has not answered for "
                f"{self.silent:g} s; rank {self.here.rank} is {self._where(self._mine())}"
            )
        silent = [rank for rank, heard in self.heard.items() if now - heard > self.silent]
        if silent:
            named = "; ".join(f"{self._who(rank)}, last {self._where(self.beats[rank])}" for rank in silent)
            return f"nothing was heard for {self.silent:g} s of {named}"
        if self.here.leads and now - self.moved > self.stalled:
            return f"no process has moved for {self.stalled:g} s: {self._behind()}"
        return None

    def _behind(self) -> str:
        """The processes that came least far, and where the others wait."""
        absent = [str(rank) for rank in self.others if rank not in self.beats]
        if absent:
            return f"rank {', '.join(absent[:4])} has not begun, and rank 0 is {self._where(self._mine())}"
        least = min(self.beats, key=lambda rank: (self.beats[rank]["step"], self.beats[rank]["moves"]))
        behind = [rank for rank in self.beats if self.beats[rank]["moves"] == self.beats[least]["moves"]]
        most = max(self.beats, key=lambda rank: self.beats[rank]["moves"])
        if len(behind) == self.here.size:
            return f"all {self.here.size} processes are {self._where(self.beats[0])}"
        named = ", ".join(self._who(rank) for rank in behind[:4])
        named += f" and {len(behind) - 4} more" if len(behind) > 4 else ""
        return (
            f"{named}: {self._where(self.beats[least])}, while rank {most} is {self._where(self.beats[most])}"
        )

    def _mine(self) -> dict[str, Any]:
        return {"step": self.watch.step, "place": self.watch.place}

    def _where(self, beat: Mapping[str, Any]) -> str:
        return f"at step {beat['step']} ({beat['place']})"

    def _who(self, rank: int) -> str:
        beat = self.beats[rank]
        device = f", GPU {beat['local']}" if torch.cuda.is_available() else ""
        return f"rank {rank} ({beat['host']}{device}, process {beat['pid']})"

    def _compare(self, now: float) -> None:
        """Name a process whose own work takes longer than that of the others."""
        if now - self.compared_at < self.compared or len(self.beats) < self.here.size:
            return
        since = {rank: self.before.get(rank, (0, 0.0)) for rank in self.beats}
        samples = {rank: self.beats[rank]["samples"] - since[rank][0] for rank in self.beats}
        if min(samples.values()) < SAMPLES:
            return
        each = {rank: (self.beats[rank]["seconds"] - since[rank][1]) / samples[rank] for rank in self.beats}
        self.before = {rank: (beat["samples"], beat["seconds"]) for rank, beat in self.beats.items()}
        self.compared_at = now
        for rank, factor, median in slower(each):
            if now - self.named.get(rank, -SAID_AGAIN) >= SAID_AGAIN:
                self.named[rank] = now
                self.watch.say(
                    f"{self._who(rank)} is {factor:.1f} times slower than the median: its own work takes "
                    f"{each[rank]:.3g} s, the median {median:.3g} s (step {self.beats[rank]['step']})."
                )

    # the end

    def _end(self, sentence: str, is_first: bool) -> NoReturn:
        """End this process, which may wait for ever in a collective, with one sentence."""
        self.ending.set()
        folder = dump(self.here.rank)
        print(
            f"trivium: {sentence}. The flight recorder's dump and every thread's stack are in {folder}; "
            "the same command goes on from the last saved state.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if is_first and self.here.leads:
            with suppress(RuntimeError):
                self.store.set(f"{self.prefix}/verdict", sentence)
                # The others read it, and write what they know, before torchrun ends them.
                time.sleep(2 * self.interval)
        os._exit(STATUS)


def slower(each: Mapping[int, float]) -> list[tuple[int, float, float]]:
    """Of the seconds that each rank takes: those far above the median, with factor and median."""
    median = statistics.median_low(each.values())
    if median <= 0:
        return []
    return [(rank, took / median, median) for rank, took in each.items() if took >= SLOW * median]


def dump(rank: int) -> Path:
    """Write what this process knows of its last collectives and where its threads are; returns the folder."""
    folder = flight_recorder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{rank:05d}.stacks.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        for name, content in recorded():
            (folder / f"rank-{rank:05d}.{name}.json").write_text(content)
    return folder


def recorded() -> Sequence[tuple[str, str]]:
    """The flight recorder's entries as JSON, those of gloo and those of NCCL, where this torch has them."""
    compiled = torch._C._distributed_c10d
    found = []
    for name, function in (("gloo", "_dump_fr_trace_json"), ("nccl", "_dump_nccl_trace_json")):
        if hasattr(compiled, function):
            with suppress(RuntimeError, TypeError):
                content = getattr(compiled, function)()
                found.append((name, content.decode() if isinstance(content, bytes) else str(content)))
    return found
