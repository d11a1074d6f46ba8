"""How far a model makes use of what it reads: bits per byte by the place of the token in its document."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from trivium.evals.asking import Subject
from trivium.evals.bits import first_texts, texts_of
from trivium.evals.passkey import characters_per_token
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task
from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents

FIRST = 64
A_TALE = 600


def borders(length: int) -> list[int]:
    """Where buckets end: at 64, 128, 256... and at the length itself."""
    ends = []
    end = FIRST
    while end < length:
        ends.append(end)
        end *= 2
    return [*ends, length]


@torch.inference_mode()
def token_bits(subject: Subject, ids: Sequence[int]) -> np.ndarray:
    """The bits of every token of a document but the first."""
    tokens = torch.tensor(ids, device=subject.model.device)
    hidden = subject.model(tokens, Documents([len(ids)], subject.model.device))
    logits = subject.model.logits(hidden[:-1])
    losses = torch.logsumexp(logits, dim=-1) - logits.gather(1, tokens[1:, None])[:, 0]
    found: np.ndarray = losses.double().cpu().numpy() / math.log(2)
    return found


def long_texts(subject: Subject, settings: Settings, source: str, length: int) -> list[tuple[str, list[int]]]:
    """Documents of a source cut to so many tokens; shorter ones would leave the late buckets empty."""
    if source == "chronicle":
        # Some to spare: letters per token are an average, and the last tale may not fit.
        characters = round(1.1 * length * characters_per_token(subject, settings)) + A_TALE
        source = f"world:chronicle?characters={characters}"
    found = [(name, subject.text_ids(text)[:length]) for name, text, _ in texts_of(source, settings)]
    return [(name, ids) for name, ids in found if len(ids) == length]


@as_task(
    "positions",
    ("bits per byte",),
    foresee=lambda settings, source="chronicle", length=None: first_texts(settings, source),
)
def run_positions(
    subject: Subject, settings: Settings, source: str = "chronicle", length: int | None = None
) -> Found:
    """Bits per byte of long texts, apart by how far into the document a token stands."""
    size = length or subject.window
    spelled = subject.tokenizer.byte_lengths()
    ends = borders(size)
    records = []
    for name, ids in long_texts(subject, settings, source, size):
        bits, sizes = token_bits(subject, ids), spelled[ids[1:]]
        # The token at place p was predicted from the p before it.
        for start, end in zip([1, *ends], ends):
            inside = slice(start - 1, end - 1)
            weight = float(sizes[inside].sum())
            if weight:
                records.append(
                    Record(
                        f"{name}@{end}", "", "", (),
                        {"bits per byte": float(bits[inside].sum()) / weight}, {"bits per byte": weight},
                        name, {"position": str(end)},
                    )
                )  # fmt: skip
    if not records:
        raise TriviumError(
            f"The task positions found no text of {size} tokens in {source}; give it a smaller `length`."
        )
    return Found(records, style="continue")
