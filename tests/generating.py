"""A tiny tokenizer and tiny random models for the engine's tests."""

from functools import cache

import torch

from trivium.generate.engine import Engine
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


@torch.no_grad()
def whole_logits(model, tokens):
    return model.logits(model(torch.tensor(tokens), Documents([len(tokens)])))
