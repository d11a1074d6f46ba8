"""L9: every family and every kind of position against transformers, forward, backward and on disk."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.experts import Routing
from trivium.model.folder import load_config, load_model, save_model
from trivium.model.weights import stored_tensors

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
HEAD = {"head_dim": 16}
FAMILIES = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-untied": ("GPT2Config", GPT2 | {"n_inner": 40, "activation_function": "gelu",
                                          "tie_word_embeddings": False}),
    "llama": ("LlamaConfig", SHAPE),
    "llama-tied-biased": ("LlamaConfig", SHAPE | HEAD | {"tie_word_embeddings": True, "attention_bias": True,
                                                         "mlp_bias": True, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", SHAPE | HEAD | {"sliding_window": 9}),
    "mistral-no-window": ("MistralConfig", SHAPE | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen2-window": ("Qwen2Config", SHAPE | {"use_sliding_window": True, "sliding_window": 7,
                                             "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", SHAPE | HEAD),
    "qwen3-biased-tied": ("Qwen3Config", SHAPE | HEAD | {"attention_bias": True,
                                                         "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", SHAPE),
    "olmo3": ("Olmo3Config", SHAPE | {"sliding_window": 7}),
    "olmo3-yarn": ("Olmo3Config", SHAPE | {"sliding_window": 9, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "beta_fast": 4.0,
                           "original_max_position_embeddings": 24, "attention_factor": 1.2},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}}),
    "granite": ("GraniteConfig", SHAPE | {"embedding_multiplier": 3.0, "residual_multiplier": 0.7,
                                          "attention_multiplier": 0.2, "logits_scaling": 2.5,
                                          "tie_word_embeddings": True, "attention_bias": True}),
    "granite-plain": ("GraniteConfig", SHAPE | {"mlp_bias": True}),
    "phi3": ("Phi3Config", SHAPE | {"sliding_window": 9}),
    "phi3-longrope": ("Phi3Config", SHAPE | {
        "original_max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
                            "long_factor": [1.0, 1.5, 2.5, 4.0]}}),
    "smollm3": ("SmolLM3Config", SHAPE),
    "smollm3-window": ("SmolLM3Config", SHAPE | {"use_sliding_window": True, "sliding_window": 5}),
    "gemma2": ("Gemma2Config", SHAPE | HEAD | {"sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", SHAPE | HEAD | {"sliding_window": 8, "query_pre_attn_scalar": 16,
                                                   "sliding_window_pattern": 3}),
    "mixtral": ("MixtralConfig", SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", SHAPE | {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3-moe": ("Qwen3MoeConfig", SHAPE | HEAD | {"num_experts": 6, "num_experts_per_tok": 2,
                                                    "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3-moe-sparse": ("Qwen3MoeConfig", SHAPE | HEAD | {"num_experts": 6, "num_experts_per_tok": 2,
                                                           "moe_intermediate_size": 24,
                                                           "mlp_only_layers": [0],
                                                           "decoder_sparse_step": 2}),
}  # fmt: skip
TAKE_ROPES = ["mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma2", "mixtral", "olmoe"]
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 4.0},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 0.7,
                    "mscale_all_dim": 1.2, "truncate": False},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "factor": 4.0,
                 "long_factor": [1.0, 1.5, 2.5, 4.0], "original_max_position_embeddings": 24},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 24},
    "ntk": {"rope_type": "default", "rope_theta": 10000.0 * 4 ** (8 / 6)},
}  # fmt: skip


def reference(config_class: str, arguments: dict, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny transformers model with weights far from their tame initial values."""
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**json.loads(json.dumps(arguments)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def stored_gradients(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """A transformers model's gradients under the names its files use."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def our_stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Our gradients under the names the family's files use."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {}
    for stored in stored_tensors(model.config):
        parts = [gradients[part] for part in stored.parts]
        parts = [torch.zeros_like(model.get_parameter(n)) if g is None else g
                 for n, g in zip(stored.parts, parts, strict=True)]  # fmt: skip
        joined = torch.cat(parts)
        found[stored.name] = joined.T if stored.turned else joined
    return found


def check_against(theirs, folder: Path, lengths: tuple[int, ...]) -> None:
    """Logits, gradients and a round trip of the weights."""
    theirs.save_pretrained(folder / "theirs")
    ours = load_model(folder / "theirs")
    documents = [torch.randint(3, 61, (length,)) for length in lengths]
    expected = torch.cat([theirs(input_ids=document[None]).logits[0] for document in documents])
    found = ours.logits(ours(torch.cat(documents), Documents(lengths)))
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)

    direction = torch.randn_like(expected) / len(expected)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    # Saving may renumber nothing and lose nothing: bit for bit.
    save_model(ours, folder / "ours")
    before = load_file(folder / "theirs" / "model.safetensors")
    after = load_file(folder / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    state, restored = theirs.state_dict(), again.state_dict()
    assert type(again) is type(theirs)
    assert all(torch.equal(state[name], restored[name]) for name in state)
    with torch.no_grad():
        document = documents[-1][None]
        assert torch.equal(again(input_ids=document).logits, theirs(input_ids=document).logits)
    assert load_config(folder / "ours") == load_config(folder / "theirs")

    ours_by_name = our_stored(ours)
    theirs_by_name = stored_gradients(theirs, folder / "gradients")
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, gradient in theirs_by_name.items():
        torch.testing.assert_close(ours_by_name[name], gradient, atol=5e-5, rtol=1e-4, msg=name)


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_agrees_with_transformers(name, tmp_path):
    check_against(reference(*FAMILIES[name]), tmp_path, (17, 5, 17, 1, 33))


@pytest.mark.quick_cases(9)
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_documents_agree_too(name, tmp_path):
    check_against(reference(*FAMILIES[name], seed=1), tmp_path, (24, 24))


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("length", [20, 60, 90])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_agrees_with_transformers(rope, length, tmp_path):
    arguments = SHAPE | {"rope_parameters": {"rope_theta": 10000.0} | ROPES[rope]}
    check_against(reference("LlamaConfig", arguments), tmp_path, (length, length))


@pytest.mark.quick_cases(13)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", TAKE_ROPES)
def test_every_family_takes_every_rope(family, rope, tmp_path):
    config_class, arguments = FAMILIES[family]
    arguments = {**arguments, "rope_parameters": {"rope_theta": 10000.0} | ROPES[rope]}
    if "head_dim" in arguments or family == "mixtral":
        arguments["head_dim"] = 8
    check_against(reference(config_class, arguments), tmp_path, (70,))


def test_gemma3_has_two_ropes(tmp_path):
    config_class, arguments = FAMILIES["gemma3"]
    both = {
        "full_attention": {"rope_theta": 50000.0, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"},
    }
    check_against(reference(config_class, arguments | {"rope_parameters": both}), tmp_path, (40, 30))


def test_documents_of_different_lengths_keep_their_own_dynamic_rope(tmp_path):
    arguments = SHAPE | {"rope_parameters": {"rope_theta": 10000.0} | ROPES["dynamic"]}
    check_against(reference("LlamaConfig", arguments), tmp_path, (100, 20, 80))


def test_old_rope_scaling_is_read(tmp_path):
    theirs = reference("LlamaConfig", SHAPE | {"rope_parameters": {"rope_theta": 5000.0} | ROPES["llama3"]})
    theirs.save_pretrained(tmp_path / "new")
    new = load_config(tmp_path / "new")
    content = json.loads((tmp_path / "new" / "config.json").read_text())
    old = content.pop("rope_parameters")
    content["rope_theta"] = old.pop("rope_theta")
    old["type"] = old.pop("rope_type")
    content["rope_scaling"] = old
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(content))
    assert load_config(tmp_path / "old") == new


def test_balance_loss_is_transformers(tmp_path):
    theirs = reference(*FAMILIES["mixtral"])
    theirs.save_pretrained(tmp_path)
    ours, routing = load_model(tmp_path), Routing()
    document = torch.randint(3, 61, (40,))
    ours(document, Documents([40]), routing=routing)
    expected = theirs(input_ids=document[None], output_router_logits=True).aux_loss
    torch.testing.assert_close(routing.balance_loss(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing.shares().sum(), torch.tensor(1.0))


@pytest.fixture
def saved(tmp_path) -> Path:
    reference("LlamaConfig", SHAPE).save_pretrained(tmp_path)
    return tmp_path


def test_sharded_files_are_read_and_written(tmp_path):
    theirs = reference("LlamaConfig", SHAPE)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = load_model(tmp_path / "theirs")
    save_model(ours, tmp_path / "ours", shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_bfloat16_stays_bfloat16_bit_for_bit(tmp_path):
    theirs = reference("Qwen3Config", SHAPE | HEAD).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.dtype == torch.bfloat16
    save_model(ours, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_model(tmp_path / "theirs", dtype=torch.float32).dtype == torch.float32


def test_missing_tensor_is_named(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(TriviumError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(saved)


def test_unexpected_tensor_is_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(TriviumError, match=r"q_proj\.bias"):
        load_model(saved)


def test_wrong_shape_is_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(TriviumError, match=r"model\.norm\.weight.*\(31,\)"):
        load_model(saved)


def test_truncated_file_is_named(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TriviumError, match=r"model\.safetensors is damaged"):
        load_model(saved)


def test_flipped_bit_is_found(saved, tmp_path):
    save_model(load_model(saved), tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(TriviumError, match="checksum"):
        load_model(tmp_path / "ours")


def test_missing_shard_is_named(tmp_path):
    reference("LlamaConfig", SHAPE).save_pretrained(tmp_path, max_shard_size="20KB")
    gone = min(tmp_path.glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(TriviumError, match=gone.name):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partial_rotary_factor", 0.5), ("logit_scale", 0.25), ("clip_qkv", 8.0),
        ("quantization_config", {"bits": 4}), ("residual_multiplier", 0.2), ("model_type", "mamba"),
        ("hidden_act", "relu6"), ("num_attention_heads", None),
        ("rope_scaling", {"rope_type": "su", "factor": 2.0}), ("rope_scaling", {"rope_type": "yarn"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "mystery": 1}),
        ("model_type", "gpt_oss"), ("model_type", "llama4_text"), ("model_type", "deepseek_v3"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(key, value, saved):
    path = saved / "config.json"
    content = json.loads(path.read_text())
    if key == "rope_scaling":
        del content["rope_parameters"]
    path.write_text(json.dumps(content | {key: value}))
    named = {"rope_scaling": "rope_type|factor|mystery"}.get(key, key)
    with pytest.raises(TriviumError, match=named) as caught:
        load_config(saved)
    assert "config.json" in str(caught.value)


def test_a_choice_the_family_has_no_word_for_is_not_saved(saved, tmp_path):
    model = load_model(saved)
    model.config = model.config.changed(final_soft_cap=30.0)
    with pytest.raises(TriviumError, match="final_soft_cap"):
        save_model(model, tmp_path / "ours")


def test_token_ids_survive(saved, tmp_path):
    save_model(load_model(saved), tmp_path / "ours")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert generation.eos_token_id == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("_model_name_or_path", "someone/model"), ("base_model_name_or_path", "a/b"), ("axolotl_version", "0.9"),
     ("_attn_implementation", "eager")],
)  # fmt: skip
def test_names_paths_and_versions_are_kept_and_change_nothing(key, value, saved, tmp_path):
    before = load_model(saved).state_dict()
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model = load_model(saved)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    save_model(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())[key] == value
