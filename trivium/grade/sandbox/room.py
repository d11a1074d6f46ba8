"""The parent's side of the sandbox: start the warden, ask for walled-in children, and read what they say."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError

_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0
_LONGEST_MESSAGE = 1 << 20
_BOOT = (
    "import sys, types; room = types.ModuleType('room'); room.__path__ = [sys.argv[1]]; "
    "sys.modules['room'] = room; from room import warden; warden.main(int(sys.argv[2]), sys.argv[3])"
)


@dataclass(frozen=True)
class Limits:
    """What one child may use; bytes for memory, scratch and output."""

    seconds: float = 10.0
    cpu: int = 10
    memory: int = 512 << 20
    scratch: int = 16 << 20
    output: int = 1 << 20
    threads: int = 16


class Fault(Exception):
    """The sandbox itself failed; nothing follows about the program."""


class Channel:
    """Messages to and from a child, each with its length before it, until a deadline."""

    def __init__(self, end: socket.socket, deadline: float) -> None:
        self.end = end
        self.deadline = deadline

    def send(self, message: Any) -> None:
        """Send one message; a child that is gone is found out when it is asked."""
        with contextlib.suppress(OSError):
            self.end.settimeout(max(0.01, self.deadline - time.monotonic()))
            content = json.dumps(message).encode()
            self.end.sendall(len(content).to_bytes(4, "big") + content)

    def receive(self) -> Any:
        """The child's next message; EOFError when it ends, babbles or is late."""
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
                raise EOFError("the child is late or gone") from error
            if not piece:
                raise EOFError("the child is gone")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)


class Child(Channel):
    """One walled-in process: a channel to it and, in the end, its keeper's report."""

    def __init__(self, control: socket.socket, end: socket.socket, deadline: float) -> None:
        super().__init__(end, deadline)
        self.control = control

    def ending(self) -> dict[str, Any]:
        """How the child ended, as its keeper tells it; waits until it has ended or been killed."""
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
            raise Fault("the keeper of a child died before it") from error
        if report["ended"] == "walls":
            raise Fault(f"the walls could not be put up: {report['why']}")
        return report

    def dismiss(self) -> None:
        """Kill the child, if it still runs, and forget it."""
        self.control.close()
        self.end.close()


class Sandbox:
    """A warden and its children. Refuses to exist without walls unless told `unsafe`."""

    def __init__(self, unsafe: bool = False, walls: str | None = None) -> None:
        self.lock = threading.Lock()
        self.owner = os.getpid()
        troubles = []
        for choice in [walls] if walls else ["namespaces", "landlock", *(["none"] if unsafe else [])]:
            trouble = self._start(choice)
            if trouble is None:
                self.walls = choice
                return
            troubles.append(f"{choice}: {trouble}")
        raise TriviumError(
            "This machine's kernel does not allow the walls that keep a model's program in "
            f"({'; '.join(troubles)}); run it where user namespaces or Landlock are allowed, or accept the "
            "danger with --unsafe-sandbox."
        )

    def _start(self, walls: str) -> str | None:
        """Start a warden with these walls; what was wrong where it cannot have them."""
        ours, theirs = socket.socketpair()
        folder = str(Path(__file__).parent)
        # A venv's interpreter may be a link that the walls hide; the one behind it is what runs.
        python = getattr(sys, "_base_executable", None) or sys.executable
        self.process = subprocess.Popen(
            [python, "-I", "-S", "-c", _BOOT, folder, str(theirs.fileno()), walls],
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
            hello = json.loads(ours.recv(4096) or b'{"ready": false, "why": "the warden died"}')
        except (OSError, ValueError) as error:
            hello = {"ready": False, "why": str(error)}
        if hello["ready"] and walls != "none":
            try:
                with self.child(Limits(seconds=20.0)) as child:
                    child.send({"role": "climb"})
                    climbed = child.receive()
                hello = {"ready": not climbed, "why": f"the walls allow {', '.join(climbed)}"}
            except (EOFError, Fault) as error:
                hello = {"ready": False, "why": str(error)}
        if hello["ready"]:
            return None
        self.close()
        return str(hello["why"])

    @contextmanager
    def child(self, limits: Limits, *more: int) -> Iterator[Child]:
        """A walled-in child that holds a channel to us and these further open files; killed at the end."""
        ours, theirs = socket.socketpair()
        control, keepers = socket.socketpair()
        child = Child(control, ours, time.monotonic() + limits.seconds)
        try:
            with theirs, keepers, self.lock:
                try:
                    socket.send_fds(
                        self.parent,
                        [json.dumps(asdict(limits)).encode()],
                        [keepers.fileno(), theirs.fileno(), *more],
                    )
                except OSError as error:
                    raise Fault("the warden is gone") from error
            yield child
        finally:
            child.dismiss()

    def close(self) -> None:
        """End the warden, and with it every child."""
        self.parent.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_open: dict[bool, Sandbox] = {}
_opening = threading.Lock()


def sandbox(unsafe: bool = False) -> Sandbox:
    """This process's sandbox, started when first asked for and again if its warden has died."""
    with _opening:
        found = _open.get(unsafe)
        if found is not None and found.owner == os.getpid() and found.process.poll() is None:
            return found
        _open[unsafe] = Sandbox(unsafe)
        return _open[unsafe]


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
