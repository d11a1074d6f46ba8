"""Tiny models with random weights and a real tokenizer, and GGUF files of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

VOCABULARY = 288
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
HEAD = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "llama3": ("LlamaConfig", SHAPE | {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
    "mistral": ("MistralConfig", SHAPE | HEAD | {"sliding_window": None}),
    "mixtral": ("MixtralConfig", SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 128}),
    "qwen3-yarn": ("Qwen3Config", SHAPE | HEAD | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "qwen3-moe": ("Qwen3MoeConfig", SHAPE | HEAD | EXPERTS | {"moe_intermediate_size": 64,
                                                              "norm_topk_prob": True}),
    "olmo2": ("Olmo2Config", SHAPE),
    "olmoe": ("OlmoeConfig", SHAPE | EXPERTS | {"num_key_value_heads": 4}),
    "smollm3": ("SmolLM3Config", SHAPE | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", SHAPE | HEAD | {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", SHAPE | HEAD | {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4,
                            "n_positions": 1024}),
}  # fmt: skip


@cache
def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with control tokens and a chat template."""
    texts = ["the cat sat on the mat and the dog ran to the house 12 34 times"] * 20
    return train_tokenizer(texts, VOCABULARY - 8)


def folder_of(family: str, folder: Path, seed: int = 0) -> Any:
    """A tiny model of a family as transformers writes it, with our tokenizer beside it; the model itself."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.normal_(std=0.1, generator=generator)
    model.save_pretrained(folder)
    tokenizer().save(folder)
    return model
