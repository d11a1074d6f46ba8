"""The families: what their config.json says, in this house's words and back."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from trivium.kit.errors import TriviumError
from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.config_keys import Json, Keys
from trivium.model.positions import checked_rope

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: its names, what it fixes, and the keys that only it has."""

    model_type: str
    architecture: str
    fixed: Json
    """Fields of ModelConfig that are the same for every member."""
    read: Callable[[Keys, Json], None]
    """Fills in the fields that this family's own keys decide."""
    write: Callable[[ModelConfig], Json]
    tied: bool = False
    theta: float = 10000.0
    epsilon: float = 1e-6


def read_rope(keys: Keys, found: Json, theta: float) -> Json:
    """The rope parameters, in the new form or the old one."""
    new, old = keys.take("rope_parameters", {}), keys.take("rope_scaling", {})
    top = keys.take("rope_theta", theta)
    if new and old:
        merged = {**new, **old}
        if any(new.get(key, value) != value for key, value in merged.items() if key in new):
            raise TriviumError(f"{keys.where}: rope_parameters and rope_scaling disagree: keep one of them.")
        new = merged
    rope = dict(new or old)
    rope.setdefault("rope_theta", top)
    if found["family"] == "phi3" and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
        # Its first files named by these what is called longrope today.
        rope.pop("type", None)
        rope["rope_type"] = "longrope"
    original = keys.take("original_max_position_embeddings", 4096 if found["family"] == "phi3" else 0)
    if original and rope.get("rope_type", rope.get("type")) in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = original
    return checked_rope(rope, found["context"], found["head_width"], keys.where)


def read_common(keys: Keys, family: Family) -> Json:
    """The keys that every family but GPT-2 shares."""
    heads, width = keys.take("num_attention_heads"), keys.take("hidden_size")
    activation = keys.take("hidden_act", keys.take("hidden_activation", "silu"))
    if activation not in ACTIVATIONS:
        raise TriviumError(f"{keys.where}: hidden_act {activation!r} is not one of {', '.join(ACTIVATIONS)}.")
    found: Json = {
        "family": family.model_type,
        "vocabulary": keys.take("vocab_size"),
        "width": width,
        "layers": keys.take("num_hidden_layers"),
        "heads": heads,
        "key_value_heads": keys.take("num_key_value_heads", heads),
        "head_width": keys.take("head_dim", width // heads),
        "inner_width": keys.take("intermediate_size"),
        "context": keys.take("max_position_embeddings"),
        "norm_epsilon": keys.take("rms_norm_eps", family.epsilon),
        "activation": ACTIVATIONS[activation],
        "tied": keys.take("tie_word_embeddings", family.tied),
        **family.fixed,
    }
    return found


def write_common(config: ModelConfig) -> Json:
    """The keys that every family but GPT-2 shares."""
    activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation
    content: Json = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.inner_width,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": activation,
        "rope_parameters": dict(config.rope),
        # Readers of the older form (vLLM and converters of their day) look for these two.
        "rope_theta": config.rope["rope_theta"],
    }
    if config.rope["rope_type"] != "default":
        content["rope_scaling"] = dict(config.rope)
    return content


def _read_biases(keys: Keys, found: Json) -> None:
    """`attention_bias` covers all four projections."""
    found["query_key_value_bias"] = found["attention_output_bias"] = keys.take("attention_bias", False)


def _write_biases(config: ModelConfig) -> Json:
    return {"attention_bias": config.query_key_value_bias}


def _read_layer_windows(keys: Keys, found: Json, window: int | None, types: list[str]) -> None:
    """A window for the layers called sliding."""
    types = keys.take("layer_types", types)
    strange = [name for name in types if name not in ("full_attention", "sliding_attention")]
    if strange:
        raise TriviumError(f"{keys.where}: layer_types has {strange[0]!r}, which is not supported.")
    if "sliding_attention" in types and window is not None:
        found["windows"] = tuple(window if name == "sliding_attention" else None for name in types)


def _write_layer_windows(config: ModelConfig) -> Json:
    windows = [config.window(i) for i in range(config.layers)]
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next((window for window in windows if window is not None), None)
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}


def _read_one_window(keys: Keys, found: Json) -> None:
    """One window for all layers."""
    window = keys.take_or_null("sliding_window", 4096 if found["family"] == "mistral" else None)
    if window is not None:
        found["windows"] = (window,) * found["layers"]


def _write_one_window(config: ModelConfig) -> Json:
    return {"sliding_window": config.window(0)}


def _read_llama(keys: Keys, found: Json) -> None:
    _read_biases(keys, found)
    found["inner_bias"] = keys.take("mlp_bias", False)


