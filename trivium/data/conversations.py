"""Examples to tokens: what is learned of each, what is cut at a turn's border or dropped, all counted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from trivium.data.encoding import Encoded, Refused
from trivium.data.shapes import Example, Message, Shape, example_of, recognised
from trivium.data.sources import Document
from trivium.kit.errors import TriviumError
from trivium.tokens.items import FIRST, items_of, text_only
from trivium.tokens.tokenizer import Tokenizer

Learned = Literal["assistant", "last", "all"]
_NAMED_IN_REPORT = 20
_MARKS = ("train", "weight")


@dataclass
class Tally:
    """What became of every row and every token of a source; tokens_in = kept + cut + dropped."""

    shape: str = ""
    rows: int = 0
    kept: int = 0
    cut: int = 0
    dropped: int = 0
    unfit: int = 0
    tokens_in: int = 0
    tokens_kept: int = 0
    tokens_cut: int = 0
    tokens_dropped: int = 0
    tokens_learned: int = 0
    named: list[str] = field(default_factory=list)

    def name(self, document: Document, why: str) -> None:
        """Remember where the first rows were that did not go in whole."""
        if len(self.named) < _NAMED_IN_REPORT:
            self.named.append(f"{document.id} {why}")

    def settle(
        self, document: Document, before: int, after: int, learned: int, *, why: str, cut: str
    ) -> bool:
        """Count an example by its tokens; false if none is learned, so that it is dropped."""
        self.tokens_in += before
        if not learned:
            self.dropped += 1
            self.tokens_dropped += before
            self.name(document, why)
            return False
        if after < before:
            self.cut += 1
            self.tokens_cut += before - after
            self.name(document, cut)
        self.kept += 1
        self.tokens_kept += after
        self.tokens_learned += learned
        return True

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """An example as tokens, and which of them are learned (None: all)."""

    tokens: list[int]
    learned: list[bool] | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicted(self) -> int:
        """How many tokens are learned; the first of all is never predicted."""
        return max(0, len(self) - 1) if self.learned is None else sum(self.learned[1:])


class Encoder:
    """Encodes the rows of one source, in the shape its first row was recognised as."""

    def __init__(self, tokenizer: Tokenizer, context: int, learned: Learned = "assistant") -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.learned = learned
        self.shape: Shape[Example] | None = None
        self.tally = Tally()
        self._byte_lengths = tokenizer.byte_lengths()

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded | Refused]:
        """Every row that goes in, and those that cannot be read; dropped rows are only counted."""
        for document in documents:
            self.tally.rows += 1
            try:
                if self.shape is None:
                    self.shape = recognised(document.fields)
                    self.tally.shape = self.shape.name
                example = example_of(self.shape, document.fields)
                whole = self.whole(example)
            except TriviumError as error:
                self.tally.unfit += 1
                self.tally.name(document, str(error))
                yield Refused(document, str(error))
                continue
            kept = self._kept(document, example, whole)
            if kept is not None:
                yield self._encoded(document, example, kept)

    def _kept(self, document: Document, example: Example, whole: Piece) -> Piece | None:
        """What goes in of an example, or None; either way every token is counted once."""
        kept, why = whole, "teaches nothing: no token of it is learned"
        # A text is not cut here: packing lays its pieces into rows and loses none.
        if len(whole) > self.context and example.text is None:
            shorter = self._shortened(example, whole)
            why = f"has {len(whole)} tokens, and no whole answer fits into a `context` of {self.context}"
            kept = shorter if shorter is not None else Piece([], [])
        goes_in = self.tally.settle(
            document, len(whole), len(kept), kept.predicted if example.weight else 0,
            why="has the `weight` 0" if kept.predicted else why,
            cut=f"was cut from {len(whole)} to {len(kept)} tokens at the border of a turn",
        )  # fmt: skip
        return kept if goes_in else None

    def _encoded(self, document: Document, example: Example, kept: Piece) -> Encoded:
        tokens = np.array(kept.tokens, dtype=np.int64)
        learned = None if kept.learned is None else np.array(kept.learned, dtype=bool)
        weighed = replace(document, fields={**document.fields, "weight": example.weight})
        items = items_of(tokens)
        if items and learned is None:
            learned = tokens < FIRST
        size = int(self._byte_lengths[text_only(tokens)].sum())
        return Encoded(weighed, tokens, size, learned, items)

    def whole(self, example: Example) -> Piece:
        """All of an example, however long."""
        if example.messages:
            return self._conversation(example, example.messages, example.given)
        text = example.text
        if text is None:
            text = (example.prompt or "") + (example.completion or "")
        ids = self._ended(text)
        if example.prompt is None or self.learned == "all":
            return Piece(ids, None)
        prompt = self._begun(self.tokenizer.encode(example.prompt))
        if ids[: len(prompt)] != prompt:
            # A token reaches across the border; who asks has only the prompt's own tokens, so it ends there.
            ids = [*prompt, *self._ended(example.completion or "", begun=False)]
        return Piece(ids, [place >= len(prompt) for place in range(len(ids))])

    def _begun(self, ids: list[int]) -> list[int]:
        first = self.tokenizer.beginning_id
        return ids if first is None else [first, *ids]

    def _ended(self, text: str, begun: bool = True) -> list[int]:
        """A text's tokens and the one that ends it, which is not doubled where the text brings it along."""
        end = self.tokenizer.end_of_reply_id
        ids = self.tokenizer.encode(text.removesuffix(self.tokenizer.token(end)))
        return [*(self._begun(ids) if begun else ids), end]

    def _conversation(self, example: Example, messages: Sequence[Message], given: int) -> Piece:
        """A conversation as its template writes it, and which of its turns are learned."""
        bare = [{key: value for key, value in one.items() if key not in _MARKS} for one in messages]
        chat = self.tokenizer.encode_chat(
            bare, tools=example.tools, template_arguments=example.template_arguments
        )
        if self.learned == "all":
            return Piece(chat.ids, None)
        turns = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
        wanted = [place >= given and _is_wanted(messages[place]) for place in turns]
        if not all(wanted) and max(chat.turns, default=-1) + 1 != len(turns):
            raise TriviumError(
                f"has {len(turns)} turns of the assistant, which the chat template writes as "
                f"{max(chat.turns, default=-1) + 1}, so single turns cannot be left out of the loss"
            )
        if self.learned == "last":
            last = max(chat.turns, default=-1)
            return Piece(chat.ids, [turn == last and turn >= 0 for turn in chat.turns])
        if all(wanted):
            return Piece(chat.ids, chat.learned)
        return Piece(chat.ids, [turn >= 0 and wanted[turn] for turn in chat.turns])

    def _shortened(self, example: Example, whole: Piece) -> Piece | None:
        """The conversation cut at the border of a turn so that it fits, or None if no whole answer is left.

        What is learned stays: the last turns go, unless only the end is learned; then the oldest ones go.
        The system prompt always stays.
        """
        messages = example.messages
        if self.learned == "last" or example.given:
            system = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
            starts = [i for i, one in enumerate(messages) if one["role"] == "user" and i > system]
            last_start = example.given - 1 if example.given else len(messages) - 1
            for start in starts:
                if start <= last_start:
                    rest = (*messages[:system], *messages[start:])
                    given = max(0, example.given - (len(messages) - len(rest)))
                    piece = self._conversation(example, rest, given)
                    if len(piece) <= self.context:
                        return piece
            return None
        for end in range(len(messages) - 1, 0, -1):
            if messages[end - 1]["role"] == "assistant":
                piece = self._conversation(example, messages[:end], 0)
                if len(piece) <= self.context:
                    return piece
        return None


def _is_wanted(message: Message) -> bool:
    """Whether a turn is learned: `train: false` and `weight: 0` on a message leave it out."""
    return bool(message.get("train", True)) and message.get("weight", 1) != 0
