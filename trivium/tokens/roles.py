"""Which token ends a text, which pads, which begins: read from a folder's settings, else known by name."""

from collections.abc import Iterable, Mapping
from typing import Any

ENDS_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
    "[EOS]",
    "<|eos|>",
    "[SEP]",
)
ENDS_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|eot|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_role|>",
)
PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|end_of_text|>", "<|endoftext|>")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def content_of(value: Any) -> str | None:
    """The text of a token that settings give as a string or as an object with a `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, as chat templates see them."""
    found = {name: content_of(settings.get(name)) for name in NAMED}
    return {name: content for name, content in found.items() if content is not None}


def extra_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Further tokens that the settings call special."""
    listed: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(key) or []
        listed += list(value.values()) if isinstance(value, Mapping) else list(value)
    return [content for content in map(content_of, listed) if content is not None]


def first_known(names: Iterable[str], ids: Mapping[str, int]) -> int | None:
    """The id of the first of these names that the tokenizer has."""
    return next((ids[name] for name in names if name in ids), None)
