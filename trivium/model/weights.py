"""Which stored tensor holds which weights, for every family."""

from collections.abc import Iterator
from dataclasses import dataclass

from trivium.model.config import ModelConfig


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: our weights one under the other, turned if the family stores inputs first."""

    name: str
    parts: tuple[str, ...]
    turned: bool = False


NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
    },
}  # fmt: skip
PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """Every tensor of a model's files."""
    return list(gpt2_tensors(config) if config.family == "gpt2" else llama_like_tensors(config))


def matrices(config: ModelConfig) -> list[Stored]:
    """The stored matrices of the projections: what adapters lie on, and what is rounded to few bits."""
    return [
        stored
        for stored in stored_tensors(config)
        if stored.name.endswith(".weight")
        and all(part.startswith("layers.") and "norm" not in part for part in stored.parts)
        and not stored.parts[0].endswith(".router.weight")
    ]


def llama_like_tensors(config: ModelConfig) -> Iterator[Stored]:
    """The names that all families since Llama share."""
    yield Stored("model.embed_tokens.weight", ("embedding.weight",))
    both = config.norm_before and config.norm_after
    place = "both" if both else "before" if config.norm_before else "after"
    for layer in range(config.layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        if config.family == "phi3":
            three = tuple(f"{ours}attention.{part}.weight" for part in ("query", "key", "value"))
            yield Stored(theirs + "self_attn.qkv_proj.weight", three)
        for part, projection in PROJECTIONS.items():
            if config.family == "phi3" and part != "output":
                continue
            name = f"self_attn.{projection}."
            yield Stored(theirs + name + "weight", (f"{ours}attention.{part}.weight",))
            biased = config.attention_output_bias if part == "output" else config.query_key_value_bias
            if biased:
                yield Stored(theirs + name + "bias", (f"{ours}attention.{part}.bias",))
        if config.query_key_norm != "none":
            yield Stored(theirs + "self_attn.q_norm.weight", (ours + "attention.query_norm.weight",))
            yield Stored(theirs + "self_attn.k_norm.weight", (ours + "attention.key_norm.weight",))
        for norm, name in NORMS[place].items():
            yield Stored(f"{theirs}{name}.weight", (f"{ours}{norm}.weight",))
        yield from inner_tensors(config, layer)
    yield Stored("model.norm.weight", ("norm.weight",))
    if not config.tied:
        yield Stored("lm_head.weight", ("head.weight",))


def inner_tensors(config: ModelConfig, layer: int) -> Iterator[Stored]:
    """The inner network of one layer, or its experts."""
    ours, theirs = f"layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    if config.family == "phi3":
        yield Stored(f"{theirs}gate_up_proj.weight", (f"{ours}gate.weight", f"{ours}up.weight"))
        yield Stored(f"{theirs}down_proj.weight", (f"{ours}down.weight",))
        return
    if not config.is_mixture(layer):
        for part, name in names.items():
            yield Stored(f"{theirs}{name}.weight", (f"{ours}{part}.weight",))
            if config.inner_bias:
                yield Stored(f"{theirs}{name}.bias", (f"{ours}{part}.bias",))
        return
    assert config.experts is not None
    if config.family == "mixtral":
        theirs = f"model.layers.{layer}.block_sparse_moe."
        names = {"gate": "w1", "up": "w3", "down": "w2"}
    yield Stored(theirs + "gate.weight", (ours + "router.weight",))
    for expert in range(config.experts.count):
        for part, name in names.items():
            stored = f"{theirs}experts.{expert}.{name}.weight"
            yield Stored(stored, (f"{ours}experts.{expert}.{part}.weight",))


def gpt2_tensors(config: ModelConfig) -> Iterator[Stored]:
    """GPT-2 stores its matrices inputs first, queries, keys and values in one."""
    yield Stored("transformer.wte.weight", ("embedding.weight",))
    yield Stored("transformer.wpe.weight", ("position_embedding.weight",))
    for layer in range(config.layers):
        ours, theirs = f"layers.{layer}.", f"transformer.h.{layer}."
        three = tuple(f"{ours}attention.{part}" for part in ("query", "key", "value"))
        for kind, turned in (("weight", True), ("bias", False)):
            yield Stored(f"{theirs}ln_1.{kind}", (f"{ours}attention_norm.{kind}",))
            yield Stored(f"{theirs}attn.c_attn.{kind}", tuple(f"{part}.{kind}" for part in three), turned)
            yield Stored(f"{theirs}attn.c_proj.{kind}", (f"{ours}attention.output.{kind}",), turned)
            yield Stored(f"{theirs}ln_2.{kind}", (f"{ours}mlp_norm.{kind}",))
            yield Stored(f"{theirs}mlp.c_fc.{kind}", (f"{ours}mlp.up.{kind}",), turned)
            yield Stored(f"{theirs}mlp.c_proj.{kind}", (f"{ours}mlp.down.{kind}",), turned)
    yield Stored("transformer.ln_f.weight", ("norm.weight",))
    yield Stored("transformer.ln_f.bias", ("norm.bias",))
    if not config.tied:
        yield Stored("lm_head.weight", ("head.weight",))
