"""What llama.cpp calls the families, their settings and their tensors, in both directions.

llama.cpp stores some weights in another form: it rotates neighbouring elements of a head in the families it
derives from Llama, so that the rows of queries and keys stand in another order; it stores `1 + weight` of
Gemma's norms; it stacks the matrices of experts. `place_of` says where a tensor of a Hugging Face folder
lies, `to_stored` and `from_stored` convert its values.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig
from trivium.model.positions import inverse_frequencies

Json = dict[str, Any]

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "olmo2": "olmo2", "olmoe": "olmoe", "smollm3": "smollm3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "gpt2": "gpt2",
}  # fmt: skip
"""The architecture under which llama.cpp computes each family."""
NEIGHBOURS = ("llama", "smollm3")
"""Architectures that rotate neighbouring elements of a head together."""
NORMS_PLUS_ONE = ("gemma2", "gemma3")
LEAVES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
}  # fmt: skip
EXPERTS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
_LAYER = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)$")
_EXPERT = re.compile(r"^.*\.experts\.(\d+)\.(\w+)$")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a Hugging Face folder lies in a GGUF file: a tensor, or one expert's part of it."""

    name: str
    expert: int | None = None


def place_of(name: str, config: ModelConfig) -> Place:
    """The place of a tensor named as in a Hugging Face folder."""
    found = _LAYER.match(name)
    if found is None:
        stem, _, kind = name.rpartition(".")
        return Place(f"{TOP[stem]}.{kind}")
    layer, leaf, kind = found.groups()
    if expert := _EXPERT.match(leaf):
        return Place(f"blk.{layer}.{EXPERTS[expert[2]]}.{kind}", int(expert[1]))
    if leaf == "post_attention_layernorm":
        # Before the inner network in most families, behind attention in those with a norm behind it.
        theirs = "post_attention_norm" if config.norm_after else "ffn_norm"
    else:
        theirs = LEAVES[leaf]
    return Place(f"blk.{layer}.{theirs}.{kind}")


def to_stored(name: str, tensor: Tensor, config: ModelConfig, architecture: str) -> Tensor:
    """A tensor of a Hugging Face folder as llama.cpp stores it."""
    if heads := _heads_of(name, config, architecture):
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return _other_form(name, tensor, architecture, 1.0)


def from_stored(name: str, tensor: Tensor, config: ModelConfig, architecture: str) -> Tensor:
    """The inverse of `to_stored`."""
    if heads := _heads_of(name, config, architecture):
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return _other_form(name, tensor, architecture, -1.0)


def _heads_of(name: str, config: ModelConfig, architecture: str) -> int:
    """How many heads a tensor's rows belong to whose order differs; 0 where it does not."""
    if architecture not in NEIGHBOURS:
        return 0
    return {"q_proj": config.heads, "k_proj": config.key_value_heads}.get(name.split(".")[-2], 0)


def _other_form(name: str, tensor: Tensor, architecture: str, one: float) -> Tensor:
    if architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"):
        return tensor.float() + one
    inputs_first = architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.T.contiguous() if inputs_first else tensor


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


