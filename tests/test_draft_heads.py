"""Heads that draft for their own model: their loss by formula, their stage, and answers with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tuning import own, save, small_model, write_rows

import trivium
from trivium.data.rows import collate, row_of_documents
from trivium.generate.drafting import open_draft
from trivium.generate.engine import Engine
from trivium.kit.errors import TriviumError
from trivium.kit.files import save_tensors
from trivium.learn.objectives.draft_heads import DECAY, DraftsAhead
from trivium.model.attention import Documents
from trivium.model.draft_heads import FILE, DraftHeads, load_draft_heads
from trivium.model.folder import load_model

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{n} sacks"},
            {"role": "assistant", "content": "the miller " * 3},
        ]
    }
    for n in range(40)
]


def test_the_loss_is_its_formula_within_documents_and_where_something_is_learned():
    torch.manual_seed(0)
    model, heads = small_model(own()), DraftHeads(32, 3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    texts = [np.arange(20, 29), np.array([40, 41]), np.arange(50, 56)]
    learned = [np.array([0, 0, 1, 1, 1, 0, 1, 1, 1]), np.ones(2), np.ones(6)]
    rows = [row_of_documents(texts, learned=[one.astype(np.float32) for one in learned])]
    objective, batch = DraftsAhead(heads), collate(rows)
    found = objective.loss(model, batch)
    expected, count = 0.0, 0.0
    for text, known in zip(texts, learned, strict=True):
        hidden = model(torch.tensor(text), Documents([len(text)]))
        for k, block in enumerate(heads.blocks, 1):
            state = hidden + F.silu(hidden @ block.weight.T + block.bias)
            losses = -(state @ model.head_weight.T).log_softmax(-1)
            for t in range(len(text) - 1 - k):
                if known[t + 1 + k]:
                    expected += DECAY**k * losses[t, text[t + 1 + k]].item()
        count += sum(map(bool, known[1:]))
    assert found.sum.item() == pytest.approx(expected, rel=1e-5)
    assert objective.weight(rows) == count
    found.sum.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in heads.parameters())
    fresh = DraftHeads(32, 2)
    states = torch.randn(4, 32)
    assert torch.equal(fresh(states, 1), states)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model with a template, fine-tuned, and its heads."""
    folder = tmp_path_factory.mktemp("heads")
    save(folder / "base", small_model(own()), own())
    write_rows(folder / "chats.jsonl", ROWS)
    (folder / "heads.yaml").write_text(
        "name: heads\nstages:\n"
        "  sft: {kind: sft, from: ./base, data: ./chats.jsonl, steps: 30, batch: 256, learning_rate: 1e-2}\n"
        "  ahead: {kind: sft, from: sft, data: {./chats.jsonl: {validation: 0.2}}, steps: 40, batch: 256, "
        "learning_rate: 1e-2, draft_heads: 3}\n"
    )
    return folder, trivium.run(folder / "heads.yaml", runs=folder / "runs")


def test_the_stage_trains_heads_and_leaves_the_model_as_it_is(made):
    _, run = made
    before, after = (load_model(run[name].folder / "model") for name in ("sft", "ahead"))
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other), name
    first, last = run["ahead"].metrics[0], run["ahead"].metrics[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["head_1_accuracy"] > 0.8 > first["head_1_accuracy"]
    whole = run["ahead"].folder / "model"
    assert len(load_draft_heads(whole)) == 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole)
    assert torch.equal(theirs.get_input_embeddings().weight, before.embedding.weight)


def test_drafts_by_heads_are_accepted_and_change_no_answer(made, monkeypatch):
    folder, _ = made
    monkeypatch.chdir(folder)
    for target in ("heads/sft", "heads/ahead"):
        plain, drafting = trivium.load(target), trivium.load(target, draft="heads/ahead")
        drafting.engine.scheduler.speculation.payoff.worth = lambda rows: True
        asked = [[{"role": "user", "content": f"{n} sacks"}] for n in range(30)]
        for settings in ({"temperature": 0}, {"temperature": 0.9, "seed": 4}):
            found = drafting.generate(asked, max_new_tokens=24, **settings)
            expected = plain.generate(asked, max_new_tokens=24, **settings)
            assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert drafting.engine.acceptance > 0.5
        assert drafting.engine.counts["steps"] < 0.7 * plain.engine.counts["steps"]


def test_heads_that_fit_no_model_or_are_damaged_are_named(made, tmp_path):
    folder, run = made
    heads = open_draft(run["ahead"].folder / "model")
    assert isinstance(heads, DraftHeads)
    with pytest.raises(TriviumError, match="width 32, and the model's have 64"):
        Engine(small_model(own(), width=64), own(), draft=heads)
    save_tensors(tmp_path / FILE, {"other": torch.zeros(2)})
    with pytest.raises(TriviumError, match="holds no draft heads"):
        load_draft_heads(tmp_path)
    place = folder / "wrong.yaml"
    wrong = "name: wrong\nstages:\n  one: {{kind: sft, from: ./base, data: ./chats.jsonl, steps: 1, {}}}\n"
    for said, words in (
        ("draft_heads: 2, neftune: 5", "leaves the model as it is; leave out neftune"),
        ("draft_heads: 2, adapter: {rank: 2}", "leave out adapter"),
    ):
        place.write_text(wrong.format(said))
        with pytest.raises(TriviumError, match=words):
            trivium.run(place, runs=folder / "runs")
