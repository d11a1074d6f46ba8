"""A port that stays free between its choice and its use."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One below those that the system gives to clients, which come and go while other tests run."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
