"""Adapters and rounding in training stages: saved as told, resumed bit for bit, loaded again."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from small import assert_identical, weights_of
from test_sft import CHATS
from test_tokens import gpt2_like, own
from tuning import cut_off, save, small_model, write_rows

import trivium
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.quantize import multiplies_exactly, quantised_as
from trivium.serve.models import open_engine
from trivium.stages.parts.parents import adapt
from trivium.stages.parts.stage import Work
from trivium.stages.sft import Sft

DATA = "data: ./chats.jsonl, validation: {times: 1}"
SFT = f"kind: sft, from: ./base, {DATA}, epochs: 2, context: 128, batch: 512"
TOKENS = torch.arange(1, 30)


def recipe(folder: Path, stages: str, tokenizer=None) -> Path:
    write_rows(folder / "chats.jsonl", CHATS)
    write_rows(
        folder / "texts.jsonl", [{"text": f"the river rises {n} in the hills " * 20} for n in range(60)]
    )
    tokenizer = tokenizer or own()
    save(folder / "base", small_model(tokenizer, inner_width=64), tokenizer)
    (folder / "tune.yaml").write_text(f"name: tune\nstages:\n{stages}")
    return folder / "tune.yaml"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, Documents([len(TOKENS)])))


def theirs(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS[None]).logits[0]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_sft_leaves_the_merged_model_and_the_adapter(tmp_path, kind):
    path = recipe(tmp_path, f"  sft: {{{SFT}, adapter: {{rank: 4, kind: {kind}}}}}\n")
    run = trivium.run(path, runs=tmp_path / "runs")
    losses = [row["loss"] for row in run["sft"].metrics if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    folder = run["sft"].folder / "model"
    ours = logits(load_model(folder))
    assert (ours - logits(load_model(tmp_path / "base"))).abs().max() > 0.1
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(theirs(whole), ours, atol=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert torch.allclose(theirs(opened), ours, atol=1e-4)


@pytest.mark.parametrize(
    "adapter", ["rank: 4", "rank: 4, kind: dora", "rank: 4, kind: pissa", "rank: 4, base: int4"]
)
def test_cut_off_and_resumed_it_ends_bit_identical(tmp_path, monkeypatch, adapter):
    extra = f"checkpoint: {{every_steps: 1}}, adapter: {{{adapter}}}"
    path = recipe(tmp_path, f"  sft: {{{SFT}, {extra}}}\n")
    whole = trivium.run(path, runs=tmp_path / "whole")
    cut_off(monkeypatch, path, tmp_path / "cut", at=4)
    (state,) = list((tmp_path / "cut").rglob("checkpoints/step-000000004/tensors.safetensors"))
    names = [name for name in load_tensors(state) if name.startswith("weights.")]
    assert names
    assert not [name for name in names if name.endswith(".weight")], "only what is trained is kept"
    cut = trivium.run(path, runs=tmp_path / "cut")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        first, second = (load_tensors(run["sft"].folder / "model" / file) for run in (whole, cut))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert cut["sft"].summary["steps"] > 5


def test_an_adapter_begins_with_the_stages_own_seed(tmp_path):
    begun, given = [], {"kind": "sft", "from": "./base", "data": "./chats.jsonl"}
    for seed in (4, 5):
        model = small_model(own())
        work = Work("sft", tmp_path, {}, seed, MetricsLog(tmp_path / "metrics.jsonl"), Progress("test"))
        adapt(work, Sft.model_validate({**given, "adapter": {"rank": 4}}), model)
        expected = small_model(own())
        add_adapter(expected, AdapterSettings(rank=4), seed=seed)
        assert_identical(weights_of(model), weights_of(expected))
        begun.append(weights_of(model)["layers.0.attention.query.down.default"])
    assert not torch.equal(*begun)


def test_an_adapter_alone_finds_its_base_and_the_next_stage_starts_from_it(tmp_path, monkeypatch):
    adapter = "adapter: {rank: 4, save: adapter}"
    path = recipe(
        tmp_path, f"  one: {{{SFT}, {adapter}}}\n  two: {{{SFT.replace('./base', 'one')}, {adapter}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    run = trivium.run(path, runs="runs")
    folder = (run["two"].folder / "model").absolute()
    assert not (folder / "model.safetensors").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merged = trivium.run(path, runs=tmp_path / "merged", set={"two.adapter.save": "merged"})
    assert not (merged["two"].folder / "model" / "adapter").exists()
    again = load_model(merged["two"].folder / "model")
    assert torch.allclose(logits(load_model(folder)), logits(again), atol=1e-4)
    completion = open_engine(folder).generate([Request([3, 4, 5], Sampling(max_new_tokens=4))])
    assert completion[0][0].tokens


def test_new_tokens_are_learned_with_the_adapter(tmp_path):
    path = recipe(tmp_path, f"  sft: {{{SFT}, adapter: {{rank: 4}}}}\n", gpt2_like())
    run = trivium.run(path, runs=tmp_path / "runs")
    kept = load_tensors(run["sft"].folder / "model" / "adapter" / "adapter_model.safetensors")
    embedding = kept["base_model.model.model.embed_tokens.weight"]
    assert len(embedding) == gpt2_like().vocabulary_size + 2
    whole = load_model(run["sft"].folder / "model")
    assert torch.equal(whole.embedding.weight, embedding)


def test_muon_is_refused_for_adapters(tmp_path):
    path = recipe(tmp_path, f"  sft: {{{SFT}, optimiser: muon, adapter: {{rank: 4}}}}\n")
    with pytest.raises(TriviumError, match="not with muon"):
        trivium.run(path, runs=tmp_path / "runs")


QUANTIZE = "data: {./texts.jsonl: {validation: 0.3}}, context: 64"


@pytest.mark.parametrize("scheme", ["int8", "int4", *(["int8-dynamic"] if multiplies_exactly() else [])])
def test_the_quantize_stage_says_what_it_costs(tmp_path, scheme):
    path = recipe(tmp_path, f"  few: {{kind: quantize, from: ./base, scheme: {scheme}, {QUANTIZE}}}\n")
    run = trivium.run(path, runs=tmp_path / "runs")
    facts = run["few"].summary
    lost = facts["bits_per_byte_after"] - facts["bits_per_byte_before"]
    assert 0 < abs(lost) == pytest.approx(abs(facts["bits_per_byte_lost"]))
    assert facts["accuracy_lost"] == facts["accuracy_before"] - facts["accuracy_after"]
    share = facts["matrices_bytes_after"] / facts["matrices_bytes_before"]
    assert share < (0.3 if scheme == "int4" else 0.5)
    folder = run["few"].folder / "model"
    model = load_model(folder)
    assert quantised_as(model) == scheme
    engine = open_engine(folder)
    greedy = Sampling(temperature=0.0, max_new_tokens=6, stop_ids=())
    (served,), (alone,) = (
        engine.generate([Request([3, 4, 5], greedy)])[0],
        [greedy_tokens(model, [3, 4, 5], 6)],
    )
    assert served.tokens == alone


def greedy_tokens(model, tokens: list[int], count: int) -> list[int]:
    drawn: list[int] = []
    for _ in range(count):
        text = torch.tensor(tokens + drawn)
        with torch.no_grad():
            hidden = model(text, Documents([len(text)]))
        drawn.append(int(model.logits(hidden[-1]).argmax()))
    return drawn


def test_an_engine_runs_an_adapter_that_acts(tmp_path):
    path = recipe(tmp_path, f"  sft: {{{SFT}, adapter: {{rank: 4}}, samples: {{prompts: [the river]}}}}\n")
    run = trivium.run(path, runs=tmp_path / "runs")
    assert (run["sft"].folder / "samples.jsonl").is_file()
    assert isinstance(Engine(load_model(run["sft"].folder / "model"), own()), Engine)
