"""The client's side of the sandbox: start the supervisor, ask for isolated workers, read what they say."""

import atexit
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.grade.sandbox import cgroup
from trivium.grade.sandbox.bait import Bait
from trivium.grade.sandbox.layers import LAYERS, describe
from trivium.kit.errors import TriviumError

_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0
_LONGEST_MESSAGE = 1 << 20
_BOOT = (
    "import sys, types; sandbox = types.ModuleType('sandbox'); sandbox.__path__ = [sys.argv[1]]; "
    "sys.modules['sandbox'] = sandbox; from sandbox import supervisor; "
    "supervisor.main(int(sys.argv[2]), sys.argv[3])"
)
_PERMIT = "TRIVIUM_UNSAFE_SANDBOX"


@dataclass(frozen=True)
class Limits:
    """What one worker may use; bytes for memory, scratch and output."""

    seconds: float = 10.0
    cpu: int = 10
    memory: int = 512 << 20
    scratch: int = 16 << 20
    output: int = 1 << 20
    threads: int = 16
    cores: float = 1.0


class Fault(Exception):
    """The sandbox itself failed; nothing follows about the program."""


class Channel:
    """Messages to and from a worker, each with its length before it, until a deadline."""

    def __init__(self, end: socket.socket, deadline: float) -> None:
        self.end = end
        self.deadline = deadline

    def send(self, message: Any) -> None:
        """Send one message; a worker that is gone is found out when it is asked."""
        with contextlib.suppress(OSError):
            self.end.settimeout(max(0.01, self.deadline - time.monotonic()))
            content = json.dumps(message).encode()
            self.end.sendall(len(content).to_bytes(4, "big") + content)

    def receive(self) -> Any:
        """The worker's next message; EOFError when it ends, babbles or is late."""
        length = int.from_bytes(self._read(4), "big")
        if length > _LONGEST_MESSAGE:
            raise EOFError("a message is too long")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise EOFError("what was sent is no message") from error

    def _read(self, length: int) -> bytes:
        pieces = []
        while length:
            try:
                self.end.settimeout(max(0.01, self.deadline - time.monotonic()))
                piece = self.end.recv(min(length, 1 << 16))
            except OSError as error:
                raise EOFError("the worker is late or gone") from error
            if not piece:
                raise EOFError("the worker is gone")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)


class Worker(Channel):
    """One isolated process: a channel to it and, in the end, its monitor's report."""

    def __init__(self, control: socket.socket, end: socket.socket, deadline: float) -> None:
        super().__init__(end, deadline)
        self.control = control

    def ending(self) -> dict[str, Any]:
        """How the worker ended, as its monitor reports it; waits until it has ended or been killed."""
        self.control.settimeout(max(0.0, self.deadline - time.monotonic()) + _GRACE_SECONDS)
        said = b""
        try:
            while not said.endswith(b"\n"):
                piece = self.control.recv(4096)
                if not piece:
                    break
                said += piece
            report: dict[str, Any] = json.loads(said)
        except (OSError, ValueError) as error:
            raise Fault("the monitor of a worker died before it") from error
        if report["ended"] == "isolation":
            raise Fault(f"a worker could not be isolated: {report['why']}")
        return report

    def dismiss(self) -> None:
        """Kill the worker, if it still runs, and forget it."""
        self.control.close()
        self.end.close()


