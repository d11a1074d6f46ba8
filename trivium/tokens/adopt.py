"""A tokenizer that has never seen a conversation learns the form of one."""

from __future__ import annotations

import json
from importlib import resources

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from trivium.tokens.tokenizer import Tokenizer

BEGINS, ENDS = "<|im_start|>", "<|im_end|>"


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself if it has a chat template, else with ChatML's, whose two marks it may gain."""
    if tokenizer.templates:
        return tokenizer
    content = json.loads(tokenizer.backend.to_str())
    missing = [mark for mark in (BEGINS, ENDS) if tokenizer.token_id(mark) not in tokenizer.control_ids]
    if missing:
        backend = Backend.from_str(json.dumps(content))
        backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in missing])
        content = json.loads(backend.to_str())
    template = resources.files("trivium.tokens").joinpath("templates/chatml.jinja").read_text("utf-8")
    return Tokenizer(
        content, tokenizer.settings, {"default": template}, sorted(tokenizer.stop_ids), tokenizer.forms
    )
