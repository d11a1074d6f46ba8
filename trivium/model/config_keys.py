"""Reading a config.json so that nothing in it is overlooked."""

from typing import Any

from trivium.kit.errors import TriviumError
from trivium.model.config import LARGEST

Json = dict[str, Any]

# Keys that say nothing about the computation of logits; they are kept and written back.
HARMLESS = frozenset({
    "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "tokenizer_class", "use_cache", "cache_implementation", "initializer_range",
    "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "embedding_dropout",
    "pretraining_tp", "max_window_layers", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "output_router_logits", "router_jitter_noise",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "n_ctx",
    "no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern", "use_bfloat16",
    "unsloth_version", "unsloth_fixed", "reorder_and_upcast_attn", "is_encoder_decoder", "_commit_hash",
    "classifier_dropout", "step_separator",
})  # fmt: skip
# Values under which a key changes nothing.
INERT: Json = {
    "partial_rotary_factor": 1.0, "logit_scale": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "scale_attn_weights": True, "rope_interleaved": False,
}  # fmt: skip
WHOLE = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "original_max_position_embeddings",
    "sliding_window", "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "decoder_sparse_step", "n_embd", "n_layer", "n_head", "n_inner", "n_positions",
})  # fmt: skip
NUMBERS = frozenset({
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "router_aux_loss_coef", "layer_norm_epsilon", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "logits_scaling",
})  # fmt: skip
TRUTHS = frozenset({
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob",
})  # fmt: skip
TEXTS = frozenset({"model_type", "hidden_act", "hidden_activation", "activation_function"})
LISTS = {"layer_types": str, "no_rope_layers": int, "mlp_only_layers": int}
OBJECTS = frozenset({"rope_parameters", "rope_scaling"})
MAY_BE_NOTHING = frozenset({"max_window_layers", "router_aux_loss_coef"})
MOST = 2**30
NOT_SAVED = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path")


def is_bookkeeping(key: str) -> bool:
    """Whether a key is a name, a path or a version: transformers writes its own with a leading underscore."""
    return key.startswith("_") or key.endswith(("_name_or_path", "_version"))


class Keys:
    """A config.json being read: a key that is taken is understood; what is left over is refused."""

    def __init__(self, content: Json, where: str) -> None:
        self.content = dict(content)
        self.where = where
        self.taken = {"model_type"}

    def take(self, key: str, *default: Any) -> Any:
        """The value of a key, its default where the file has none or null."""
        self.taken.add(key)
        value = self.checked(key)
        if value is not None:
            return value
        if default:
            return default[0]
        raise TriviumError(f"{self.where} has no key {key!r}: restore it from the model's own files.")

    def take_or_null(self, key: str, missing: Any) -> Any:
        """The value of a key whose null means "none", and its default where the file does not have it."""
        self.taken.add(key)
        return self.checked(key) if key in self.content else missing

    def checked(self, key: str) -> Any:
        """The value of a key, None where there is none; refused where it is not of the kind it has to be."""
        value = self.content.get(key)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_above = is_number and 0 <= value < 1e30 and (value > 0 or key in MAY_BE_NOTHING)
        # As many layers as a number says are listed one by one before the model's config is checked.
        most = LARGEST["layers"] if key in ("num_hidden_layers", "n_layer") else MOST
        kinds = {
            f"a whole number from 1 to {most:,}": (
                WHOLE,
                is_above and isinstance(value, int) and value <= most,
            ),
            "a number above 0": (NUMBERS, is_above),
            "true or false": (TRUTHS, isinstance(value, bool)),
            "a text": (TEXTS, isinstance(value, str)),
            "an object": (OBJECTS, isinstance(value, dict)),
            "a list of such": (
                LISTS,
                isinstance(value, list) and all(isinstance(one, LISTS.get(key, object)) for one in value),
            ),
        }
        for kind, (keys, is_so) in kinds.items():
            if key in keys and not is_so:
                shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
                raise TriviumError(f"{self.where}: {key} is {shown}, but has to be {kind}.")
        return value

    def harmless(self) -> Json:
        """What was not taken, if it changes nothing; otherwise the sentence that names it."""
        kept = {}
        for key, value in self.content.items():
            if key in self.taken:
                continue
            if key in HARMLESS or is_bookkeeping(key):
                if key not in NOT_SAVED:
                    kept[key] = value
            elif not (value in (None, False, {}, []) or (key in INERT and value == INERT[key])):
                raise TriviumError(
                    f"{self.where}: {key} = {value!r} changes the computation in a way this model does "
                    "not support; remove the key only if you know it has no effect."
                )
        return kept