class Settings:
    """The settings of a file's architecture, named without it."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata, self.where = metadata, where
        self.architecture = str(metadata.get("general.architecture"))

    def take(self, key: str, *default: Any) -> Any:
        """A setting, its default where the file does not have it."""
        value = self.metadata.get(f"{self.architecture}.{key}", *default)
        if value is None and not default:
            raise TriviumError(f"{self.where} does not say {self.architecture}.{key}: fetch it again.")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise TriviumError(
                    f"{self.where}: {self.architecture}.{key} differs between layers; no family has that."
                )
            value = value[0]
        return _short(value)


def config_of(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> Json:
    """The config.json that a file's metadata and the shapes of its tensors describe."""
    settings = Settings(metadata, where)
    architecture = settings.architecture
    families = {theirs: ours for ours, theirs in reversed(ARCHITECTURES.items())}
    if architecture not in families:
        raise TriviumError(
            f"{where}: architecture {architecture!r} is not supported; {', '.join(families)} are."
        )
    if "token_embd.weight" not in shapes:
        raise TriviumError(f"{where} has no token_embd.weight: it is no whole language model.")
    family = families[architecture]
    if architecture == "llama" and settings.take("expert_count", 0):
        family = "mixtral"
    ids = {
        f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    content: Json = {"model_type": family, **{name: one for name, one in ids.items() if one is not None}}
    content["vocab_size"] = shapes["token_embd.weight"][0]
    content["tie_word_embeddings"] = "output.weight" not in shapes
    if family == "gpt2":
        return content | _gpt2(settings)
    heads, width = settings.take("attention.head_count"), settings.take("embedding_length")
    width_of_heads = settings.take("attention.key_length", None) or settings.take(
        "rope.dimension_count", None
    )
    content |= {
        "hidden_size": width, "num_hidden_layers": settings.take("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": settings.take("attention.head_count_kv", heads),
        "head_dim": width_of_heads or width // heads,
        "intermediate_size": settings.take("feed_forward_length"),
        "max_position_embeddings": settings.take("context_length"),
        "rms_norm_eps": settings.take("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(settings),
    }  # fmt: skip
    if family in ("llama", "qwen3", "olmo2", "olmoe", "qwen3_moe", "smollm3"):
        content["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if family == "llama":
        content["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if family == "smollm3":
        content["no_rope_layer_interval"] = 4
    if family.startswith("gemma"):
        content |= _gemma(settings, content, family)
    if experts := settings.take("expert_count", 0):
        name = "num_local_experts" if family == "mixtral" else "num_experts"
        content |= {name: experts, "num_experts_per_tok": settings.take("expert_used_count")}
        if family == "qwen3_moe":
            inner = settings.take("expert_feed_forward_length")
            content |= {"moe_intermediate_size": inner, "norm_topk_prob": True}
    return content


def _gpt2(settings: Settings) -> Json:
    return {
        "n_embd": settings.take("embedding_length"), "n_layer": settings.take("block_count"),
        "n_head": settings.take("attention.head_count"), "n_inner": settings.take("feed_forward_length"),
        "n_positions": settings.take("context_length"),
        "layer_norm_epsilon": settings.take("attention.layer_norm_epsilon"),
    }  # fmt: skip


def _gemma(settings: Settings, content: Json, family: str) -> Json:
    third = family == "gemma3_text"
    # llama.cpp computes the scale of scores: of the largest models from their width, else from the heads'.
    largest = content["num_hidden_layers"] == (62 if third else 46)
    per_head = content["hidden_size"] // content["num_attention_heads"] if largest else content["head_dim"]
    found: Json = {
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": per_head,
        "sliding_window": settings.take("attention.sliding_window"),
    }  # fmt: skip
    if third:
        rope = content["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": settings.take("rope.freq_base_swa", 10000.0)}
        return found | {
            "sliding_window_pattern": 6, "rope_local_base_freq": local["rope_theta"],
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        }  # fmt: skip
    return found | {
        "attn_logit_softcapping": settings.take("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.take("final_logit_softcapping", 30.0),
    }


def _rope(settings: Settings) -> Json:
    rope: Json = {"rope_type": "default", "rope_theta": settings.take("rope.freq_base", 10000.0)}
    kind = settings.take("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise TriviumError(f"{settings.where}: rope scaling {kind!r} is not read from GGUF; use its folder.")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": settings.take("rope.scaling.factor")}
    if kind == "yarn":
        original = settings.take("rope.scaling.original_context_length", None)
        rope["original_max_position_embeddings"] = original or settings.take("context_length")
    return rope


def with_factors(content: Json, factors: Tensor, where: str) -> Json:
    """The config.json of a Llama 3.1 file, whose scaling stands in a tensor of divisors [head width / 2]."""
    rope = content["rope_parameters"]
    scaled = rope | {
        "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    divisors = rope_factors(scaled, content["head_dim"])
    if factors.shape != divisors.shape or not torch.allclose(factors, divisors, rtol=1e-4):
        raise TriviumError(f"{where}: {ROPE_FACTORS} is not what Llama 3 computes; use the model's folder.")
    return content | {"rope_parameters": scaled}


def rope_factors(rope: Json, head_width: int) -> Tensor:
    """What each pair's frequency is divided by under Llama 3's scaling: [head width / 2]."""
    plain = inverse_frequencies(rope | {"rope_type": "default"}, head_width, 0, 0)
    return plain / inverse_frequencies(rope, head_width, 0, 0)


def metadata_of(config: ModelConfig) -> Json:
    """What a file says of a model; an error where llama.cpp could not compute the same."""
    if config.family not in ARCHITECTURES:
        raise TriviumError(f"GGUF: the family {config.family!r} has no architecture in llama.cpp that fits.")
    name = ARCHITECTURES[config.family]
    _refuse_what_differs(config)
    found: Json = {
        "context_length": config.context, "embedding_length": config.width, "block_count": config.layers,
        "feed_forward_length": config.inner_width, "attention.head_count": config.heads,
        "vocab_size": config.vocabulary,
    }  # fmt: skip
    if name == "gpt2":
        found["attention.layer_norm_epsilon"] = config.norm_epsilon
        return {f"gpt2.{key}": value for key, value in found.items()}
    found |= {
        "attention.head_count_kv": config.key_value_heads,
        "attention.layer_norm_rms_epsilon": config.norm_epsilon,
        "attention.key_length": config.head_width, "attention.value_length": config.head_width,
        "rope.dimension_count": config.head_width, "rope.freq_base": float(config.rope["rope_theta"]),
    }  # fmt: skip
    kind = config.rope["rope_type"]
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(config.rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = config.rope["original_max_position_embeddings"]
    if config.experts is not None:
        found |= {"expert_count": config.experts.count, "expert_used_count": config.experts.per_token}
        if config.family == "qwen3_moe":
            found["expert_feed_forward_length"] = config.experts.inner_width
    if name in NORMS_PLUS_ONE:
        found["attention.sliding_window"] = next(one for one in config.windows if one is not None)
    if config.attention_soft_cap is not None:
        found["attn_logit_softcapping"] = config.attention_soft_cap
    if config.final_soft_cap is not None:
        found["final_logit_softcapping"] = config.final_soft_cap
    return {f"{name}.{key}": value for key, value in found.items()}


def _refuse_what_differs(config: ModelConfig) -> None:
    """Name what of a model llama.cpp would compute otherwise, because it has it in its code."""
    layers, name = range(config.layers), ARCHITECTURES[config.family]
    wrong = ""
    if config.rope["rope_type"] not in ("default", "linear", "yarn", "llama3") and name != "gpt2":
        wrong = f"{config.rope['rope_type']} positions"
    elif set(config.rope) & {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"}:
        wrong = "YaRN with settings of its own"
    elif config.local_rope is not None and config.local_rope["rope_type"] != "default":
        wrong = "scaled positions of windowed layers"
    elif name in NORMS_PLUS_ONE:
        every = 2 if name == "gemma2" else 6
        if any((config.window(i) is not None) != bool((i + 1) % every) for i in layers):
            wrong = "its pattern of windows"
        largest = config.layers == (46 if name == "gemma2" else 62)
        per_head = config.width // config.heads if largest else config.head_width
        if config.attention_scale is not None and abs(config.attention_scale**-2 - per_head) > 1e-3:
            wrong = "its scale of attention scores"
    elif any(config.window(i) is not None and config.window(i) < config.context for i in layers):  # type: ignore[operator]
        wrong = "attention windows"
    elif config.rotates and any(config.rotates_at(i) != bool((i + 1) % 4) for i in layers):
        wrong = "its pattern of layers without positions"
    elif config.experts is not None and config.experts.layers:
        wrong = "layers with and without experts"
    elif config.query_key_value_bias and name not in ("llama", "qwen2", "gpt2"):
        wrong = "biases"
    if wrong:
        raise TriviumError(
            f"GGUF: llama.cpp's architecture {name!r} cannot compute {wrong}; export with --to hf instead."
        )
