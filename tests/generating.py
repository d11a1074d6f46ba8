"""A tiny tokenizer and tiny random models for the engine's tests."""

from functools import cache

import pytest
import torch

from trivium.generate.engine import Engine
from trivium.generate.exactness import BIT_EXACT
from trivium.generate.requests import Completion
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.transformer import Transformer
from trivium.tokens.train import train_tokenizer

TEXTS = [
    f"the town of number {i} has a baker, a smith and {i} doves; its bell rings at {i % 12}."
    for i in range(150)
]


@cache
def tokenizer():
    return train_tokenizer(TEXTS, 380)


def tiny_model(seed=0, scale=0.2, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocabulary": tokenizer().vocabulary_size,
        "width": 64,
        "layers": 3,
        "heads": 4,
        "key_value_heads": 2,
        "head_width": 16,
        "inner_width": 96,
        "context": 512,
        "query_key_norm": "head",
    }
    model = Transformer(ModelConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def tiny_engine(*, rows=32, budget=None, seed=0, **changes):
    return Engine(tiny_model(**changes), tokenizer(), max_rows=rows, memory_budget=budget, seed=seed)


def prompt(length, seed=0, vocabulary=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        10, vocabulary or tokenizer().vocabulary_size, (length,), generator=generator
    ).tolist()


def assert_as_promised(engine, found, expected):
    """Completions, or lists of log-probabilities, agree as closely as the engine promises."""
    if engine.exactness.promise == BIT_EXACT:
        assert found == expected
    else:
        assert_close_enough(found, expected)


def assert_close_enough(found, expected):
    """The same tokens, and log-probabilities within 1e-5."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Completion):
            assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
            one, other = one.logprobs, other.logprobs
        assert one == pytest.approx(other, abs=1e-5)


@torch.no_grad()
def whole_logits(model, tokens):
    return model.logits(model(torch.tensor(tokens), Documents([len(tokens)])))
