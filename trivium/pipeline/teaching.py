"""What the first rows of a source teach: rows that a stage refuses, drops or cuts, found before it runs."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from trivium.data.conversations import Encoder
from trivium.data.encoding import Refused
from trivium.data.preferences import Completion, PreferenceData
from trivium.kit.errors import TriviumError
from trivium.pipeline.checks import PREFERENCES, Checked, is_online
from trivium.pipeline.looking import LONGEST, Looked, bytes_per_token
from trivium.pipeline.run import Run
from trivium.stages.parts.training import LONGEST as MOST
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import SMALLEST, train_tokenizer

EXAMPLES = ("sft", "distill")


def check_rows(
    going: Run, name: str, tokenizer: Tokenizer | None, numbers: Mapping[str, Any], checked: Checked
) -> None:
    """Refuse sources none of whose first rows can be learned from, and say how many are too long."""
    stage: Any = going.nodes[name].stage
    paired = stage.kind in PREFERENCES and not is_online(stage) and not getattr(stage, "process", False)
    if stage.kind not in EXAMPLES and not paired:
        return
    reach = int(getattr(stage, "context", None) or min(MOST, numbers.get("context", MOST)))
    for source, looked in checked.sources.get(name, {}).items():
        portion = stage.data.get(source)
        if portion is None or not looked.rows:
            continue
        place = going.recipe.written.place(["stages", name.partition(".")[0], "data", source])
        # Without a tokenizer every byte is a token, which tells nothing about lengths.
        context = LONGEST if tokenizer is None else reach
        spoken = with_chat_template(tokenizer or _bytes())
        try:
            tally = _read(looked, spoken, context, paired, portion.on_bad == "skip", stage)
        except TriviumError as error:
            raise TriviumError(f"{place}: {error}") from None
        if not tally.kept:
            because = f"; {tally.named[0]}" if tally.named else ""
            raise TriviumError(
                f"{place}: none of the first {tally.rows} rows can be learned from{because}; "
                "give it others, or another `context`."
            )
        long = tally.cut + tally.dropped if tokenizer is not None else _long(looked, reach, numbers)
        if long:
            about, of = ("", tally.rows) if tokenizer is not None else ("about ", len(looked.rows))
            checked.notes.append(
                f"{name}: {about}{long} of the first {of} rows of {source} are cut or left out: they are "
                f"longer than the {reach} tokens of `context`, or teach nothing"
            )


def _read(looked: Looked, tokenizer: Tokenizer, context: int, paired: bool, skip: bool, stage: Any) -> Any:
    """What becomes of the first rows; one that cannot be read stops it, as it would stop the stage."""
    if paired:
        data = PreferenceData(tokenizer, context)
        pairs = list(data.read(looked.counted, skip=skip))
        if pairs and all(one.is_pair and _alike(*one.completions) for one in pairs):
            raise TriviumError(
                f"both answers of each of the first {len(pairs)} pairs are the same; name pairs that differ."
            )
        return data.tally
    encoder = Encoder(tokenizer, context, stage.loss if stage.kind == "sft" else stage.learned)
    for one in encoder.encode(looked.counted):
        if isinstance(one, Refused) and not skip:
            raise TriviumError(f"{one.document.id} {one.why}; fix it or set `on_bad: skip`.")
    return encoder.tally


def _alike(chosen: Completion, rejected: Completion) -> bool:
    return np.array_equal(chosen.tokens, rejected.tokens)


def _long(looked: Looked, context: int, numbers: Mapping[str, Any]) -> int:
    """How many rows are too long, by their characters."""
    each = bytes_per_token(int(numbers.get("vocabulary", 4096)))
    return sum(size / each > context for size in looked.characters)


@cache
def _bytes() -> Tokenizer:
    return train_tokenizer((), SMALLEST)
