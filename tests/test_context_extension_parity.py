"""Every way to stretch positions, saved to disk, against transformers opening the same folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.context_extension import METHODS, extend_context
from trivium.model.folder import load_model, save_model
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


@pytest.mark.quick_cases(12)
@pytest.mark.parametrize("length", [16, LONGER])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_stretched_model_is_read_alike(method: str, family: str, length: int, tmp_path) -> None:
    if method == "nope" and family != "llama":
        pytest.skip("only llama and smollm3 can write layers without positions")
    model = small_model(family)
    extend_context(model, LONGER, method, **OPTIONS.get(method, {}))
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
    extend_context(model, LONGER, "yarn", beta_fast=8.0, beta_slow=1.0)
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
    extend_context(model, LONGER, method)
    save_model(model, tmp_path / "model")
    ours, theirs = logits_of(tmp_path / "model", LONGER)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def plain_frequencies(base: float = 10000.0, width: int = 32) -> torch.Tensor:
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def yarn_frequencies(original: int, factor: float, width: int = 32) -> torch.Tensor:
    """The paper's ramp over pairs, with the 2.56 turns that leave a pair of so short a model alone."""
    place = [
        width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10000.0))
        for turns in (original / 25, 1.0)
    ]
    low, high = max(math.floor(place[0]), 0), min(math.ceil(place[1]), width - 1)
    slowed = ((torch.arange(width // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    plain = plain_frequencies()
    return plain * (1 - slowed) + plain / factor * slowed


TWICE = {
    ("interpolate", "interpolate"): plain_frequencies() / 16,
    ("interpolate", "yarn"): yarn_frequencies(LENGTH, 16),
    ("interpolate", "ntk"): plain_frequencies(10000.0 * 16 ** (32 / 30)),
    ("interpolate", "extrapolate"): plain_frequencies() / 4,
    ("ntk", "ntk"): plain_frequencies(10000.0 * 16 ** (32 / 30)),
    ("dynamic", "interpolate"): plain_frequencies() / 16,
    ("yarn", "yarn"): yarn_frequencies(LENGTH, 16),
    ("yarn", "interpolate"): plain_frequencies() / 16,
    ("yarn", "extrapolate"): yarn_frequencies(LENGTH, 4),
    ("extrapolate", "interpolate"): plain_frequencies() / 4,
}


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("methods", TWICE, ids="-then-".join)
def test_a_second_stretch_counts_from_the_unstretched_positions(methods: tuple[str, str], tmp_path) -> None:
    model = small_model("llama")
    extend_context(model, LONGER, methods[0])
    extend_context(model, 4 * LONGER, methods[1])
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    frequencies = again.rotary.angles(torch.tensor([1.0]), 4 * LONGER)[0].double()
    torch.testing.assert_close(frequencies, TWICE[methods], atol=0, rtol=1e-5)
    ours, theirs = logits_of(tmp_path / "model", 4 * LONGER)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
    assert again.config.reach == 4 * LONGER


@pytest.mark.parametrize("method", ["longrope", "llama3", "yarn", "interpolate"])
def test_extrapolation_leaves_the_parents_positions_as_they_were(method: str, tmp_path) -> None:
    model = small_model("llama")
    extend_context(model, LONGER, method)
    ids = torch.arange(LONGER) % 50
    before = model(ids, Documents([LONGER]))
    extend_context(model, 4 * LONGER, "extrapolate")
    save_model(model, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(ids, Documents([LONGER])), before)
    ours, theirs = logits_of(tmp_path / "model", 2 * LONGER)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("method", ["extrapolate", "nope", "base"])
def test_dynamic_scaling_has_no_more_reach_than_its_factor(method: str) -> None:
    model = small_model("llama")
    extend_context(model, LONGER, "dynamic")
    with pytest.raises(TriviumError, match="dynamic scaling reaches 256 tokens"):
        extend_context(model, 4 * LONGER, method, **OPTIONS.get(method, {}))
