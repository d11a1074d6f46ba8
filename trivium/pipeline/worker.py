"""The other end of `jobs`: a process that makes the stages it is given, one after the other.

It reads one JSON object a line, first the recipe, then stages, and writes what happens in the same way. Where
its input ends it is done; if it is at work then, the process that gave the work is gone, and it saves and
stops.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from trivium.kit import progress
from trivium.kit.errors import TriviumError
from trivium.pipeline.lease import Busy


def main() -> None:
    """Work until the input ends."""
    # What libraries print must not get between the lines that the other process reads.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")
            events.flush()

    progress.relay_to(send)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    at_work = threading.Event()
    try:
        # Before the recipe is known: the process that leads still reads it.
        import trivium.pipeline.run  # noqa: F401
    except KeyboardInterrupt:
        sys.exit(130)
    first = json.loads(sys.stdin.readline() or "null")
    threading.Thread(target=_read, args=(orders, at_work), daemon=True).start()
    if first is not None:
        try:
            _work(first, orders, at_work, send)
        except (KeyboardInterrupt, BrokenPipeError):
            sys.exit(130)


def _read(orders: queue.Queue[dict[str, Any] | None], at_work: threading.Event) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    orders.put(None)
    if at_work.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _work(
    first: dict[str, Any], orders: queue.Queue[dict[str, Any] | None], at_work: threading.Event, send: Any
) -> None:
    from trivium.grade.sandbox.client import permitting_unsafe
    from trivium.pipeline.run import lead, prepare
    from trivium.pipeline.sharing import SharedStore

    os.environ.update(first["environment"])
    prepared: Any = None
    with permitting_unsafe(first["unsafe_sandbox"]):
        while (order := orders.get()) is not None:
            name = order["stage"]
            at_work.set()
            try:
                if prepared is None:
                    shared = SharedStore(first["store"]) if first["store"] else None
                    prepared = prepare(first["recipe"], first["runs"], first["overrides"], shared)
                if name not in prepared.nodes or prepared.nodes[name].fingerprint != order["fingerprint"]:
                    raise TriviumError("the recipe or its data changed while it ran; run it again")
                event: dict[str, Any] = {"became": lead(prepared, name, wait=False)}
            except Busy as error:
                event = {"busy": str(error).rstrip(".")}
            except TriviumError as error:
                event = {"failed": str(error)}
            except Exception as error:
                event = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            at_work.clear()
            send(event)


if __name__ == "__main__":
    main()
