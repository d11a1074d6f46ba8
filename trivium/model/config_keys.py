"""Reading a config.json so that nothing in it is overlooked."""

from __future__ import annotations

from typing import Any

from trivium.kit.errors import TriviumError

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
})  # fmt: skip
# Values under which a key changes nothing.
INERT: Json = {
    "partial_rotary_factor": 1.0, "logit_scale": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "scale_attn_weights": True, "rope_interleaved": False,
}  # fmt: skip
NOT_SAVED = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path")


def is_bookkeeping(key: str) -> bool:
    """Whether a key is a name, a path or a version: transformers writes its own with a leading underscore."""
    return key.startswith("_") or key.endswith(("_name_or_path", "_version"))


class Keys:
    """A config.json being read: whoever takes a key has understood it; what is left over is refused."""

    def __init__(self, content: Json, where: str) -> None:
        self.content = dict(content)
        self.where = where
        self.taken = {"model_type"}

    def take(self, key: str, *default: Any) -> Any:
        """The value of a key, its default where the file has none or null."""
        self.taken.add(key)
        value = self.content.get(key)
        if value is not None:
            return value
        if default:
            return default[0]
        raise TriviumError(f"{self.where} has no key {key!r}: restore it from the model's own files.")

    def take_or_null(self, key: str, missing: Any) -> Any:
        """The value of a key whose null means "none", and its default where the file does not have it."""
        self.taken.add(key)
        return self.content.get(key, missing)

    def harmless(self) -> Json:
        """What nobody took, if it changes nothing; otherwise the sentence that names it."""
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