def _write_llama(config: ModelConfig) -> Json:
    return {**_write_biases(config), "mlp_bias": config.inner_bias}


def _read_qwen2(keys: Keys, found: Json) -> None:
    window = keys.take("sliding_window", None)
    if not keys.take("use_sliding_window", False):
        window = None
    after = keys.take("max_window_layers", 28)
    types = ["sliding_attention" if i >= after else "full_attention" for i in range(found["layers"])]
    _read_layer_windows(keys, found, window, types)


def _read_qwen3(keys: Keys, found: Json) -> None:
    _read_qwen2(keys, found)
    _read_biases(keys, found)


def _write_qwen3(config: ModelConfig) -> Json:
    return {**_write_layer_windows(config), **_write_biases(config)}


def _read_smollm3(keys: Keys, found: Json) -> None:
    _read_llama(keys, found)
    interval, layers = keys.take("no_rope_layer_interval", 4), range(found["layers"])
    rotates = keys.take("no_rope_layers", [int((i + 1) % interval != 0) for i in layers])
    found["rotates"] = tuple(bool(value) for value in rotates)
    window = keys.take("sliding_window", None) if keys.take("use_sliding_window", False) else None
    keys.taken.add("sliding_window")
    types = ["full_attention" if rotating else "sliding_attention" for rotating in found["rotates"]]
    _read_layer_windows(keys, found, window, types)


def _write_smollm3(config: ModelConfig) -> Json:
    rotates = [int(config.rotates_at(i)) for i in range(config.layers)]
    return {**_write_llama(config), **_write_layer_windows(config), "no_rope_layers": rotates}


def _read_olmo3(keys: Keys, found: Json) -> None:
    _read_biases(keys, found)
    types = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(found["layers"])]
    _read_layer_windows(keys, found, keys.take_or_null("sliding_window", 4096), types)


def _write_olmo3(config: ModelConfig) -> Json:
    windows = _write_layer_windows(config)
    del windows["use_sliding_window"]
    return {**_write_biases(config), **windows, **_write_local_rope(config)}


def _read_granite(keys: Keys, found: Json) -> None:
    _read_llama(keys, found)
    found["embedding_scale"] = float(keys.take("embedding_multiplier", 1.0))
    found["residual_scale"] = float(keys.take("residual_multiplier", 1.0))
    found["attention_scale"] = float(keys.take("attention_multiplier", 1.0))
    found["logit_divisor"] = float(keys.take("logits_scaling", 1.0))


def _write_granite(config: ModelConfig) -> Json:
    return {
        **_write_llama(config), "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale, "attention_multiplier": config.score_scale,
        "logits_scaling": config.logit_divisor,
    }  # fmt: skip


def _write_phi3(config: ModelConfig) -> Json:
    original = config.rope.get("original_max_position_embeddings", config.context)
    return {**_write_one_window(config), "original_max_position_embeddings": original}


def _read_gemma(keys: Keys, found: Json) -> None:
    _read_biases(keys, found)
    found["embedding_scale"] = found["width"] ** 0.5
    found["attention_scale"] = keys.take("query_pre_attn_scalar", 256) ** -0.5
    third = found["family"] == "gemma3_text"
    found["attention_soft_cap"] = keys.take_or_null("attn_logit_softcapping", None if third else 50.0)
    found["final_soft_cap"] = keys.take_or_null("final_logit_softcapping", None if third else 30.0)
    every = keys.take("sliding_window_pattern", 6) if third else 2
    types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(found["layers"])]
    _read_layer_windows(keys, found, keys.take_or_null("sliding_window", 4096), types)


def _write_gemma(config: ModelConfig) -> Json:
    windows = _write_layer_windows(config)
    del windows["use_sliding_window"]
    scalar = (config.attention_scale or config.score_scale) ** -2
    activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation
    content = {
        **_write_biases(config), **windows, "hidden_activation": activation,
        "query_pre_attn_scalar": round(scalar), "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.final_soft_cap,
    }  # fmt: skip
    if config.family == "gemma3_text":
        content |= _write_local_rope(config)
        content["rope_local_base_freq"] = content["rope_parameters"]["sliding_attention"]["rope_theta"]
    return content


def _write_local_rope(config: ModelConfig) -> Json:
    local = config.local_rope or config.rope
    return {"rope_parameters": {"full_attention": dict(config.rope), "sliding_attention": dict(local)}}


def _read_mixtral(keys: Keys, found: Json) -> None:
    _read_one_window(keys, found)
    found["experts"] = ExpertsConfig(
        count=keys.take("num_local_experts", keys.checked("num_experts") or 8),
        per_token=keys.take("num_experts_per_tok", 2),
        inner_width=found["inner_width"],
        balance=keys.take("router_aux_loss_coef", 0.001),
    )


