"""Model folders of others: whatever is in them, a model or one sentence; no file elsewhere is read."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_limits import ROOM, within
from test_model_families import GPT2, HEAD, SHAPE
from tuning import save, small_model, tokenizer_of

import trivium
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, save_tensors, write_json
from trivium.model import hub
from trivium.model.adapters import load_adapter, save_adapter
from trivium.model.config import ModelConfig
from trivium.model.families import FAMILIES, read_config
from trivium.model.folder import load_config, load_model, save_model
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.scalar_head import ScalarHead, load_reward_model, save_reward_model, without_language_head
from trivium.tokens.tokenizer import Tokenizer

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**400, 0.0, 0.5, 1e308, float("nan"), float("inf"), "", "x", "8",
    [], [1], ["x"], [None], {}, {"a": 1}, [[]], "\ud800", {"full_attention": 5}, {"rope_type": "yarn"},
    {"rope_type": "yarn", "factor": "x"}, {"rope_type": [], "factor": 1.0}, {"type": "linear", "factor": 0},
    {"rope_type": "longrope", "short_factor": 1, "long_factor": "x"}, {"rope_type": "dynamic"},
    {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1}, {"rope_theta": 1},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}, {"rope_type": "linear", "factor": -1.0},
]  # fmt: skip
CONTENTS = {
    name: GPT2 | {"model_type": name} if name == "gpt2" else SHAPE | HEAD | {"model_type": name}
    for name in FAMILIES
}
FURTHER = [
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window", "layer_types",
    "use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers", "router_aux_loss_coef", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_epsilon", "n_inner",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window_pattern",
    "original_max_position_embeddings", "quantization_config", "architectures", "unheard_of",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in several files and its tokenizer."""
    tokenizer = tokenizer_of("own")
    place = save(tmp_path / "model", small_model(tokenizer), tokenizer)
    save_model(load_model(place), place, shard_bytes=20_000)
    (place / "model.safetensors").unlink()
    return place


MAY_SAY_NOTHING = ("tokenizer_config.json", "generation_config.json")
"""Without these a folder is as good as with them, and some of what may be in them is of no interest."""


def both(folder: Path) -> None:
    """Open the model and its tokenizer."""
    load_model(folder)
    Tokenizer.load(folder)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_config_may_be_anything(family: str) -> None:
    """A model or a sentence, and nothing that is as long as a number in the file says."""
    content = CONTENTS[family]
    read_config(content, "there/config.json")
    refused = 0
    for key in {*content, *FURTHER}:
        for value in ODD:
            with suppress(TriviumError):
                read_config({**content, key: value}, "there/config.json")
                continue
            refused += 1
    assert refused > 300


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "num_hidden_layers",
            10**9,
            "num_hidden_layers is 1000000000, but has to be a whole number from 1 to 1,000",
        ),
        ("vocab_size", 10**12, "vocab_size is 1000000000000, but has to be a whole number"),
        ("vocab_size", 2**24, "has the shape .* but config.json asks for"),
        ("vocab_size", "61", "vocab_size is '61', but has to be a whole number from 1 to"),
        ("hidden_size", 2**20, "has the shape .* but config.json asks for"),
        ("intermediate_size", 2**24, "has the shape .* but config.json asks for"),
        ("num_attention_heads", 0, "num_attention_heads is 0, but has to be"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan, but has to be a number"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no', but has to be true or false"),
        ("quantization_config", "int4", "quantization_config"),
        ("num_hidden_layers", 900, "have no tensor"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_room_is_made(
    key: str, value: Any, said: str, folder: Path
) -> None:
    change(folder / "config.json", **{key: value})
    found = within(ROOM, lambda: load_model(folder))
    assert found.startswith("TriviumError: ")
    with pytest.raises(TriviumError, match=said):
        load_model(folder)


def test_experts_without_end_are_refused() -> None:
    content = CONTENTS["mixtral"] | {"num_local_experts": 10**6, "num_hidden_layers": 1000}
    with pytest.raises(TriviumError, match="1,000,000 experts in each of 1000 layers"):
        read_config(content)


def test_a_recipe_may_not_ask_for_more_either() -> None:
    with pytest.raises(TriviumError, match="layers is 100,000: no model has more than 1,000"):
        ModelConfig(vocabulary=8, width=8, layers=100_000, heads=1, inner_width=8, context=8)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/hostname", "a/b.safetensors", "..", ".", "", "model.bin", "a\0b", 5, None,
     ["x"], "..\\x.safetensors"],
)  # fmt: skip
def test_an_index_names_only_files_beside_it(name: Any, folder: Path) -> None:
    """A folder that is trusted with nothing does not make another file of this machine a part of a model."""
    shutil.copy(next(folder.glob("model-*.safetensors")), folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=names | {"model.norm.weight": name})
    with pytest.raises(TriviumError, match=r"model\.safetensors\.index\.json names"):
        load_model(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "", "\xff"])
