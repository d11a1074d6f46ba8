"""Guards against forgetting: replay, a pull towards the parent, and an adapter per domain."""

from __future__ import annotations

import copy

import pytest
import torch
from test_sft_pitfalls import ragged, trainer
from test_tokens import own
from tuning import CHAT, cut_off, one, packed, save, small_model, write_rows

import trivium
from trivium.data.rows import PackedSequence, collate
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json
from trivium.learn.objectives.near_parent import NearPredictions, NearWeights, divergence
from trivium.learn.objectives.next_token import NextToken
from trivium.model.adapters import load_adapter
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.lora import AdapterSettings, adapted_layers, add_adapter, selected
from trivium.pipeline import show
from trivium.pipeline.store import Entry
from trivium.stages.parts.inheritance import kept_model
from trivium.stages.parts.stage import Stage

KINDS = ["lora", "dora", "pissa"]
FIRST = [{"messages": CHAT}] * 40
SECOND = [{"prompt": f"count {n}", "completion": f"the river rises {n} times"} for n in range(40)]
LASTING = "context: 128, batch: 512, steps: 10, optimiser: adamw, learning_rate: 0.01, validation: {times: 1}"


def moved(model, seed=5, by=0.05):
    """Every trained weight elsewhere, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_the_divergence_is_torchs_whatever_the_chunk(soft_cap):
    torch.manual_seed(0)
    hidden, head = torch.randn(13, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    before, parent_head, weights = torch.randn(13, 8), torch.randn(31, 8), torch.rand(13)

    def logits(x, y):
        found = x @ y.t()
        return found if soft_cap is None else soft_cap * torch.tanh(found / soft_cap)

    ours = logits(hidden, head).log_softmax(-1)
    theirs = logits(before, parent_head).log_softmax(-1)
    apart = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    expected = (apart * weights).sum()
    wanted = torch.autograd.grad(expected, [hidden, head])
    for chunk in (1, 4, 100):
        found = divergence(hidden, head, before, parent_head, weights, soft_cap=soft_cap, chunk=chunk)
        torch.testing.assert_close(found, expected)
        for mine, other in zip(torch.autograd.grad(found, [hidden, head]), wanted, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_the_pull_on_weights_is_a_spring():
    """Its gradient is strength × displacement × the weight of the tokens; at the parent it is nothing."""
    tokenizer = own()
    model = small_model(tokenizer)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    batch = collate(ragged(tokenizer))
    guard = NearWeights(model, 0.3)
    assert guard.loss(model, batch, None).sum == 0
    moved(model)
    found = guard.loss(model, batch, None)
    found.sum.backward()
    total = batch.weights.sum()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, 0.3 * total * (weight.detach() - start[name]))
    squared = sum(((one.detach() - start[name]) ** 2).sum() for name, one in model.named_parameters())
    distance, count = found.metrics["distance_to_parent"]
    torch.testing.assert_close(distance / count, squared.sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_of_an_adapter_the_pull_is_on_what_merging_would_change(kind):
    tokenizer = own()
    model = small_model(tokenizer)
    before = {
        name: dict(model.named_modules())[name].weight.clone() for name in ("layers.0.attention.query",)
    }
    add_adapter(model, AdapterSettings(kind=kind, rank=4), seed=1)
    batch = collate(ragged(tokenizer))
    guard = NearWeights(model, 2.0)
    layers = adapted_layers(model)
    assert guard.loss(model, batch, None).sum.item() == pytest.approx(0, abs=1e-4)
    moved(model)
    changes = {}
    for name, layer in layers.items():
        with selected(model, None):
            was = layer.merged(None)
        changes[name] = layer.merged(layer.selection.active) - was
        torch.testing.assert_close(layer.change(), changes[name], atol=1e-5, rtol=1e-4)
        if name in before:
            torch.testing.assert_close(was, before[name], atol=1e-5, rtol=1e-4)
    found = guard.loss(model, batch, None).sum / batch.weights.sum()
    expected = sum((one**2).sum() for one in changes.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.backward()
    assert all(layer.up["default"].grad.abs().sum() > 0 for layer in layers.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_switched_off_is_the_parent(kind):
    """The pull on predictions needs no copy of the parent under an adapter, and is none at the parent."""
    tokenizer = own()
    model = small_model(tokenizer)
    parent = copy.deepcopy(model).requires_grad_(False)
    add_adapter(model, AdapterSettings(kind=kind, rank=4), seed=1)
    batch = collate(ragged(tokenizer))

    def pulled(reference):
        for parameter in model.parameters():
            parameter.grad = None
        result = NextToken(guards=[NearPredictions(0.5, reference)]).loss(model, batch)
        result.sum.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return result, torch.cat([grad.flatten() for grad in grads])

    kl, _ = pulled(None)[0].metrics["kl_to_parent"]
    assert kl.item() == pytest.approx(0, abs=1e-4)
    moved(model)
    (off, off_gradient), (copied, copied_gradient) = pulled(None), pulled(parent)
    assert off.metrics["kl_to_parent"][0] > 1
    torch.testing.assert_close(off.sum, copied.sum, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(off_gradient, copied_gradient, rtol=1e-3, atol=1e-3)
    plain = NextToken().loss(model, batch)
    torch.testing.assert_close(
        off.sum - plain.sum, 0.5 * off.metrics["kl_to_parent"][0], rtol=1e-4, atol=1e-3
    )


def test_only_the_tokens_of_the_named_sources_are_held():
    tokenizer = own()
    model = small_model(tokenizer)
    parent = copy.deepcopy(model).requires_grad_(False)
    moved(model)
    rows = [packed([one(row, tokenizer)]) for row in ({"text": "the river rises"}, {"messages": CHAT})]
    marked = [PackedSequence(**{**vars(row), "sources": (place,)}) for place, row in enumerate(rows)]

    def apart(given, sources):
        return (
            NextToken(guards=[NearPredictions(1.0, parent, sources)])
            .loss(model, collate(given))
            .metrics["kl_to_parent"]
        )

    both, alone = apart(marked, (1,)), apart(marked[1:], ())
    torch.testing.assert_close(both[0], alone[0], rtol=1e-5, atol=1e-5)
    assert both[1] == alone[1] == marked[1].weights.sum()
    assert apart(marked, ())[1] == sum(row.weights.sum() for row in marked)
    assert apart(marked[:1], (1,))[0] == 0


def test_the_pull_does_not_depend_on_how_a_batch_is_divided(tmp_path):
    tokenizer = own()
    rows = ragged(tokenizer)
    parent = small_model(tokenizer).requires_grad_(False)
    found = []
    for micro in (1, 60, 10_000):
        model = small_model(tokenizer)
        sized = trainer(tmp_path / str(micro), model, rows, micro_batch=micro)
        sized.objective = NextToken(guards=[NearWeights(model, 0.1), NearPredictions(0.5, parent)])
        moved(model)
        measures, norm = sized._gradient(rows)
        total, weight = measures["distance_to_parent"]
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((norm, float(total) / float(weight), gradient))
    for norm, distance, gradient in found[1:]:
        assert norm == pytest.approx(found[0][0], rel=1e-5)
        assert distance == pytest.approx(found[0][1], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][2], atol=1e-5, rtol=1e-4)


def recipe(folder, stages):
    tokenizer = own()
    write_rows(folder / "first.jsonl", FIRST)
    write_rows(folder / "second.jsonl", SECOND)
    save(folder / "base", small_model(tokenizer), tokenizer)
    (folder / "chain.yaml").write_text("name: chain\nstages:\n" + stages)
    return folder / "chain.yaml"


def stage(name, start, data, extra=""):
    return f"  {name}: {{kind: sft, from: {start}, data: {data}, {LASTING}{extra}}}\n"


def last(run, name, key):
    return next(row[key] for row in reversed(run[name].metrics) if key in row)


def distance(run, name, base):
    ours = load_tensors(run[name].folder / "model" / "model.safetensors")
    start = load_tensors(base / "model.safetensors")
    return float(sum(((ours[key] - start[key]) ** 2).sum() for key in start)) ** 0.5


@pytest.mark.slow
def test_a_stage_stays_nearer_the_stronger_it_is_held(tmp_path):
    path = recipe(
        tmp_path,
        stage("free", "./base", "./first.jsonl")
        + stage("weights", "./base", "./first.jsonl", ", near_parent: {weights: 3}")
        + stage("loose", "./base", "./first.jsonl", ", near_parent: {kl: 0.001}")
        + stage("kl", "./base", "./first.jsonl", ", near_parent: {kl: 20}"),
    )
    run = trivium.run(path, runs=tmp_path / "runs")
    base = tmp_path / "base"
    assert distance(run, "weights", base) < 0.7 * distance(run, "free", base)
    assert last(run, "weights", "distance_to_parent") == pytest.approx(
        distance(run, "weights", base), rel=0.2
    )
    assert last(run, "kl", "kl_to_parent") < 0.5 * last(run, "loose", "kl_to_parent")
    # The loss in the log stays the loss of the data, to be compared between stages.
    assert last(run, "kl", "loss") > last(run, "free", "loss")
    assert "kl_to_parent" not in run["free"].metrics[-1]


@pytest.mark.parametrize("adapter", ["{rank: 2}", "{rank: 2, alpha: 0.001, train: [head]}"])
def test_an_adapter_that_trains_a_part_whole_is_still_compared_with_the_parent(tmp_path, adapter):
    """The logged divergence, recomputed from the parent's folder and the weights kept before that step."""
    extra = f", near_parent: {{kl: 0.5}}, adapter: {adapter}, checkpoint: {{at: [step=1]}}"
    path = recipe(tmp_path, stage("held", "./base", "./first.jsonl", extra).replace("steps: 10", "steps: 2"))
    held = trivium.run(path, runs=tmp_path / "runs")["held"]
    entry = Entry(held.folder)
    work = show._work(entry, entry.record)
    rows, _ = Stage.kinds["sft"].model_validate(entry.record["settings"]).batch_of(work, 2)
    models = [load_model(folder) for folder in (tmp_path / "base", kept_model(held.folder, "step=1"))]
    batch, logprobs = collate(rows), []
    for model in models:
        with torch.no_grad():
            hidden = model(batch.tokens, Documents(batch.lengths))
            logprobs.append(model.logits(hidden).log_softmax(-1))
    parent, ours = logprobs
    apart = (parent.exp() * (parent - ours)).sum(-1)
    expected = float((apart * batch.weights).sum() / batch.weights.sum())
    logged = [row["kl_to_parent"] for row in held.metrics if "kl_to_parent" in row]
    assert logged[0] == pytest.approx(0, abs=1e-6)
    assert expected > 1e-3
    assert logged[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ", near_parent: {weights: 0.1, kl: 0.5}",
        ", near_parent: {weights: 0.1, kl: 0.5}, adapter: {rank: 4, kind: dora}",
    ],
)
def test_cut_off_and_resumed_the_parent_is_still_the_parent(tmp_path, monkeypatch, extra):
    path = recipe(
        tmp_path, stage("held", "./base", "./first.jsonl", extra + ", checkpoint: {every_steps: 1}")
    )
    whole = trivium.run(path, runs=tmp_path / "whole")
    cut_off(monkeypatch, path, tmp_path / "cut", at=6)
    cut = trivium.run(path, runs=tmp_path / "cut")
    first, second = (load_tensors(run["held"].folder / "model" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_bare_share_replays_what_the_parent_learnt_from_and_what_it_replayed(tmp_path):
    path = recipe(
        tmp_path,
        stage("one", "./base", "./first.jsonl")
        + stage("two", "one", "./second.jsonl", ", replay: 0.5")
        + stage("three", "two", "{./base/other.jsonl: {}}", ", replay: {share: 0.4}"),
    )
    write_rows(tmp_path / "base" / "other.jsonl", [{"text": f"the miller counts {n}"} for n in range(40)])
    run = trivium.run(path, runs=tmp_path / "runs")
    two, three = (
        {name: one["share"] for name, one in run[name].summary["data"].items()} for name in ("two", "three")
    )
    assert read_json(run["two"].folder / "training.json")["shares"] == two
    assert two == {
        "./second.jsonl": pytest.approx(0.5, abs=0.06),
        "./first.jsonl": pytest.approx(0.5, abs=0.06),
    }
    assert three["./base/other.jsonl"] == pytest.approx(0.6, abs=0.06)
    assert three["./second.jsonl"] == pytest.approx(0.2, abs=0.06)
    assert three["./first.jsonl"] == pytest.approx(0.2, abs=0.06)
    assert "validation_loss/./second.jsonl" in run["three"].metrics[-1]


def test_named_replay_is_tokenised_held_out_and_counted(tmp_path):
    path = recipe(
        tmp_path,
        stage("two", "./base", "./second.jsonl", ", replay: {data: {./first.jsonl: {}}, share: 0.25}"),
    )
    run = trivium.run(path, runs=tmp_path / "runs")
    facts = run["two"].summary["data"]
    assert facts["./first.jsonl"]["share"] == pytest.approx(0.25, abs=0.06)
    assert facts["./first.jsonl"]["kept"] == 40


def test_what_a_person_gets_wrong_is_one_sentence(tmp_path):
    for extra, words in (
        (", replay: {data: {./second.jsonl: {}}, share: 0.2}", "in `data` and in `replay`"),
        (", replay: 0.2", "is a bare share"),
        (", near_parent: {kl: 1, on: [./first.jsonl]}", "not trained on"),
        (", near_parent: {weights: 0}", "above 0"),
        (", near_parent: {weights: 1, on: [./second.jsonl]}", "which sources"),
    ):
        path = recipe(tmp_path, stage("two", "./base", "./second.jsonl", extra))
        with pytest.raises(TriviumError, match=words):
            trivium.run(path, runs=tmp_path / "runs")


def test_an_adapter_per_domain_loses_nothing_when_it_is_off(tmp_path):
    path = recipe(
        tmp_path,
        stage("one", "./base", "./first.jsonl", ", adapter: {rank: 4, save: adapter}")
        + stage("two", "./base", "./second.jsonl", ", adapter: {rank: 4, save: adapter}"),
    )
    run = trivium.run(path, runs=tmp_path / "runs")
    model = load_model(tmp_path / "base")
    tokens = torch.arange(1, 20)

    def logits():
        with torch.no_grad():
            return model.logits(model(tokens, Documents([len(tokens)])))

    before = logits()
    for name in ("one", "two"):
        load_adapter(model, run[name].folder / "model" / "adapter", name=name)
    with selected(model, None):
        assert torch.equal(logits(), before)
    found = []
    for name in ("one", "two"):
        with selected(model, name):
            found.append(logits())
    assert all((one - before).abs().max() > 0.01 for one in found)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_corpus_is_replayed_after_the_vocabulary_has_grown(tmp_path):
    """What pre-training read was spelt without the tokens that mid-training added."""
    path = tmp_path / "grown.yaml"
    path.write_text(
        """
name: grown
stages:
  words: {kind: tokenizer, vocabulary: 300, data: {path: world:prose, limit: 60}}
  corpus: {kind: corpus, tokenizer: words, data: {path: world:prose, limit: 60}}
  base:
    {kind: pretrain, data: corpus, model: {depth: 1, width: 16}, context: 64, batch: 128, steps: 2}
  mid:
    kind: midtrain
    from: base
    data: {world:tongue: {limit: 40}}
    vocabulary: {data: {path: world:tongue, limit: 40}, added: 20}
    batch: 128
    steps: 2
  sft:
    {kind: sft, from: mid, data: {world:chat: {limit: 40}}, replay: {data: corpus, share: 0.3}, steps: 2}
"""
    )
    run = trivium.run(path, runs=tmp_path / "runs")
    assert run["sft"].summary["data"]["corpus"]["share"] == pytest.approx(0.3, abs=0.1)
    assert run["sft"].model().tokenizer.vocabulary_size > run["base"].model().tokenizer.vocabulary_size
