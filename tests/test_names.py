"""One name everywhere: a stage, its folder and a Hugging Face folder mean the same model to every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import trivium
from trivium.cli import main
from trivium.kit.errors import TriviumError
from trivium.lab.gather import find
from trivium.model.hub import resolve
from trivium.model.named import find_model, find_stage
from trivium.pipeline.listing import results, table
from trivium.pipeline.store import Entry
from trivium.serve.models import open_engine

RECIPE = """\
name: tiny
stages:
  words: {kind: tokenizer, data: ./texts, vocabulary: 268}
  base:
    kind: pretrain
    data: ./texts
    tokenizer: words
    model: {depth: 1, width: 32}
    context: 32
    batch: 64
    steps: 2
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    (folder / "texts").mkdir()
    (folder / "texts" / "sums.txt").write_text(
        "\n\n".join(f"{one} and 3 make {one + 3}." for one in range(40))
    )
    (folder / "tiny.yaml").write_text(RECIPE)
    trivium.run(folder / "tiny.yaml", runs=folder / "runs")
    return folder / "runs"


def test_every_name_of_a_stage_is_the_same_model(runs, monkeypatch):
    model = (runs / "tiny" / "base").resolve() / "model"
    entry = model.parent.name
    monkeypatch.chdir(runs.parent)
    for name in ("tiny/base", "base", "runs/tiny/base", "runs/tiny/base/model", entry, entry[:9], str(model)):
        assert find_model(name).resolve() == model, name
        assert find(name, Path("runs")).folder.resolve() == model, name
    names = ("tiny/base", "runs/tiny/base", entry)
    logits = [trivium.load(name).logits([5, 6, 7]) for name in names]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert open_engine("tiny/base").model.config.width == 32


def test_the_folder_of_a_stage_opens_in_transformers(runs):
    folder = runs / "tiny" / "base"
    mine = trivium.load(folder)
    ids = mine.tokenizer.encode("3 and 4 make 7.")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("3 and 4 make 7.").input_ids == ids
    assert AutoTokenizer.from_pretrained(runs / "tiny" / "words")("3 and 4 make 7.").input_ids == ids
    assert torch.allclose(theirs(torch.tensor([ids])).logits[0], mine.logits(ids), atol=5e-5)


def test_readers_that_take_every_file_of_weights_are_kept_from_the_moments(runs):
    """vLLM reads all safetensors files of a folder, unless an index names those that hold weights."""
    folder = runs / "tiny" / "base"
    assert (folder / "moments.safetensors").is_file()
    named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(named.values()) == {"model.safetensors"}
    assert named.keys() == load_file(folder / "model.safetensors").keys()


def test_the_links_are_no_part_of_what_is_sealed_and_come_back(runs):
    entry = Entry((runs / "tiny" / "base").resolve())
    (entry.folder / "config.json").unlink()
    prepared = trivium.run(runs.parent / "tiny.yaml", runs=runs)
    assert prepared.became["base"] == "reused"
    assert (entry.folder / "config.json").is_symlink()
    entry.verify(entry.output)
    assert resolve(entry.folder) == entry.output


def test_a_stage_that_did_not_run_is_not_looked_for_on_the_hub(runs, monkeypatch):
    def asked(*given, **settings):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("trivium.model.named.resolve", asked)
    with pytest.raises(TriviumError, match=r"the recipe tiny has no stage bse .* did you mean tiny/base"):
        find_model("tiny/bse", runs)
    with pytest.raises(TriviumError, match=r"neither a folder nor a stage under .* did you mean base"):
        find_model("bases", runs)
    with pytest.raises(TriviumError, match="is a tokenizer stage, which makes no model"):
        find_model("tiny/words", runs)


def test_a_name_of_the_hub_says_that_no_stage_is_called_so(runs):
    with pytest.raises(TriviumError, match=r"no stage laptop/sft has run under .*, and on the hub: "):
        find_model("laptop/sft", runs)


def test_ls_lists_states_dates_and_earlier_settings(tmp_path, capsys):
    recipe, runs = write_recipe(tmp_path), str(tmp_path / "runs")
    trivium.run(recipe, runs=runs)
    before = (tmp_path / "runs" / "toy" / "left").resolve().name
    trivium.run(recipe, runs=runs, set={"left.steps": 3})
    found = {one["name"]: one for one in results(runs)}
    assert set(found) == {"toy/words", "toy/base", "toy/right", "toy/left", before}
    assert found["toy/left"]["tokens"] == 3000
    assert found[before]["tokens"] == 2000
    assert found[before]["earlier_settings"]
    rows = table(results(runs, "toy"))
    assert rows[-1][2] == "done, earlier settings"
    assert rows[-1][3].startswith("20")
    assert find_stage(before, runs) == (tmp_path / "runs" / "store" / before).resolve()
    main(["ls", "--runs", runs, "--cost"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("toy: all")
    assert max(map(len, printed)) <= 100
    main(["ls", "--runs", runs, "--json"])
    assert {one["name"] for one in json.loads(capsys.readouterr().out)} == set(found)


def test_ls_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(TriviumError, match="start with `trivium run`"):
        results(tmp_path)
    trivium.run(write_recipe(tmp_path), runs=tmp_path / "runs", only=["words"])
    with pytest.raises(TriviumError, match="did you mean `toy`"):
        results(tmp_path / "runs", "tou")
