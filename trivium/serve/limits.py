"""What a server allows, so that no client can exhaust it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The bounds of one server; a request beyond one of them is refused, never truncated."""

    body_bytes: int = 2_000_000
    prompt_tokens: int | None = None  # None: whatever the model's context holds
    new_tokens: int = 4096
    samples: int = 16
    stop_strings: int = 16
    stop_characters: int = 256
    top_logprobs: int = 20
    embedding_inputs: int = 256
    queued: int = 64  # samples that may wait beyond those the engine's rows hold
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    drain_seconds: float = 30.0
