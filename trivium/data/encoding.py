"""Documents to tokens, over processes; the result does not depend on how many."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np

from trivium.data.sources import Document
from trivium.kit.errors import TriviumError
from trivium.tokens.items import LIBRARY, Item, items_of, text_only
from trivium.tokens.parts import has_items
from trivium.tokens.tokenizer import Tokenizer

_LETTERS_PER_CHUNK = 1 << 19
_DOCUMENTS_PER_CHUNK = 1024
_LETTERS_PER_ITEMS = 1 << 14
"""For how many letters pictures and sounds count, which take much more memory than text."""


@dataclass(frozen=True)
class Encoded:
    """One document's tokens, the bytes of its text, and which tokens are learned (None: all)."""

    document: Document
    tokens: np.ndarray
    bytes: int
    learned: np.ndarray | None
    items: dict[int, Item] = field(default_factory=dict)
    """The pictures and sounds that the tokens name."""


@dataclass(frozen=True)
class Refused:
    """A document that could not become tokens, and why."""

    document: Document
    why: str


def encode_document(document: Document, tokenizer: Tokenizer, lengths: np.ndarray) -> Encoded | Refused:
    """A text with the tokens that begin and end it, or a conversation as its chat template writes it."""
    if document.text is None:
        return _encode_conversation(document, tokenizer, lengths)
    return encode_text(document, tokenizer)


def encode_text(document: Document, tokenizer: Tokenizer) -> Encoded:
    """A text with the tokens that begin and end it."""
    assert document.text is not None
    return _framed(document, tokenizer, tokenizer.encode(document.text))


def _framed(document: Document, tokenizer: Tokenizer, ids: list[int]) -> Encoded:
    assert document.text is not None
    first = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
    tokens = np.array([*first, *ids, tokenizer.end_of_text_id], dtype=np.int64)
    return Encoded(document, tokens, len(document.text.encode()), None)


def _encode_conversation(document: Document, tokenizer: Tokenizer, lengths: np.ndarray) -> Encoded | Refused:
    messages = document.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        names = ", ".join(map(repr, document.fields)) or "nothing"
        return Refused(document, f"has neither `text` nor `messages`, but {names}; map one with `columns`")
    try:
        chat = tokenizer.encode_chat(messages, tools=document.fields.get("tools") or None)
    except TriviumError as error:
        return Refused(document, str(error))
    tokens = np.array(chat.ids, dtype=np.int64)
    size = int(lengths[text_only(tokens)].sum())
    return Encoded(document, tokens, size, np.array(chat.learned, dtype=bool), items_of(tokens))


def _encode_chunk(
    chunk: list[Document], tokenizer: Tokenizer, lengths: np.ndarray
) -> list[Encoded | Refused]:
    texts = [document.text for document in chunk if document.text is not None]
    ready = iter(tokenizer.encode_batch(texts))
    return [
        encode_document(document, tokenizer, lengths)
        if document.text is None
        else _framed(document, tokenizer, next(ready))
        for document in chunk
    ]


_worker: tuple[Tokenizer, np.ndarray] | None = None


def _start_worker(tokenizer: Tokenizer, lengths: np.ndarray) -> None:
    global _worker
    # One process per core already; threads inside each would only crowd them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (tokenizer, lengths)


def _work(chunk: list[Document]) -> list[Encoded | Refused]:
    assert _worker is not None, "the worker was started with a tokenizer"
    with LIBRARY.passing():
        return _encode_chunk(chunk, *_worker)


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of bounded size."""
    chunk: list[Document] = []
    letters = 0
    for document in documents:
        chunk.append(document)
        items = document.text is None and has_items(document.fields.get("messages"))
        letters += _LETTERS_PER_ITEMS if items else len(document.text or "") or 1024
        if letters >= _LETTERS_PER_CHUNK or len(chunk) >= _DOCUMENTS_PER_CHUNK:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[Encoded | Refused]:
    """Every document in the order given, encoded by this process (workers = 1) or by others."""
    lengths = tokenizer.byte_lengths()
    if workers <= 1:
        for chunk in chunks(documents):
            yield from _encode_chunk(chunk, tokenizer, lengths)
        return
    waiting: deque[Future[list[Encoded | Refused]]] = deque()
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, lengths)
    ) as pool:
        try:
            for chunk in chunks(documents):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) >= 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise TriviumError(
                "A process that tokenises died, most likely for want of memory; use fewer `workers`."
            ) from error
        finally:
            for future in waiting:
                future.cancel()
