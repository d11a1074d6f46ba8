"""A tokenizer that has never seen a conversation learns the form of one."""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from trivium.kit.errors import TriviumError
from trivium.tokens import codebook
from trivium.tokens.tokenizer import Tokenizer

PLACEHOLDER = "<image>"
"""What a LLaVA's template writes for a picture."""
BEGINS, ENDS = "<|im_start|>", "<|im_end|>"


def with_chat_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself if it has a chat template, else with ChatML's, whose two marks it may gain."""
    if tokenizer.templates:
        return tokenizer
    content = _with_control(tokenizer, (BEGINS, ENDS))
    template = resources.files("trivium.tokens").joinpath("templates/chatml.jinja").read_text("utf-8")
    return Tokenizer(
        content, tokenizer.settings, {"default": template}, sorted(tokenizer.stop_ids), tokenizer.forms
    )


def _with_control(tokenizer: Tokenizer, marks: Sequence[str]) -> dict[str, Any]:
    """The tokenizer's file with these control tokens, those that it lacks added behind its others."""
    content: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    missing = [mark for mark in marks if tokenizer.token_id(mark) not in tokenizer.control_ids]
    if not missing:
        return content
    backend = Backend.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in missing])
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def with_codes(tokenizer: Tokenizer, codes: int) -> Tokenizer:
    """The tokenizer with the marks around a picture and so many codes behind its other tokens."""
    names = codebook.names_of(codes)
    if any(tokenizer.token_id(name) is not None for name in names):
        raise TriviumError("The model's tokenizer has codes of pictures already: go on in an `sft` stage.")
    return Tokenizer(
        _with_control(tokenizer, names),
        tokenizer.settings,
        tokenizer.templates,
        sorted(tokenizer.stop_ids),
        tokenizer.forms,
    )


_TEXTS = (
    "{%- set content = message.content | selectattr('text', 'defined') | map(attribute='text') | join('') %}"
)
_PARTS = (
    "{%- set parts = namespace(text='') %}{%- for part in message.content %}"
    "{%- set parts.text = parts.text + ('<image>' if part.type == 'image' else part.text or '') %}"
    "{%- endfor %}{%- set content = parts.text %}"
)


def with_placeholder(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself if its template writes LLaVA's placeholder, else with it, in ChatML."""
    own = tokenizer.token_id(PLACEHOLDER) in tokenizer.control_ids
    if own and any(PLACEHOLDER in template for template in tokenizer.templates.values()):
        return tokenizer
    template = tokenizer.templates.get("default", "")
    if _TEXTS not in template:
        raise TriviumError(
            f"The model's chat template has no place for {PLACEHOLDER}; only the ChatML of Trivium has."
        )
    content = _with_control(tokenizer, (PLACEHOLDER,))
    changed = {**tokenizer.templates, "default": template.replace(_TEXTS, _PARTS)}
    return Tokenizer(content, tokenizer.settings, changed, sorted(tokenizer.stop_ids), tokenizer.forms)
