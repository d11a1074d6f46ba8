"""`trivium serve`: several models behind OpenAI's protocol, and the web page that talks to them."""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trivium.generate.engine import Engine
from trivium.grade.learned import learned_scorer
from trivium.kit.errors import TriviumError, needing
from trivium.model.named import RUNS, find_model, find_reward_model, find_stage
from trivium.serve.engine_thread import EngineThread
from trivium.serve.limits import Limits
from trivium.serve.logs import Sparing
from trivium.serve.models import drafts_of, open_engine, short_names, with_adapters
from trivium.tokens.items import LIBRARY

if TYPE_CHECKING:
    import uvicorn

KEY_VARIABLE = "TRIVIUM_API_KEY"
HELD_ITEMS = 1 << 30
"""How many bytes of pictures and sounds are held for prompts that are not computed yet."""


def serve(
    models: Sequence[str],
    *,
    runs: str = RUNS,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
    max_rows: int = 32,
    prefix_cache_size: int = 8,
    drafts: Sequence[str] = (),
    scorers: Sequence[str] = (),
    limits: Limits | None = None,
    device: str | None = None,
    dtype: str | None = None,
    memory_budget: int | None = None,
    compiled: bool = False,
) -> None:
    """Serve models until SIGTERM or Ctrl-C, then let running answers finish."""
    limits = limits or Limits()
    LIBRARY.limit = HELD_ITEMS
    names = short_names(models)
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    listener = bound(host, port)
    allow_descriptors(limits.connections)
    # A stage goes by its name; where it lies is known here alone.
    names = {name: str(find_stage(place, runs) or place) for name, place in names.items()}
    adapters = with_adapters(names)
    drafting = drafts_of(adapters, drafts)
    with EngineThread() as thread:
        engines = {}
        for name, beside in adapters.items():
            print(f"Opening {name} from {names[name]}", flush=True)
            folder = find_model(names[name], runs)  # here, where Ctrl-C ends what has to be fetched
            opening = partial(
                open_engine, folder, max_rows=max_rows, device=device, dtype=dtype,
                memory_budget=memory_budget, adapters=beside, sharing=len(adapters),
                prefix_cache_size=prefix_cache_size,
                draft=drafting.get(name), runs=runs, compiled=compiled,
            )  # fmt: skip
            engines[name] = thread.do(opening)
            with suppress(TriviumError):  # without its package forms are refused when one is asked for
                engines[name].grammars.prepare()
        judges = {}
        for name, place in short_names(scorers).items() if scorers else ():
            print(f"Opening the scorer {name} from {place}", flush=True)
            judges[name] = thread.do(partial(learned_scorer, find_reward_model(place, runs), name))
        server = build_server(
            engines,
            thread,
            host=host,
            api_key=key,
            allow_origins=allow_origins,
            limits=limits,
            adapters=adapters,
            judges=judges,
        )
        # what has been made by now stays; Python need not look through it whenever a request is read
        gc.collect()
        gc.freeze()
        listener.listen()  # who comes before the first answer can be given waits for it
        _announce(names, host, listener.getsockname()[1], guarded=key is not None)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        for handler in logging.getLogger().handlers:
            handler.addFilter(Sparing())
        with _signals_end_quietly():
            server.run(sockets=[listener])


def _announce(names: Collection[str], host: str, port: int, *, guarded: bool) -> None:
    shown = f"[{host}]" if ":" in host else host
    print(
        f"Serving {', '.join(names)} at http://{shown}:{port} (the API under /v1). Ctrl-C stops.", flush=True
    )
    if not guarded and not is_loopback(host):
        print(f"Anyone who reaches {host} may use it: set {KEY_VARIABLE} or --api-key.", flush=True)


def build_server(
    engines: Mapping[str, Engine],
    thread: EngineThread,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
    limits: Limits,
    adapters: Mapping[str, Collection[str]] = MappingProxyType({}),
    judges: Mapping[str, Any] = MappingProxyType({}),
) -> uvicorn.Server:
    """A server around engines that were opened on this thread, ready to run."""
    with needing("serving needs fastapi and uvicorn; install Trivium's extra 'serve'."):
        import fastapi  # noqa: F401
        import uvicorn
    from trivium.serve.application import build
    from trivium.serve.connections import Connections
    from trivium.serve.measures import Measures
    from trivium.serve.worker import Adapted, Worker

    measures = Measures()
    workers = [
        Worker(name, engine, thread, queued=limits.queued, measures=measures)
        for name, engine in engines.items()
    ]
    adapted = [Adapted(worker, name) for worker in workers for name in adapters.get(worker.name, ())]
    application = build(
        [*workers, *adapted],
        limits=limits,
        measures=measures,
        key=api_key,
        local_only=is_loopback(host),
        origins=allow_origins,
        judges=judges,
    )
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    # uvicorn declares whole seconds and only hands them on to asyncio, which takes fractions
    settings["timeout_graceful_shutdown"] = limits.drain_seconds
    settings["timeout_keep_alive"] = limits.idle_seconds
    connections = Connections(limits, measures)
    settings["http"], settings["backlog"] = connections.protocol, connections.backlog
    return uvicorn.Server(uvicorn.Config(application, lifespan="on", ws="none", **settings))


def allow_descriptors(connections: int) -> None:
    """Ask for as many file descriptors as the connections take, as far as this process may have them."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + 512
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before minutes are spent on loading models."""
    listener = None
    if not 0 <= port < 2**16:
        raise TriviumError(f"the port {port} does not exist; choose one from 1 to 65535, or 0 for any.")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise TriviumError(
            f"{host}:{port} cannot be listened on ({reason}); choose another address or port."
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _signals_end_quietly() -> Any:
    # uvicorn repeats the signal that stopped it once it has drained; the exit should then be a clean one
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
