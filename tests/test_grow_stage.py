"""The stage that grows a model: what it writes, hands on and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import trivium
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json
from trivium.kit.metrics import read_metrics
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.pipeline.plan import plan

RECIPE = """\
name: grown
stages:
  words: {kind: tokenizer, data: ./texts.jsonl, vocabulary: 272}
  corpus: {kind: corpus, data: ./texts.jsonl, tokenizer: words}
  small: {kind: pretrain, data: corpus, model: {depth: 2, width: 32, heads: 2, head_width: 16}, context: 32,
          batch: 128, steps: 4}
  deep: {kind: grow, from: small, layers: 4}
  wide: {kind: grow, from: deep, width: 64}
  on: {kind: midtrain, from: wide, data: corpus, batch: 128, steps: 2, optimiser_state: keep,
       learning_rate: parent}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> trivium.Run:
    folder = tmp_path_factory.mktemp("grown")
    texts = [
        f'{{"text": "{one} and {other} make {one + other}."}}' for one in range(12) for other in range(9)
    ]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    (folder / "grown.yaml").write_text(RECIPE.replace("steps: 4}", "steps: 4, learning_rate: {to: 0.5}}"))
    return trivium.run(folder / "grown.yaml", runs=folder / "runs")


def test_transformers_opens_the_grown_folder_and_agrees(run: trivium.Run) -> None:
    ids = [[5, 17, 90, 44, 31, 200, 8]]
    logits = []
    for name in ("small", "deep", "wide"):
        model = transformers.AutoModelForCausalLM.from_pretrained(run[name].folder / "model")
        with torch.no_grad():
            logits.append(model(torch.tensor(ids)).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], rtol=0, atol=1e-4)
    ours = load_model(run["wide"].folder / "model")
    with torch.no_grad():
        found = ours.logits(ours(torch.tensor(ids[0]), Documents([7])))
    torch.testing.assert_close(found, logits[2][0], rtol=0, atol=1e-4)


def test_the_optimisers_state_and_rates_are_handed_on(run: trivium.Run) -> None:
    folders = {name: run[name].folder for name in ("small", "deep", "wide", "on")}
    moments = {name: load_tensors(folders[name] / "moments.safetensors") for name in folders}
    # Interleaved: the second old layer is the third of the deeper model.
    name = "mlp.down.weight"
    for one in ("first", "count"):
        assert torch.equal(
            moments["deep"][f"{one}.layers.2.{name}"], moments["small"][f"{one}.layers.1.{name}"]
        )
    assert f"first.layers.1.{name}" not in moments["deep"]
    torch.testing.assert_close(
        moments["wide"][f"first.layers.2.{name}"][:32, :88],
        moments["deep"][f"first.layers.2.{name}"][:, :88] / 2,
    )
    rates = [read_json(folders[one] / "training.json")["learning_rates"] for one in ("small", "wide")]
    assert rates[0] == rates[1]
    lines = read_metrics(folders["on"] / "metrics.jsonl")
    changes = {row["change"]: row["after"] for row in lines if "change" in row}
    assert "zero for" in changes["optimiser state"]


def test_what_the_small_model_read_is_not_forgotten(run: trivium.Run) -> None:
    """Growing reads nothing: the next stage goes on with the rows that the small model had not seen."""
    consumed = [
        read_json(run[one].folder / "training.json")["consumed"] for one in ("small", "deep", "wide", "on")
    ]
    assert consumed[0] == consumed[1] == consumed[2]
    (before,), (after,) = consumed[0].values(), consumed[3].values()
    assert after > before > 0


def test_the_summary_says_what_grew(run: trivium.Run) -> None:
    deep, wide = run["deep"].summary, run["wide"].summary
    assert deep["new_layers"] == [1, 3]
    assert deep["keeps_function"] is True
    assert deep["largest_difference"] < 1e-4
    assert wide["parameters"] > wide["parameters_before"] == deep["parameters"]
    assert read_json(run["deep"].folder / "new_layers.json") == [1, 3]


def test_a_quantised_model_is_not_grown(run: trivium.Run) -> None:
    folder = run["small"].folder.parent
    source = folder.parent.parent / "grown.yaml"
    text = source.read_text() + (
        "  q: {kind: quantize, from: small, data: {./texts.jsonl: {validation: 0.3}}, context: 32}\n"
        "  no: {kind: grow, from: q, layers: 4}\n"
    )
    (source.parent / "more.yaml").write_text(text)
    with pytest.raises(TriviumError, match="quantised to int8"):
        trivium.run(source.parent / "more.yaml", runs=folder.parent)


def test_plan_knows_the_size_of_a_model_that_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one and two"}\n' * 60)
    (tmp_path / "grown.yaml").write_text(RECIPE)
    rows = {row[0]: row[-1] for row in plan(tmp_path / "grown.yaml", tmp_path / "runs")}
    assert "layers 4" in rows["deep"]
    assert "width 64" in rows["wide"]
    assert "parameters" in rows["on"]
