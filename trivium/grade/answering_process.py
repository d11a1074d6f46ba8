"""A helper process that is asked one question a line, and killed when it thinks too long."""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

_START_SECONDS = 60.0


class Late(Exception):
    """The helper did not answer in time."""


class Unusable(Exception):
    """The helper cannot be started here; the text says why."""


class Helper:
    """One Python process that runs a script; started when first asked, and again after it was late."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.trouble = ""
        self.complaints: IO[bytes]
        atexit.register(self.stop)

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer to one question; both are JSON."""
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                self._start()
            process = self.process
            assert process is not None
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                return json.loads(self._line(seconds))
            except (BrokenPipeError, TimeoutError, ValueError) as error:
                self.stop()
                raise Late from error

    def _start(self) -> None:
        if self.trouble:
            raise Unusable(self.trouble)
        # The script gets this process's paths: with -I it would not see packages that PYTHONPATH names.
        paths = [path for path in sys.path if path]
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(self.script), json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            start_new_session=True,
        )
        self.owner = os.getpid()
        try:
            self._line(_START_SECONDS)
        except TimeoutError:
            self.stop()
            self.complaints.seek(0)
            last = self.complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
            # Said and remembered: what failed at its start fails again, once for every answer.
            self.trouble = (
                f"its helper process {self.script.name} does not start: {last or 'it says nothing'}"
            )
            raise Unusable(self.trouble) from None

    def _line(self, seconds: float) -> bytes:
        """The next line of the process, or TimeoutError when it is late or gone."""
        process = self.process
        assert process is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        read = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not read.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    raise TimeoutError
                read += piece
        return read

    def stop(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
