"""What a model is known to have learnt: under another spelling, through a merge, up to a kept checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest

import trivium
from tests.test_midtrain import RECIPE, changes, recipe
from trivium.data.overlap import TokenisedData, also_in
from trivium.data.shards import Shards, write_shards
from trivium.data.sources import Document, read_documents
from trivium.data.split import in_validation, text_hash
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.stages.parts.inheritance import consumed_by, held_out_by, kept_model, learnt_by, trained_on
from trivium.tokens.train import train_tokenizer

BASE = RECIPE[: RECIPE.index("  fork:")]
GROWN = """\
  tongue:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.2}}
    replay: 0.25
    watch: {./texts: {validation: 0.6}}
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 2
  after:
    kind: midtrain
    from: tongue
    data: {./third: {validation: 0}}
    watch: {./texts: {validation: 0.6}, ./other: {validation: 0.7}}
    batch: 256
    steps: 2
"""
KEPT = """\
  mixed:
    kind: midtrain
    from: base
    data:
      corpus: {weight: [[0, 1], [0.5, 1], [0.5, 0], [1, 0]]}
      ./other: {weight: [[0, 0], [0.5, 0], [0.5, 1], [1, 1]]}
    batch: 256
    steps: 8
    checkpoint: {at: [step=2]}
  soup: {kind: merge, of: [mixed@step=2, mixed@step=2]}
  longer: {kind: merge, of: [mixed, mixed@step=2]}
  again: {kind: midtrain, from: soup, data: {./third: {validation: 0}}, replay: 0.5, batch: 256, steps: 2}
"""


def run(folder, text, **options):
    path = recipe(folder, BASE.replace("steps: 8", "steps: 4") + text)
    (folder / "third").mkdir()
    lines = "".join(json.dumps({"text": f"third {one} of many."}) + "\n" for one in range(40))
    (folder / "third" / "some.jsonl").write_text(lines)
    return trivium.run(path, runs=folder / "runs", **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return run(tmp_path_factory.mktemp("shares"), SHARES)


def left_shares(folder):
    return read_json(folder / "training.json")["shares"]


@pytest.mark.slow
def test_over_several_lengths_the_shares_are_those_of_all_tokens_so_far(tmp_path):
    text = KEPT[: KEPT.index("  soup:")].replace("steps: 8", "steps: 8\n    context: {length: [8, 16]}")
    made = run(tmp_path, text)
    kept, whole = kept_model(made["mixed"].folder, "step=2").parent, made["mixed"]
    assert left_shares(kept) == {"corpus": 1.0, "./other": 0.0}
    assert left_shares(whole.folder) == {name: one["share"] for name, one in whole.summary["data"].items()}


def texts_within(folder, share):
    return sum(in_validation(text_hash(one), share) for one in read_documents(str(folder)))


def test_what_was_learnt_before_the_vocabulary_grew_is_not_measured(tmp_path, capsys):
    made = run(tmp_path, GROWN)
    said = capsys.readouterr().err
    held = len(Shards(made["corpus"].folder / "data", "validation"))
    wider, more = texts_within(tmp_path / "texts", 0.6), texts_within(tmp_path / "other", 0.7)
    other = texts_within(tmp_path / "other", 0.2)
    for stage in ("tongue", "after"):
        assert f"{stage}: ./texts: {wider - held} of {wider} held-out documents are trained on" in said
    assert f"after: ./other: {more - other} of {more} held-out documents are trained on" in said
    names = {one.shards.folder.parent.name for one in trained_on([made["after"].folder / "model"])}
    assert names == {"tokenised", made["corpus"].folder.name}


@pytest.mark.slow
def test_a_corpus_that_was_spelt_anew_counts_as_it_was_spelt(tmp_path):
    text = GROWN[: GROWN.index("  after:")].replace("replay: 0.25", "replay: {data: corpus, share: 0.25}")
    made = run(tmp_path, text)
    learnt = trained_on([made["tongue"].folder / "model"])
    assert {one.shards.folder.parent.name for one in learnt} == {
        "tokenised",
        "retokenised",
        made["corpus"].folder.name,
    }


@pytest.mark.slow
def test_through_a_merge_a_kept_checkpoint_is_what_counts(tmp_path):
    made = run(tmp_path, KEPT)
    kept = kept_model(made["mixed"].folder, "step=2")
    soup = made["soup"].folder / "model"
    assert consumed_by(soup) == consumed_by(kept) == read_json(kept.parent / "training.json")["consumed"]
    assert consumed_by(soup) != consumed_by(made["mixed"].folder / "model")
    # Of parents that read a source for different times, the longest counts, whichever is named first.
    assert consumed_by(made["longer"].folder / "model") == consumed_by(made["mixed"].folder / "model")
    assert {name: one.weight for name, one in learnt_by("x", "soup", soup).mixture.items()} == {"corpus": 1.0}
    whole = learnt_by("x", "mixed", made["mixed"].folder / "model").mixture
    assert {name: one.weight for name, one in whole.items()} == {"corpus": 0.5, "./other": 0.5}
    assert left_shares(made["base"].folder) == {"corpus": 1.0}
    assert made["again"].summary["data"].keys() == {"./third", "corpus"}
    passes = list(consumed_by(kept).values())
    assert changes(made["again"])["passes over corpus"][0] in [pytest.approx(one, abs=1e-3) for one in passes]
    assert trained_on([soup])


SHARES = """\
  wide: {kind: midtrain, from: base, data: {./other: {validation: 0.5}}, batch: 256, steps: 1}
  narrow: {kind: midtrain, from: base, data: {./other: {validation: 0.1}}, batch: 256, steps: 1}
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [("wide", "narrow"), ("narrow", "wide")])
def test_what_several_models_held_out_is_what_the_smallest_share_held_out(order, shared):
    models = {name: shared[name].folder / "model" for name in order}
    mixture, places = held_out_by("x", models)
    assert mixture["./other"].validation == 0.1
    texts = [one for one in read_documents(str(places["./other"])) if in_validation(text_hash(one), 0.1)]
    assert texts
    for model in models.values():
        learnt = {one.shards.folder.parent.name: one.shards for one in trained_on([model])}["tokenised"]
        ids = {learnt.id(index) for index in range(len(learnt))}
        assert ids
        assert not ids & {one.id for one in texts}