def test_an_index_without_a_map_is_named(content: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(TriviumError, match=r"model\.safetensors\.index\.json"):
        load_model(folder)


@pytest.mark.quick_cases(18)
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"1" * 5000,
     b'{"model_type": []}', b'{"model": {}}', b'{"model": {"type": "BPE"}}', b'{"eos_token_id": "x"}',
     b'{"chat_template": [5]}', b'{"chat_template": [{"name": 5, "template": 5}]}',
     b'{"eos_token_id": [2, null]}',
     b'{"added_tokens": 5, "model": {"type": "BPE", "vocab": {}, "merges": []}}'],
)  # fmt: skip
def test_a_file_of_the_folder_that_is_something_else_is_named(
    name: str, content: bytes, folder: Path
) -> None:
    (folder / name).write_bytes(content)
    said = str(folder)
    with suppress(TriviumError) if name in MAY_SAY_NOTHING else pytest.raises(TriviumError, match=said):
        both(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_what_is_no_file_at_all_is_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(TriviumError):
        both(folder)


def test_a_token_with_an_id_of_billions_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far"] = 2**32 - 1
    path.write_text(json.dumps(content))
    with pytest.raises(TriviumError, match="from 1 to 16,777,216 tokens"):
        Tokenizer.load(folder)


def test_weights_of_whole_numbers_are_refused_wherever_they_are(folder: Path) -> None:
    path = next(folder.glob("model-*.safetensors"))
    tensors = load_tensors(path)
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last].to(torch.int32)
    save_tensors(path, tensors)
    with pytest.raises(TriviumError, match="weights of type I32 are not read"):
        load_model(folder)


def adapter(tmp_path: Path, base: str, model: Any) -> Path:
    """A folder that holds an adapter to `base` alone, with the config of the model."""
    add_adapter(model, AdapterSettings(rank=2), seed=1)
    place = tmp_path / "tuned"
    save_model(model, place, weights=False)
    save_adapter(model, place / "adapter", base=base)
    return place


