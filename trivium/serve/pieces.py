"""What comes out of the engine on its way to a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """A token, how likely the model thought it, and what it weighed besides."""

    token: int
    logprob: float | None
    """None for the first token of a text, which nothing foretold."""
    alternatives: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """Some new text of one sample; `finish` says why it is the last."""

    sample: int
    text: str
    tokens: int
    scored: tuple[Scored, ...] = ()
    finish: str | None = None


class TokenNames:
    """Tokens as OpenAI's log-probabilities spell them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The letters of one token; a piece of a letter shows as the replacement character."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._tokenizer.decode([token], skip_control=False)
        return found

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.text(token)
        assert logprob is not None, "a chat's tokens follow a prompt"
        # JSON has no minus infinity; OpenAI writes -9999.0 for a token that could not be drawn
        value = max(logprob, -9999.0)
        return {"token": text, "logprob": value, "bytes": None if "�" in text else list(text.encode())}

    def chat(self, scored: tuple[Scored, ...], top: int) -> dict[str, Any]:
        """The `logprobs` of a chat's choice."""
        content = [
            {
                **self._entry(one.token, one.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in one.alternatives[:top]],
            }
            for one in scored
        ]
        return {"content": content, "refusal": None}

    def completion(self, scored: tuple[Scored, ...], top: int, offset: int) -> tuple[dict[str, Any], int]:
        """The `logprobs` of a completion's choice, and where the next token's letters begin."""
        texts = [self.text(one.token) for one in scored]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        favourites = [
            None
            if one.logprob is None
            # of tokens spelled alike the likeliest, which comes first, is told
            else {self.text(token): max(value, -9999.0) for token, value in one.alternatives[:top][::-1]}
            for one in scored
        ]
        return {
            "tokens": texts,
            "token_logprobs": [None if one.logprob is None else max(one.logprob, -9999.0) for one in scored],
            "top_logprobs": favourites,
            "text_offset": offsets,
        }, offset
