"""What stands in for a tokenizer where a checkpoint has none: a text is its token ids, `12 7 903`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.tokens.tokenizer import Tokenizer


class TokenIds(Tokenizer):
    """Ids as words; nothing can be trained with it, and it is not saved."""

    def __init__(self, vocabulary: int, ends: Sequence[int] = ()) -> None:
        """`ends` are the ids at which an answer ends."""
        self.ends = tuple(ends)
        words = {str(identity): identity for identity in range(vocabulary)}
        added = [
            {"id": one, "content": str(one), "special": True, "single_word": True, "lstrip": False,
             "rstrip": False, "normalized": False}
            for one in self.ends
        ]  # fmt: skip
        super().__init__(
            {
                "version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"},
            },
            {"eos_token": str(self.ends[0])} if self.ends else {},
        )  # fmt: skip

    @classmethod
    def of(cls, folder: Path, vocabulary: int) -> TokenIds:
        """For a model's folder, with the ends that its configs name."""
        ends: Any = None
        for name in ("generation_config.json", "config.json"):
            if ends is None and (folder / name).is_file():
                ends = read_object(folder / name).get("eos_token_id")
        listed = ends if isinstance(ends, list) else [ends]
        return cls(vocabulary, [one for one in listed if isinstance(one, int) and 0 <= one < vocabulary])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds, (self.vocabulary_size, self.ends)

    @property
    def stop_ids(self) -> frozenset[int]:  # type: ignore[override]
        return frozenset(self.ends)

    def encode(self, text: str) -> list[int]:
        """The ids that a text lists."""
        words = text.split()
        if not all(word.isdecimal() and int(word) < self.vocabulary_size for word in words):
            raise TriviumError(
                "The model's folder has no tokenizer, so a text is token ids such as `12 7`, below "
                f"{self.vocabulary_size:,}; put a tokenizer.json beside the model to write words."
            )
        return [int(word) for word in words]

    def save(self, folder: Path | str) -> None:
        """Write nothing: the folder stays one without a tokenizer."""