def _read_picked_experts(keys: Keys, found: Json) -> None:
    """What OLMoE and Qwen3-MoE say about their experts alike."""
    found["experts"] = ExpertsConfig(
        count=keys.take("num_experts", keys.checked("num_local_experts") or 64),
        per_token=keys.take("num_experts_per_tok", 8),
        inner_width=keys.take("moe_intermediate_size", found["inner_width"]),
        normalise=keys.take("norm_topk_prob", False),
        balance=keys.take("router_aux_loss_coef", 0.001),
    )
    keys.taken.add("num_local_experts")


def _read_olmoe(keys: Keys, found: Json) -> None:
    _read_biases(keys, found)
    _read_picked_experts(keys, found)


def _read_qwen3_moe(keys: Keys, found: Json) -> None:
    _read_biases(keys, found)
    if keys.take("use_sliding_window", False):
        _read_one_window(keys, found)
    keys.taken.add("sliding_window")
    _read_picked_experts(keys, found)
    step, plain = keys.take("decoder_sparse_step", 1), keys.take("mlp_only_layers", [])
    mixtures = tuple(i not in plain and (i + 1) % step == 0 for i in range(found["layers"]))
    if not all(mixtures):
        found["experts"] = replace(found["experts"], layers=mixtures)


def _write_experts(config: ModelConfig) -> Json:
    experts = config.experts
    assert experts is not None
    plain = [i for i in range(config.layers) if not config.is_mixture(i)]
    content: Json = {"num_experts_per_tok": experts.per_token, "router_aux_loss_coef": experts.balance}
    if config.family == "mixtral":
        return content | {"num_local_experts": experts.count} | _write_one_window(config)
    content |= {"num_experts": experts.count, "norm_topk_prob": experts.normalise} | _write_biases(config)
    if config.family == "qwen3_moe":
        content |= {
            "moe_intermediate_size": experts.inner_width, "decoder_sparse_step": 1, "mlp_only_layers": plain,
            "use_sliding_window": config.window(0) is not None, **_write_one_window(config),
        }  # fmt: skip
    return content


def _read_gpt2(keys: Keys) -> Json:
    """GPT-2 has its own name for everything."""
    width = keys.take("n_embd")
    activation = keys.take("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise TriviumError(f"{keys.where}: activation_function {activation!r} is not supported.")
    return {
        "family": "gpt2", "vocabulary": keys.take("vocab_size"), "width": width,
        "layers": keys.take("n_layer"), "heads": keys.take("n_head"),
        "inner_width": keys.take("n_inner", 4 * width), "context": keys.take("n_positions"),
        "norm": "layer", "norm_epsilon": keys.take("layer_norm_epsilon", 1e-5),
        "activation": ACTIVATIONS[activation], "gated": False, "query_key_value_bias": True,
        "attention_output_bias": True, "inner_bias": True, "tied": keys.take("tie_word_embeddings", True),
        "positions": "learned",
    }  # fmt: skip


def _write_gpt2(config: ModelConfig) -> Json:
    activation = {"gelu_tanh": "gelu_new"}.get(config.activation, config.activation)
    return {
        "vocab_size": config.vocabulary, "n_embd": config.width, "n_layer": config.layers,
        "n_head": config.heads, "n_inner": config.inner_width, "n_positions": config.context,
        "layer_norm_epsilon": config.norm_epsilon, "activation_function": activation,
        "tie_word_embeddings": config.tied, "scale_attn_weights": True,
    }  # fmt: skip


GEMMA = {"norm_plus_one": True, "norm_after": True, "activation": "gelu_tanh"}
OLMO = {"query_key_norm": "full", "norm_before": False, "norm_after": True}
PER_HEAD, OVER_ALL = {"query_key_norm": "head"}, {"query_key_norm": "full"}
BIASED = {"query_key_value_bias": True}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("gpt2", "GPT2LMHeadModel", {}, lambda keys, found: None, _write_gpt2, tied=True),
        Family("llama", "LlamaForCausalLM", {}, _read_llama, _write_llama),
        Family("mistral", "MistralForCausalLM", {}, _read_one_window, _write_one_window),
        Family("qwen2", "Qwen2ForCausalLM", BIASED, _read_qwen2, _write_layer_windows),
        Family("qwen3", "Qwen3ForCausalLM", PER_HEAD, _read_qwen3, _write_qwen3),
        Family("olmo2", "Olmo2ForCausalLM", OLMO, _read_biases, _write_biases, epsilon=1e-5),
        Family("olmo3", "Olmo3ForCausalLM", OLMO, _read_olmo3, _write_olmo3, theta=5e5, epsilon=1e-5),
        Family("granite", "GraniteForCausalLM", {}, _read_granite, _write_granite),
        Family("phi3", "Phi3ForCausalLM", {}, _read_one_window, _write_phi3, epsilon=1e-5),
        Family("smollm3", "SmolLM3ForCausalLM", {}, _read_smollm3, _write_smollm3, True, theta=2e6),
        Family("gemma2", "Gemma2ForCausalLM", GEMMA, _read_gemma, _write_gemma, tied=True),
        Family(
            "gemma3_text", "Gemma3ForCausalLM", GEMMA | PER_HEAD, _read_gemma, _write_gemma, True, theta=1e6
        ),
        Family("mixtral", "MixtralForCausalLM", {}, _read_mixtral, _write_experts, theta=1e6, epsilon=1e-5),
        Family("olmoe", "OlmoeForCausalLM", OVER_ALL, _read_olmoe, _write_experts, epsilon=1e-5),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", PER_HEAD, _read_qwen3_moe, _write_experts),
    )
}


