"""Answers on disk, one line each as it arrives: what is written there is never asked for, or paid for, again.

A line is written before a request that costs money, too. If the process dies in between, the next one knows
that the request may have been paid for, and counts it at its highest price.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trivium.generate.asking.budget import Cost
from trivium.generate.endpoint import ChatReply
from trivium.kit.files import make_folder, sync, write_text

ANSWERS = "answers.jsonl"


class Journal:
    """The answers of one stage; `others` are files of earlier stages, whose answers are free."""

    def __init__(self, path: Path, models: Iterable[str], others: Iterable[Path] = ()) -> None:
        self.path, self.models = path, frozenset(models)
        self.known: dict[str, ChatReply] = {}
        self.spent = Cost()
        self._lock = threading.Lock()
        for other in others:
            for line in _lines(other):
                if line.get("model") in self.models and "text" in line:
                    self.known[line["key"]] = _reply(line)
        unanswered = self._resume()
        make_folder(path.parent)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        for key, cost in unanswered.items():
            # On disk as well: an answer to the same request, made once more, must not settle this one.
            self.lost(key, cost)
            self.spent += cost

    def _resume(self) -> dict[str, Cost]:
        """Take over what an earlier process wrote, and cut off the line in which it died.

        Returns what it had sent and not had an answer to, with its price at most.
        """
        waiting: dict[str, Cost] = {}
        for line in _lines(self.path):
            cost = Cost(*line["cost"])
            if line["what"] == "sent":
                waiting[line["key"]] = waiting.get(line["key"], Cost()) + cost
                continue
            waiting.pop(line["key"], None)
            self.spent += cost
            if line["what"] == "answer":
                self.known[line["key"]] = _reply(line)
        if self.path.is_file():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                with open(self.path, "r+b") as file:
                    file.truncate(len(whole))
        return waiting

    def sent(self, key: str, bound: Cost) -> None:
        """A request is about to be made that may cost so much."""
        self._write({"what": "sent", "key": key, "cost": _listed(bound)})

    def lost(self, key: str, cost: Cost) -> None:
        """A request cost so much and brought nothing."""
        self._write({"what": "lost", "key": key, "cost": _listed(cost)})

    def answer(self, key: str, model: str, reply: ChatReply, cost: Cost) -> None:
        """Keep an answer."""
        line = {
            "what": "answer", "key": key, "model": model, "cost": _listed(cost), "text": reply.text,
            "finish": reply.finish_reason, "tokens": [reply.prompt_tokens, reply.completion_tokens],
        }  # fmt: skip
        line["seal"] = _seal(line)
        with self._lock:
            self.known[key] = reply
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        with self._lock:
            self._file.write(text + "\n")
            # Out of this process: a kill takes nothing back that has been written.
            self._file.flush()

    def close(self) -> None:
        """Close the file, its content on the disk."""
        self._file.close()
        sync(self.path)


def keep_answers(journals: Iterable[Path], place: Path) -> None:
    """Write the answers of journals alone, in an order that does not depend on which arrived first."""
    found = {line["key"]: json.dumps(line) for path in journals for line in _lines(path) if "text" in line}
    write_text(place, "".join(f"{found[key]}\n" for key in sorted(found)))


def answers_beside(folder: Path) -> list[Path]:
    """The answers that other stages of the same store were given."""
    return [path for path in sorted(folder.parent.glob(f"*/{ANSWERS}")) if path.parent != folder]


def _listed(cost: Cost) -> list[float]:
    return [cost.tokens, cost.requests, cost.money]


def _seal(line: dict[str, Any]) -> str:
    content = json.dumps({name: one for name, one in line.items() if name != "seal"}, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _reply(line: dict[str, Any]) -> ChatReply:
    return ChatReply(line["text"], line["finish"], *line["tokens"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole and as they were written; a damaged answer is asked for again."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and ("text" not in line or line.get("seal") == _seal(line)):
                yield line
