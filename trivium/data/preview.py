"""A packed row for people to read: its text, with what is learned told apart from what is only read."""

from itertools import groupby

from trivium.data.rows import PackedSequence
from trivium.tokens.tokenizer import Tokenizer

LEARNED, BORDER, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
OPENS, CLOSES = "⟦", "⟧"


def previewed(row: PackedSequence, tokenizer: Tokenizer, *, colour: bool) -> str:
    """Every document of a row, the learned tokens green and bold, or between ⟦ and ⟧ without colours."""
    opens, closes = (LEARNED, PLAIN) if colour else (OPENS, CLOSES)
    parts, start = [], 0
    for length, identity in zip(row.lengths, row.ids, strict=True):
        tokens = row.tokens[start : start + length].tolist()
        # A token is learned where the token before it predicts it.
        learned = [False, *(row.weights[start : start + length - 1] > 0).tolist()]
        text = ""
        for is_learned, run in groupby(zip(tokens, learned, strict=True), key=lambda pair: pair[1]):
            shown = tokenizer.decode([token for token, _ in run], skip_control=False)
            text += f"{opens}{shown}{closes}" if is_learned else shown
        count = f"{sum(learned)} of {length} tokens learned"
        head = f"--- {identity}: {count}"
        parts.append(f"{BORDER}{head}{PLAIN}\n{text}" if colour else f"{head}\n{text}")
        start += length
    return "\n".join(parts)
