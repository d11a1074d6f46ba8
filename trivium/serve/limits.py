"""What a server allows, so that no client can exhaust it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from trivium.kit.errors import TriviumError


def _limit(default: Any, told: str, least: float = 1) -> Any:
    return field(default=default, metadata={"told": told, "least": least})


@dataclass(frozen=True)
class Limits:
    """The bounds of one server; a request beyond one of them is refused, never truncated."""

    body_bytes: int = _limit(2_000_000, "Bytes of a request.")
    prompt_tokens: int | None = _limit(None, "Tokens of a prompt; else what the context holds.")
    new_tokens: int = _limit(4096, "New tokens of an answer.")
    samples: int = _limit(16, "Answers to one request (n, and several prompts).")
    stop_strings: int = _limit(16, "Stop strings of a request.", least=0)
    stop_characters: int = _limit(256, "Characters of a stop string.")
    top_logprobs: int = _limit(20, "Alternatives given per token.", least=0)
    embedding_inputs: int = _limit(256, "Texts of one embedding request.")
    searches: int = _limit(4, "Searches at the same time; more get 429.", least=0)
    search_samples: int = _limit(32, "Answers, or next steps, that a search draws at once (n, width).")
    search_tokens: int = _limit(32_768, "Tokens that a search may draw in all.")
    search_steps: int = _limit(64, "Steps of a solution that is searched for.")
    queued: int = _limit(64, "Answers that may wait beyond those being written; more get 429.", least=0)
    request_seconds: float = _limit(600.0, "Seconds an answer may take.", least=0)
    grammar_seconds: float = _limit(2.0, "Seconds of computing a schema or regex may take.", least=0.01)
    body_seconds: float = _limit(30.0, "Seconds a request may take to arrive.", least=0)
    head_seconds: float = _limit(10.0, "Seconds the head of a request may take to arrive.", least=0)
    idle_seconds: float = _limit(15.0, "Seconds a connection may wait for its next request.", least=0)
    stalled_seconds: float = _limit(30.0, "Seconds a client may read nothing of its answer.", least=0)
    connections: int = _limit(512, "Connections at the same time.")
    connections_per_address: int = _limit(256, "Connections from one address at the same time.")
    allow_fetch: bool = _limit(
        False, "Fetch pictures that requests name by URL, from public addresses only.", least=0
    )
    fetched_pictures: int = _limit(8, "Pictures of a request that are fetched.")
    picture_pixels: int = _limit(25_000_000, "Pixels of a picture.")
    request_pixels: int = _limit(50_000_000, "Pixels of all pictures of a request.")
    drain_seconds: float = _limit(30.0, "Seconds running answers get when the server is stopped.", least=0)

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), limit.metadata["least"]
            if value is not None and not (math.isfinite(value) and value >= least):
                raise TriviumError(
                    f"the limit {limit.name} is {value}; give a number that is at least {least}."
                )