def test_the_base_of_an_adapter_is_not_fetched_unasked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(repository: str, **options: Any) -> str:
        asked.append(options["local_files_only"])
        if options["local_files_only"] and len(asked) == 1:
            raise OSError("not in the cache")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    place = adapter(tmp_path, "somebody/something", load_model(folder))
    with pytest.raises(TriviumError, match="an adapter to somebody/something, which is not on this machine"):
        load_model(place)
    assert asked == [True]
    # Once a person has fetched it, it is used; and what a person names is fetched.
    load_model(place)
    hub.resolve("somebody/something")
    assert asked == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": ["x"]}, "names no base model"),
        ({"base_model_name_or_path": "a/../../b"}, "neither a folder nor an id"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', no number"),
        ({"lora_alpha": None}, "lora_alpha is None, no number"),
        ({"lora_alpha": float("nan")}, "no number"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": [1]}, "alpha_pattern is no object"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "not simple enough"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "not simple enough"),
        ({"alpha_pattern": {"[": 1}}, "is none"),
        ({"peft_type": ["LORA"]}, "are not read; LORA is"),
    ],
)
def test_odd_settings_of_an_adapter_are_named(
    changes: dict[str, Any], said: str | None, folder: Path, tmp_path: Path
) -> None:
    place = adapter(tmp_path, str(folder), load_model(folder))
    change(place / "adapter" / "adapter_config.json", **changes)
    if said is None:
        load_model(place)
        return
    with pytest.raises(TriviumError, match=said):
        load_model(place)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("lora_B", None), ("lora_A", torch.zeros(())), ("lora_A", torch.zeros(0, 8)),
        ("lora_B", torch.zeros(3)),
        ("lora_A", torch.zeros(2, 3)), ("lora_magnitude_vector", torch.zeros(3)),
    ],
)  # fmt: skip
def test_matrices_of_an_adapter_that_do_not_fit_are_named(
    name: str, tensor: torch.Tensor | None, folder: Path, tmp_path: Path
) -> None:
    model = load_model(folder)
    place = adapter(tmp_path, str(folder), model) / "adapter"
    tensors = load_tensors(place / "adapter_model.safetensors")
    first = next(key for key in tensors if "lora_A" in key).partition("lora_A")[0]
    key = first + name + ("" if name.endswith("vector") else ".weight")
    tensors.pop(key, None)
    save_tensors(place / "adapter_model.safetensors", tensors if tensor is None else tensors | {key: tensor})
    with pytest.raises(TriviumError, match="adapter"):
        load_adapter(load_model(folder), place)


def test_an_adapter_beside_the_config_of_another_model_is_named(folder: Path, tmp_path: Path) -> None:
    place = adapter(tmp_path, str(folder), load_model(folder))
    change(place / "config.json", intermediate_size=8)
    with pytest.raises(TriviumError, match=r"config\.json is of another model than"):
        load_model(place)


def test_a_reward_model_that_asks_for_too_much_is_refused(folder: Path, tmp_path: Path) -> None:
    model = without_language_head(load_model(folder))
    place = tmp_path / "reward"
    save_reward_model(model, ScalarHead(model.config.width, seed=1), place, pad_id=0)
    load_reward_model(place)
    change(place / "config.json", vocab_size=2**24)
    found = within(ROOM, lambda: load_reward_model(place))
    assert "has the shape" in found, found
    for value in (5, [None], "ForSequenceClassification"):
        change(place / "config.json", architectures=value)
        with pytest.raises(TriviumError, match="is no reward model"):
            load_reward_model(place)


def test_an_empty_folder_and_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "file", {})
    for place in ("empty", "file", "nothing"):
        for read in (load_model, load_config, Tokenizer.load, load_reward_model):
            with pytest.raises(TriviumError):
                read(tmp_path / place)


def test_a_folder_without_a_tokenizer_takes_token_ids(folder: Path) -> None:
    whole = trivium.load(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 9], "pad_token_id": 7})
    ends = trivium.load(folder).tokenizer.stop_ids
    assert {7, 9} < ends
    for path in folder.glob("token*"):
        path.unlink()
    bare = trivium.load(folder)
    assert bare.tokenizer.stop_ids == {7, 9}
    assert torch.equal(bare.logits([5, 6]), whole.logits([5, 6]))
    found = bare.generate("5 6 12", temperature=0, max_new_tokens=6)
    [[expected]] = whole.engine.generate(
        [Request([5, 6, 12], Sampling(temperature=0, max_new_tokens=6, stop_ids=(7, 9)))]
    )
    assert found.tokens == expected.tokens
    shown = found.tokens if found.finish_reason == "length" else found.tokens[:-1]
    assert found.text == " ".join(map(str, shown))
    with pytest.raises(TriviumError, match="has no tokenizer, so a text is token ids"):
        bare.generate("the river")
    bare.save(folder.parent / "again")
    assert not list((folder.parent / "again").glob("token*"))
    # Nothing is trained on ids that no text has.
    with pytest.raises(TriviumError, match=r"holds no tokenizer\.json"):
        Tokenizer.load(folder.parent / "again")
