"""Adapters that PEFT itself made: the same logits and greedy tokens here, or a refusal by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_tokens import own

import trivium
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.model.adapters import load_adapter, save_adapter
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.serve.models import open_engine

PROMPTS = [list(range(3, 20)), [7, 41, 9, 30, 12], list(range(60, 30, -1))]
NEW = 12
ATTENTION = ["q_proj", "v_proj"]
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "expression": {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2, r"layers\.1\..*q_proj": 6},
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 5},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "dora": {"use_dora": True},
    "some layers": {"layers_to_transform": [0, 2]},
    "without": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}
WHOLE: dict[str, dict[str, Any]] = {
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one table": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@cache
def vocabulary() -> Any:
    return own()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "two tables"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers, drawn from a seed by transformers, with a tokenizer."""
    folder: Path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary().vocabulary_size, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        tie_word_embeddings=request.param, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary().save(folder)
    return folder


def opened(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def made(base: Path, folder: Path, **options: Any) -> Any:
    """PEFT's adapter with every weight drawn, written to the folder and read from there again."""
    chosen = {"r": 4, "lora_alpha": 12, "target_modules": ATTENTION, "init_lora_weights": False, **options}
    torch.manual_seed(1)
    model = peft.get_peft_model(opened(base), peft.LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(opened(base), str(folder)).eval()


@torch.no_grad()
def their_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompt])).logits[0]


def their_tokens(model: Any, prompt: list[int]) -> list[int]:
    """Greedily, without a cache."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(int(their_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_beside_its_base_it_answers_as_in_peft(base, options, tmp_path):
    theirs, plain = made(base, tmp_path / "adapter", **options), opened(base)
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    greedy = Sampling(temperature=0, max_new_tokens=NEW, stop_ids=())
    engine = open_engine(base, adapters={"made": tmp_path / "adapter"})
    requests = [Request(prompt, greedy, adapter=name) for prompt in PROMPTS for name in ("made", None)]
    answers = [answer.tokens for [answer] in engine.generate(requests)]
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            mine = ours.logits(ours(torch.tensor(prompt), Documents([len(prompt)])))
        expected = their_logits(theirs, prompt)
        assert (expected - their_logits(plain, prompt)).abs().max() > 0.1
        torch.testing.assert_close(mine, expected, atol=3e-5, rtol=0)
        assert answers[2 * index] == their_tokens(theirs, prompt)
        assert answers[2 * index + 1] == their_tokens(plain, prompt)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("options", [LAYERS["patterns"], *WHOLE.values()], ids=["patterns", *WHOLE])
def test_alone_it_opens_like_a_model(base, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))
    theirs = made(base, tmp_path / "adapter", **options)
    model = trivium.load(tmp_path / "adapter", dtype=torch.float32)
    greedy = Sampling(temperature=0, max_new_tokens=NEW, stop_ids=())
    for prompt in PROMPTS:
        expected = their_logits(theirs, prompt)
        torch.testing.assert_close(model.logits(prompt), expected, atol=3e-5, rtol=0)
        [[answer]] = model.engine.generate([Request(prompt, greedy)])
        assert answer.tokens == their_tokens(theirs, prompt)
        [score] = model.engine.score([prompt[:1]], [prompt[1:]])
        wanted = expected.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
        assert score.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    assert model.tokenizer.vocabulary_size == vocabulary().vocabulary_size
    again = trivium.load(tmp_path / "adapter")
    assert again.folder == model.folder
    made(base, tmp_path / "adapter", **options, lora_dropout=0.1)
    assert trivium.load(tmp_path / "adapter").folder != model.folder


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_one_that_replaces_parts_is_not_laid_beside_others(base, options, tmp_path):
    made(base, tmp_path / "adapter", **options)
    with pytest.raises(TriviumError, match="serve it as a model of its own, NAME="):
        open_engine(base, adapters={"made": tmp_path / "adapter"})


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora' changes the base"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.down_proj.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_modules": ["embed_tokens"]}, "no layer model.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no layer lm_head"),
    ],
)
def test_what_would_compute_otherwise_is_refused_by_name(base, options, named, tmp_path):
    made(base, tmp_path / "adapter", **options)
    with pytest.raises(TriviumError) as caught:
        load_adapter(load_model(base), tmp_path / "adapter")
    assert named in str(caught.value)


def test_an_adapter_to_itself_is_refused(base, tmp_path):
    made(base, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "adapter")))
    with pytest.raises(TriviumError, match="is an adapter too"):
        trivium.load(tmp_path / "adapter")


def test_peft_takes_both_tables_of_ours(base, tmp_path):
    """A tied embedding that we train is the head as well."""
    model = load_model(base)
    add_adapter(model, AdapterSettings(rank=4, train=["embedding"]), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_adapter(model, tmp_path / "adapter", base=str(base))
    theirs = peft.PeftModel.from_pretrained(opened(base), str(tmp_path / "adapter")).eval()
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    assert again.config == model.config
    for prompt in PROMPTS:
        with torch.no_grad():
            mine, reread = (
                one.logits(one(torch.tensor(prompt), Documents([len(prompt)]))) for one in (model, again)
            )
        assert torch.equal(mine, reread)
        torch.testing.assert_close(their_logits(theirs, prompt), mine, atol=3e-5, rtol=0)
