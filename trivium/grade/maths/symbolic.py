"""A computer-algebra system in a child process that can be killed when it thinks too long."""

import atexit
import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

_FORMULA = re.compile(r"[A-Za-z0-9\\{}()\[\]+\-*/^_=<>.,|!&\s']{1,600}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_POWERS = re.compile(r"\^\s*\{?[^{}]*\^|\d{6,}|!\s*!|\^\s*\{?\s*\d{5,}")
_START_SECONDS = 60.0


class _Child:
    """One interpreter with sympy loaded, asked one question at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def ask(self, gold: str, answer: str, seconds: float) -> str:
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                self.start()
            process = self.process
            assert process is not None
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                process.stdin.flush()
                line = self.line(seconds)
            except (BrokenPipeError, TimeoutError):
                self.stop()
                return "timeout"
            return line.decode().strip()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("symbolic_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.owner = os.getpid()
        try:
            self.line(_START_SECONDS)
        except TimeoutError:
            self.stop()
            raise

    def line(self, seconds: float) -> bytes:
        """The next line of the child, or TimeoutError when it is late or gone."""
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
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


_child = _Child()
atexit.register(_child.stop)


def symbolic_verdict(gold: str, answer: str, seconds: float) -> str:
    """ok, wrong, unparsed, gold_bad or timeout from math-verify; `unavailable` where it is not installed."""
    if find_spec("math_verify") is None or find_spec("sympy") is None:
        return "unavailable"
    for text, verdict in ((gold, "gold_bad"), (answer, "unparsed")):
        # Prose would be searched for anything that looks right, which is how a hedge passes.
        if not _FORMULA.fullmatch(text) or _POWERS.search(text) or _WORD.search(_COMMAND.sub(" ", text)):
            return verdict
        # The algebra system mends what is broken; half a formula is no answer.
        if "boxed" in text or text.count("{") != text.count("}"):
            return verdict
    return _child.ask(gold, answer, seconds)
