"""Train a byte-level BPE vocabulary on text."""

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Literal

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from trivium.kit.errors import TriviumError
from trivium.tokens.tokenizer import Tokenizer

END_OF_TEXT, TURN_STARTS, TURN_ENDS, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_STARTS, TURN_ENDS, PAD)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SMALLEST = 256 + len(CONTROL_TOKENS) + len(TAGS)
"""The least vocabulary: every byte, and what conversations are written with."""

Digits = Literal["single", "triples", "free"]
_NUMBERS: dict[str, str] = {"single": r"\p{N}", "triples": r"\p{N}{1,3}", "free": r" ?\p{N}+"}


def splitting(digits: Digits) -> str:
    """Where words end: contractions, letters with one sign before them, numbers, signs, line ends, spaces."""
    return "|".join(
        [
            r"(?i:'(?:[sdmt]|ll|ve|re))",
            r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}]*",
            _NUMBERS[digits],
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


def chatml() -> str:
    """The chat template that new tokenizers carry."""
    return resources.files("trivium.tokens").joinpath("templates/chatml.jinja").read_text(encoding="utf-8")


def train_tokenizer(
    texts: Iterable[str],
    vocabulary: int,
    *,
    digits: Digits = "single",
    control_tokens: Sequence[str] = CONTROL_TOKENS,
    tags: Sequence[str] = TAGS,
) -> Tokenizer:
    """Learn merges from texts; the result has at most `vocabulary` ids and loses no text."""
    smallest = 256 + len(control_tokens) + len(tags)
    if vocabulary < smallest:
        raise TriviumError(
            f"A vocabulary of {vocabulary} is too small: 256 bytes and {len(control_tokens) + len(tags)} "
            f"control tokens and tags need {smallest}."
        )
    for needed in CONTROL_TOKENS:
        if needed not in control_tokens:
            raise TriviumError(f"`control_tokens` lacks {needed}, which the chat template writes; add it.")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(splitting(digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(tags),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in control_tokens],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_ENDS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.loads(backend.to_str()), settings, {"default": chatml()})