def read_local_rope(keys: Keys, found: Json, family: Family) -> None:
    """Gemma 3 and OLMo 3 turn their windowed layers by a rope of their own."""
    nested = keys.take("rope_parameters", {})
    scaling, theta = keys.take("rope_scaling", {}), keys.take("rope_theta", family.theta)
    local_theta = theta if found["family"] == "olmo3" else keys.take("rope_local_base_freq", 10000.0)
    inside = {name: nested.get(name) or {} for name in ("full_attention", "sliding_attention")}
    if not all(isinstance(one, dict) for one in inside.values()):
        raise TriviumError(f"{keys.where}: rope_parameters has to hold an object for each kind of layer.")
    full = {"rope_theta": theta} | inside["full_attention"] | scaling
    local = {"rope_theta": local_theta} | inside["sliding_attention"]
    found["rope"] = checked_rope(full, found["context"], found["head_width"], keys.where)
    found["local_rope"] = checked_rope(local, found["context"], found["head_width"], keys.where)


_LATENT = "its keys and values are compressed to a latent vector"
LEFT_OUT = {
    "gpt_oss": "its attention has sinks, and its experts biases and a clamp",
    "llama4_text": "its attention is chunked, its queries grow with the position, its experts share a layer",
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "qwen3_next": "most of its layers are recurrent",
    "phi4_multimodal": "its text is behind adapters for each modality",
}
"""Families that people ask for and that the one decoder does not compute, with what it lacks."""


def read_config(content: Json, where: str = "config.json") -> ModelConfig:
    """The model that a config.json describes; a key that is not understood is an error."""
    keys = Keys(content, where)
    name = keys.take("model_type")
    if name not in FAMILIES:
        why = LEFT_OUT.get(name)
        raise TriviumError(
            f"{where}: model_type {name!r} is not supported{f' ({why})' if why else ''}; "
            f"{', '.join(FAMILIES)} are."
        )
    family = FAMILIES[name]
    if name == "gpt2":
        found = _read_gpt2(keys)
    else:
        found = read_common(keys, family)
        if name in ("gemma3_text", "olmo3"):
            read_local_rope(keys, found, family)
        else:
            found["rope"] = read_rope(keys, found, family.theta)
        family.read(keys, found)
    return ModelConfig(**found, extra=keys.harmless())


def write_config(config: ModelConfig) -> Json:
    """The config.json of a model; an error if its family has no word for one of the model's choices."""
    if config.family not in FAMILIES:
        raise TriviumError(f"The family {config.family!r} is not one of {', '.join(FAMILIES)}.")
    family = FAMILIES[config.family]
    content = {"architectures": [family.architecture], "model_type": family.model_type, **config.extra}
    if config.family != "gpt2":
        content |= write_common(config)
    content |= family.write(config)
    again = read_config(content, "the model's config.json")
    for field in fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.name == "rope" and config.positions == "rope":
            ours = checked_rope(ours, config.context, config.head_width, "the model's rope")
        if field.name not in ("extra", "windows", "rotates") and ours != theirs:
            raise TriviumError(
                f"The family {config.family!r} cannot say {field.name} = {ours!r} in a config.json "
                f"(it would be read as {theirs!r}): choose another family."
            )
    for layer in range(config.layers):
        if (config.window(layer), config.rotates_at(layer)) != (again.window(layer), again.rotates_at(layer)):
            raise TriviumError(f"The family {config.family!r} cannot say how layer {layer} sees and rotates.")
    return content
