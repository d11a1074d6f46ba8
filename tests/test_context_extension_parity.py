"""Every way to stretch positions, saved to disk, against transformers opening the same folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.folder import load_model, save_model
from trivium.model.stretch import METHODS, stretch
from trivium.model.transformer import Transformer

LENGTH, LONGER = 64, 256
OPTIONS = {"base": {"base": 500000.0}, "nope": {"every": 2}}


def small_model(family: str, **changes) -> Transformer:
    torch.manual_seed(0)
    settings = {
        "family": family, "vocabulary": 50, "width": 64, "layers": 4, "heads": 2, "inner_width": 48,
        "context": LENGTH, "extra": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }  # fmt: skip
    if family == "qwen3":
        changes = {"query_key_norm": "head", **changes}
    model = Transformer(ModelConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@torch.no_grad()
def logits_of(folder: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and theirs, for a random text of that length."""
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length))
    ours = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return ours.logits(ours(ids, Documents([length]))), theirs(ids[None]).logits[0]


@pytest.mark.parametrize("length", [16, LONGER])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stretched_model_is_read_alike(method: str, family: str, length: int, tmp_path) -> None:
    if method == "nope" and family != "llama":
        pytest.skip("only llama and smollm3 can write layers without positions")
    model = small_model(family)
    stretch(model, LONGER, method, **OPTIONS.get(method, {}))
    save_model(model, tmp_path / "model")
    ours, theirs = logits_of(tmp_path / "model", length)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    plain = small_model(family)
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length))
    unstretched = plain.logits(plain(ids, Documents([length]))).detach()
    silent = method == "extrapolate" or (length < LENGTH and method == "dynamic")
    assert (float((unstretched - ours).abs().max()) < 5e-5) == silent or method == "longrope"


def test_the_ramp_of_yarn_in_the_saved_model_is_the_papers(tmp_path) -> None:
    """Pairs that turn often keep their speed, pairs that turn less than once slow by the factor."""
    model = small_model("llama")
    stretch(model, LONGER, "yarn", beta_fast=8.0, beta_slow=1.0)
    save_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    width, base, factor = 32, 10000.0, LONGER / LENGTH

    def place(turns: float) -> float:
        return width * math.log(LENGTH / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(place(8.0)), 0), min(math.ceil(place(1.0)), width - 1)
    expected = []
    for pair in range(width // 2):
        plain = base ** (-2 * pair / width)
        slowed = min(1.0, max(0.0, (pair - low) / (high - low)))
        expected.append(plain * (1 - slowed) + plain / factor * slowed)
    wanted = torch.tensor(expected)
    assert wanted[0] == pytest.approx(1.0)
    assert wanted[-1] == pytest.approx(base ** (-2 * (width // 2 - 1) / width) / factor)
    torch.testing.assert_close(theirs.model.rotary_emb.inv_freq, wanted, atol=1e-6, rtol=1e-5)
    temperature = 0.1 * math.log(factor) + 1
    angles = load_model(tmp_path / "model").rotary.angles(torch.tensor([1.0]), LONGER)[0]
    torch.testing.assert_close(angles[: width // 2].float(), wanted, atol=1e-6, rtol=1e-5)
    assert theirs.model.rotary_emb.attention_scaling == pytest.approx(temperature)


@pytest.mark.parametrize("method", ["interpolate", "extrapolate"])
def test_a_stretched_table_is_read_alike(method: str, tmp_path) -> None:
    model = small_model(
        "gpt2", positions="learned", norm="layer", tied=True, gated=False, activation="gelu_tanh",
        query_key_value_bias=True, attention_output_bias=True, inner_bias=True, norm_epsilon=1e-5,
    )  # fmt: skip
    stretch(model, LONGER, method)
    save_model(model, tmp_path / "model")
    ours, theirs = logits_of(tmp_path / "model", LONGER)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
