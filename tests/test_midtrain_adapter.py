"""Adapters laid on a model whose positions or vocabulary grow in the same stage."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from test_tokens import own
from tuning import save, small_model, write_rows

import trivium
from trivium.kit.files import load_tensors
from trivium.model.attention import Documents
from trivium.model.folder import load_config, load_model

MID = (
    "kind: midtrain, from: ./base, data: {./texts.jsonl: {validation: 0.2}}, validation: {times: 1},"
    " batch: 512, steps: 3, learning_rate: 0.01"
)
GROWN = "vocabulary: {data: ./tongue.jsonl, added: 12}"
LEARNED = {
    "family": "gpt2", "positions": "learned", "norm": "layer", "tied": True, "gated": False,
    "activation": "gelu_tanh", "query_key_value_bias": True, "attention_output_bias": True,
    "inner_bias": True, "query_key_norm": "none",
}  # fmt: skip


def made(folder: Path, stages: str, **changes) -> trivium.Run:
    write_rows(
        folder / "texts.jsonl", [{"text": f"the river rises {n} in the hills " * 40} for n in range(60)]
    )
    write_rows(folder / "tongue.jsonl", [{"text": f"zamo{n} kelu vrado zamo{n} kelu"} for n in range(60)])
    tokenizer = own()
    save(folder / "base", small_model(tokenizer, inner_width=64, **changes), tokenizer)
    (folder / "tune.yaml").write_text(f"name: tune\nstages:\n{stages}")
    return trivium.run(folder / "tune.yaml", runs=folder / "runs")


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, Documents([len(tokens)])))


def theirs(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens[None]).logits[0]


def text_of(folder: Path, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, load_config(folder).vocabulary, (length,), generator=generator)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("change", "model"),
    [
        ("context: {length: 512, method: yarn}", {}),
        ("context: {length: 512, method: dynamic}", {}),
        ("context: {length: 512, method: interpolate}", LEARNED),
        (
            "context: {length: 512, method: nope}",
            {"family": "llama", "query_key_norm": "none", "extra": {"pad_token_id": 0}},
        ),
        (GROWN, {}),
        (GROWN, {"tied": True}),
    ],
)
def test_an_adapter_alone_is_the_model_that_was_trained(tmp_path, change, model):
    stages = "".join(
        f"  {kind}: {{{MID}, {change}, adapter: {{rank: 4, save: {kind}}}}}\n"
        for kind in ("merged", "adapter")
    )
    run = made(tmp_path, stages, **model)
    alone, merged = (run[name].folder / "model" for name in ("adapter", "merged"))
    assert not (alone / "model.safetensors").exists()
    tokens = text_of(merged, 400 if "context" in change else 60)
    reference = theirs(transformers.AutoModelForCausalLM.from_pretrained(merged), tokens)
    torch.testing.assert_close(logits(load_model(alone), tokens), reference, atol=5e-5, rtol=0)
    assert load_model(alone).config == load_config(merged)


@pytest.mark.slow
def test_what_comes_after_starts_from_the_stretched_positions_and_trains_all_weights(tmp_path):
    stages = (
        f"  long: {{{MID}, context: {{length: 512, method: yarn}}, adapter: {{rank: 4, save: adapter}}}}\n"
        f"  next: {{{MID.replace('./base', 'long')}}}\n"
    )
    run = made(tmp_path, stages)
    rope = load_config(run["next"].folder / "model").rope
    assert rope["rope_type"] == "yarn"
    assert rope["factor"] == 2
    before, after = (
        dict(load_model(run[name].folder / "model").named_parameters()) for name in ("long", "next")
    )
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_new_rows_are_trained_and_saved_with_the_adapter_as_peft_keeps_them(tmp_path):
    run = made(tmp_path, f"  tongue: {{{MID}, {GROWN}, adapter: {{rank: 4}}}}\n")
    folder = run["tongue"].folder / "model"
    kept = load_tensors(folder / "adapter" / "adapter_model.safetensors")
    rows = own().vocabulary_size + 12
    assert len(kept["base_model.model.model.embed_tokens.weight"]) == rows
    assert len(kept["base_model.model.lm_head.weight"]) == rows
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    old = base.lm_head.weight.detach().clone()
    assert not torch.equal(kept["base_model.model.lm_head.weight"][: len(old)], old)
    base.resize_token_embeddings(rows, mean_resizing=False)
    opened = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
    tokens = text_of(folder, 60)
    torch.testing.assert_close(theirs(opened, tokens), logits(load_model(folder), tokens), atol=1e-4, rtol=0)
