"""A whole program run once in the sandbox, with its input and output on pipes."""

import os
from typing import Any

from trivium.grade.sandbox.client import Limits, Sandbox, feed


def run_script(box: Sandbox, program: str, given: str, limits: Limits) -> tuple[bytes, dict[str, Any]]:
    """What a program prints, and how it ended; more output than the limit is where it stops."""
    their_input, our_input = os.pipe()
    our_output, their_output = os.pipe()
    try:
        with box.worker(limits, their_input, their_output) as worker:
            os.close(their_input)
            os.close(their_output)
            their_input = their_output = -1
            worker.send({"role": "script", "program": program})
            given_to, our_input = our_input, -1
            printed = feed(
                given_to, our_output, given.encode(errors="replace"), limits.output, worker.deadline
            )
            if len(printed) > limits.output:
                return printed, {"ended": "endless", "code": 1}
            return printed, worker.ending()
    finally:
        for fd in (their_input, our_input, our_output, their_output):
            if fd >= 0:
                os.close(fd)