class Sandbox:
    """A supervisor and its workers, in the strongest isolation that this kernel allows.

    Namespaces come first. Without them Landlock 6 and a stricter filter of system calls take their place.
    Where the kernel allows neither, or a probe gets through, there is no sandbox, unless `unsafe` accepts
    whatever can be had. For tests, `without` leaves layers out, `landlock` caps its version, and `exactly`
    asks for the other layers as they are, whatever a probe can reach.
    """

    def __init__(
        self,
        unsafe: bool = False,
        without: Collection[str] = (),
        landlock: int | None = None,
        exactly: bool = False,
    ) -> None:
        assert set(without) <= set(LAYERS), without
        self.lock = threading.Lock()
        self.owner = os.getpid()
        self.layers: dict[str, Any] = {}
        self.landlock = landlock
        fallback = {*without, "namespaces"}
        choices = [] if "namespaces" in without else [("namespaces", set(without), False)]
        choices.append(("Landlock without namespaces", fallback, False))
        if unsafe:
            choices.append(("unsafe", fallback, True))
        if exactly:
            choices = [("exactly", set(without), True)]
        troubles: list[tuple[str, str]] = []
        for name, left_out, lenient in choices:
            trouble = self._start(left_out, lenient)
            if trouble is None:
                if troubles and not lenient:
                    self.layers["missing"] = {"namespaces": troubles[0][1], **self.layers.get("missing", {})}
                return
            troubles.append((name, trouble))
        said = "; ".join(f"{name}: {trouble}" for name, trouble in troubles)
        raise TriviumError(
            f"This machine cannot isolate a program that a model wrote ({said}): allow user namespaces, use "
            "Linux 6.12 or newer, or accept that the program may do whatever you can with --unsafe-sandbox."
        )

    def _start(self, without: Collection[str], unsafe: bool) -> str | None:
        """Start a supervisor without these layers; what is wrong where the isolation is not enough."""
        ours, theirs = socket.socketpair()
        folder = str(Path(__file__).parent)
        options = {
            "without": sorted(without), "landlock": self.landlock, "unsafe": unsafe, "client": os.getpid(),
        }  # fmt: skip
        # A venv's interpreter may be a link that the isolation hides; the one behind it is what runs.
        python = getattr(sys, "_base_executable", None) or sys.executable
        self.process = subprocess.Popen(
            [python, "-I", "-S", "-c", _BOOT, folder, str(theirs.fileno()), json.dumps(options)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        self.parent = ours
        ours.settimeout(_START_SECONDS)
        try:
            hello = json.loads(ours.recv(1 << 16) or b'{"ready": false, "why": "the supervisor died"}')
        except (OSError, ValueError) as error:
            hello = {"ready": False, "why": str(error)}
        if hello["ready"]:
            self.layers = hello["layers"]
            try:
                found = [name for _, name in self.probe()]
            except (EOFError, Fault) as error:
                hello = {"ready": False, "why": str(error)}
            else:
                if found and not unsafe:
                    hello = {"ready": False, "why": f"a program could still do this: {', '.join(found)}"}
                if unsafe:
                    self.layers |= {"unsafe": True, "open": found}
        if hello["ready"]:
            return None
        self.close()
        return str(hello["why"])

    def probe(self) -> list[tuple[str, str]]:
        """What a worker in this sandbox can reach that it must not: the group and name of every attempt."""
        found: list[tuple[str, str]] = []
        bait = Bait()
        try:
            with self.worker(Limits(seconds=30.0)) as worker:
                worker.send({"role": "probe", "bait": bait.message()})
                trying = ("", "the start")
                try:
                    while "done" not in (said := worker.receive()):
                        trying = tuple(said.get("tries", trying))
                        found += [tuple(said["open"])] if "open" in said else []
                except EOFError:
                    # A fault of the sandbox itself says so here; else the attempt took the worker with it.
                    worker.ending()
                    found.append(trying)
            found += [("damage", what) for what in bait.damage()]
        finally:
            bait.remove()
        return found

    @property
    def described(self) -> str:
        """The layers in force, in one line."""
        return describe(self.layers)

    @contextmanager
    def worker(self, limits: Limits, *more: int) -> Iterator[Worker]:
        """An isolated worker that holds a channel to us and these further open files; killed at the end."""
        ours, theirs = socket.socketpair()
        control, monitors = socket.socketpair()
        worker = Worker(control, ours, time.monotonic() + limits.seconds)
        try:
            with theirs, monitors, self.lock:
                try:
                    socket.send_fds(
                        self.parent,
                        [json.dumps(asdict(limits)).encode()],
                        [monitors.fileno(), theirs.fileno(), *more],
                    )
                except OSError as error:
                    raise Fault("the supervisor is gone") from error
            yield worker
        finally:
            worker.dismiss()

    def close(self) -> None:
        """End the supervisor, and with it every worker."""
        self.parent.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            if "cgroup_folder" in self.layers:
                cgroup.remove(self.layers["cgroup_folder"])


_open: dict[bool, Sandbox] = {}
_opening = threading.Lock()
_listeners: list[Callable[[str], None]] = []


@contextmanager
def permitting_unsafe(yes: bool) -> Iterator[None]:
    """With `yes`, accept whatever isolation can be had, here and in processes started meanwhile."""
    before = os.environ.get(_PERMIT)
    if yes:
        os.environ[_PERMIT] = "1"
    try:
        yield
    finally:
        if yes and before is None:
            del os.environ[_PERMIT]


def sandbox(unsafe: bool = False) -> Sandbox:
    """This process's sandbox, started when first asked for and again if its supervisor has died."""
    unsafe = unsafe or os.environ.get(_PERMIT) == "1"
    with _opening:
        found = _open.get(unsafe)
        if found is None or found.owner != os.getpid() or found.process.poll() is not None:
            found = _open[unsafe] = Sandbox(unsafe)
        for tell in _listeners:
            tell(found.described)
        return found


@contextmanager
def announced(say: Callable[[str], None]) -> Iterator[list[str]]:
    """Say once which layers are in force as soon as a sandbox is used; the list holds what was said."""
    said: list[str] = []

    def tell(described: str) -> None:
        if described not in said:
            said.append(described)
            say(f"programs run in a sandbox: {described}")

    _listeners.append(tell)
    try:
        yield said
    finally:
        _listeners.remove(tell)


@atexit.register
def _close() -> None:
    for found in _open.values():
        if found.owner == os.getpid():
            found.close()


def feed(stdin: int, stdout: int, text: bytes, most: int, deadline: float) -> bytes:
    """Write a program's input while reading its output; too much output, or lateness, is where it stops."""
    os.set_blocking(stdin, False)
    read = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        if text:
            selector.register(stdin, selectors.EVENT_WRITE)
        else:
            os.close(stdin)
        while len(read) <= most:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                if key.fd == stdout:
                    piece = os.read(stdout, 1 << 16)
                    if not piece:
                        if text:
                            os.close(stdin)
                        return read
                    read += piece
                    continue
                try:
                    text = text[os.write(stdin, text[: 1 << 16]) :]
                except OSError:
                    text = b""
                if not text:
                    selector.unregister(stdin)
                    os.close(stdin)
    if text:
        os.close(stdin)
    return read