def texts_of(numbers):
    return [Document(f"one {number} is {number * 7 % 11} here", {}, str(number)) for number in numbers]


def test_held_out_documents_are_found_in_any_spelling(tmp_path):
    words = train_tokenizer([one.text for one in texts_of(range(50))], 270)
    other = train_tokenizer([one.text for one in texts_of(range(500))], 400)
    other.save(tmp_path / "other")
    write_shards(texts_of(range(300)), words, tmp_path / "held", validation=0.5)
    write_shards(texts_of(range(100, 160)), words, tmp_path / "alike")
    write_shards(texts_of(range(150, 200)), other, tmp_path / "apart")
    held = Shards(tmp_path / "held", "validation")
    learnt = [
        TokenisedData(Shards(tmp_path / "held")),
        TokenisedData(Shards(tmp_path / "alike")),
        TokenisedData(Shards(tmp_path / "apart"), tmp_path / "other"),
    ]
    found = also_in({"held": held}, learnt, words)["held"]
    assert found == {index for index in range(len(held)) if 100 <= int(held.id(index)) < 200}
    assert also_in({"held": held}, learnt[:1], words) == {"held": set()}
    assert not np.array_equal(learnt[1].shards.document(50), learnt[2].shards.document(0))


EASY = """\
  mid:
    kind: midtrain
    from: base
    data:
      any: {of: ./graded, min_tokens: 12, validation: 0.1}
      few: {of: ./graded, max_tokens: 11, validation: 0.1, easy_first: hard}
    batch: 256
    steps: 2
"""


def graded(folder):
    (folder / "graded").mkdir()
    lines = [
        {"text": " ".join(f"{one} and" for one in range(place % 7 + 1)), "hard": place, "dull": -place}
        for place in range(60)
    ]
    (folder / "graded" / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


@pytest.mark.slow
def test_one_of_two_portions_of_a_source_may_come_easy_first(tmp_path):
    graded(tmp_path)
    made = run(tmp_path, EASY)
    (folder,) = (made["mid"].folder / "tokenised").iterdir()
    assert Shards(folder).manifest["columns"] == ["hard"]
    assert made["mid"].summary["data"].keys() == {"any", "few"}


@pytest.mark.slow
def test_portions_of_a_source_in_data_and_in_replay_are_read_alike(tmp_path):
    graded(tmp_path)
    text = EASY.replace("      few:", "    replay:\n      share: 0.5\n      data:\n        few:").replace(
        "easy_first: hard", "easy_first: dull"
    )
    made = run(tmp_path, text)
    (folder,) = (made["mid"].folder / "tokenised").iterdir()
    assert Shards(folder).manifest["columns"] == ["dull"]
    other = text.replace("max_tokens: 11, validation: 0.1", "max_tokens: 11, validation: 0.2")
    path = tmp_path / "tiny.yaml"
    path.write_text(BASE.replace("steps: 8", "steps: 4") + other)
    with pytest.raises(TriviumError, match=r"`few` and `any` read `\./graded` with another `validation`"):
        trivium.run(path, runs=tmp_path / "runs")


@pytest.mark.slow
def test_a_corpus_that_is_spelt_anew_keeps_its_numbers(tmp_path):
    graded(tmp_path)
    text = """\
  marked: {kind: corpus, data: ./graded, tokenizer: words, columns: [hard], validation: 0.1}
  mid:
    kind: midtrain
    from: base
    data: {marked: {easy_first: hard}}
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 2
"""
    made = run(tmp_path, text)
    (folder,) = (made["mid"].folder / "retokenised").iterdir()
    before, after = Shards(made["marked"].folder / "data"), Shards(folder)
    assert len(set(before.column("hard").tolist())) > 5
    assert np.array_equal(before.column("hard"), after.column("hard"))
