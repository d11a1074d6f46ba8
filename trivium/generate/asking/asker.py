"""Ask a model many things at once: from the cache where it was asked before, within the budget where not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trivium.generate.asking.budget import Cost, Ledger, believed
from trivium.generate.asking.journal import Journal
from trivium.generate.asking.writers import ChatRequest, Job, Writer
from trivium.generate.endpoint import ChatReply
from trivium.kit.fingerprint import fingerprint

OUT_OF_BUDGET = "budget: it is used up"


class _Account:
    """The attempts at one request: reserved before each, settled after it, and on disk before and after."""

    def __init__(self, asker: Asker, writer: Writer, key: str, request: ChatRequest) -> None:
        self.asker, self.writer, self.key = asker, writer, key
        self.tokens = writer.bound(request)
        self.bound = writer.cost(*self.tokens)
        self.open = False

    def attempt(self) -> bool:
        self._end(Cost(requests=1))
        if not self.asker.ledger.reserve(self.bound, wait=self.writer.paid):
            return False
        self.open = True
        if self.writer.paid:
            self.asker.journal.sent(self.key, self.bound)
        return True

    def lost(self) -> None:
        self.asker.count("lost")
        self._end(self.bound)

    def stop(self) -> None:
        self.asker.ledger.stop()

    def _end(self, cost: Cost) -> None:
        """Settle an attempt that brought no answer."""
        if self.open:
            self.open = False
            self.asker.ledger.settle(self.bound, cost)
            self.asker.journal.lost(self.key, cost)

    def close(self, reply: ChatReply | None) -> None:
        """Settle the last attempt, and keep its answer."""
        if reply is None or reply.failure is not None:
            self._end(Cost(requests=1))
            return
        prompt, completion = self.tokens
        told, can_be = believed(reply.completion_tokens, reply.text, completion)
        read, was_read = (reply.prompt_tokens, True) if 0 < reply.prompt_tokens <= prompt else (prompt, False)
        if not (can_be and was_read):
            self.asker.count("not believed")
        cost = self.writer.cost(read, told)
        self.open = False
        self.asker.ledger.settle(self.bound, cost)
        self.asker.journal.answer(self.key, self.writer.identity, reply, cost)


@dataclass
class Asker:
    """The cache and the ledger of one stage."""

    journal: Journal
    ledger: Ledger
    counts: Counter[str] = field(default_factory=Counter)
    """How requests went: `answered`, `cached`, `failed`, `lost`, `not believed`."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def key(self, writer: Writer, request: ChatRequest) -> str:
        """What an answer is remembered by."""
        return fingerprint([writer.identity, request.identity])

    def ask(self, writer: Writer, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """One reply per request, in order; the same request is made once."""
        keys = [self.key(writer, request) for request in requests]
        known = self.journal.known
        missing = {key: one for key, one in zip(keys, requests, strict=True) if key not in known}
        self.counts["cached"] += len(requests) - len(missing)
        failed: dict[str, ChatReply] = {}
        for (_, account), reply in writer.write(self._jobs(writer, missing)):
            assert isinstance(account, _Account)
            account.close(reply)
            if reply is None:
                self.ledger.refused = True
            elif reply.failure is not None:
                self.count("failed")
                failed[account.key] = reply
            else:
                self.count("answered")
        refused = ChatReply("", "", 0, 0, OUT_OF_BUDGET)
        return [known.get(key) or failed.get(key, refused) for key in keys]

    def _jobs(self, writer: Writer, missing: dict[str, ChatRequest]) -> Iterator[Job]:
        for key, request in missing.items():
            if self.ledger.refused:
                # Smaller requests do not overtake one that no longer fits.
                return
            yield request, _Account(self, writer, key, request)

    def count(self, what: str) -> None:
        """Count one request, from any thread."""
        with self._lock:
            self.counts[what] += 1
