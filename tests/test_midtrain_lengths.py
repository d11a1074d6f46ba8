"""Documents chosen by their length, and a source that stands twice in one mixture."""

from __future__ import annotations

import numpy as np
import pytest

import trivium
from tests.test_midtrain import RECIPE
from trivium.data.ingredients import Ingredient
from trivium.data.packed import PackedBatches, PackedRows
from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError
from trivium.pipeline.run import prepare
from trivium.stages import kinds

ROAD = """\
  mid:
    kind: midtrain
    from: base
    data:
      long:  {of: corpus, min_tokens: 60, weight: 0.75}
      short: {of: corpus, max_tokens: 59, weight: 0.25}
    context: {length: 128, method: yarn}
    batch: 256
    steps: 8
    learning_rate: 0.001
  again:
    kind: midtrain
    from: mid
    data: {only: {of: ./texts, min_tokens: 60, validation: 0.1}}
    replay: 0.5
    batch: 256
    steps: 4
    learning_rate: 0.001
"""


def road(folder, text):
    (folder / "texts").mkdir()
    lines = [
        " ".join(f"{one} and {other} make {one + other}." for other in range(12 if one % 10 == 0 else 1))
        for one in range(300)
    ]
    (folder / "texts" / "sums.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    (folder / "tiny.yaml").write_text(RECIPE[: RECIPE.index("  fork:")] + text)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    path = road(folder, ROAD)
    return path, trivium.run(path, runs=folder / "runs")


@pytest.mark.slow
def test_long_documents_of_a_mixed_source_have_the_share_they_are_given(made):
    path, run = made
    shards = Shards(run["corpus"].folder / "data")
    sizes = {shards.id(index): int(size) for index, size in enumerate(shards.lengths)}
    assert np.mean(np.array(list(sizes.values())) >= 60) < 0.15
    met = {"long": set(), "short": set()}
    for step in range(1, 9):
        rows, _ = kinds()["midtrain"].batch_of(*stage_and_work(path, "mid"), step)
        for row in rows:
            for source, name in zip(row.sources, row.ids, strict=True):
                met["long" if source == 0 else "short"].add(sizes[name])
    assert min(met["long"]) >= 60 > max(met["short"])
    shares = {name: one["share"] for name, one in run["mid"].summary["data"].items()}
    assert shares == pytest.approx({"long": 0.75, "short": 0.25}, abs=1 / 16)
    assert {
        name for row in run["mid"].metrics for name in ("long", "short") if any(name in key for key in row)
    }


def stage_and_work(path, name):
    from trivium.pipeline.run import _work

    prepared = prepare(path, path.parent / "runs")
    node = prepared.nodes[name]
    return node.stage, _work(prepared, node, prepared.entry(name), None, resume=True)


def test_a_child_replays_both_parts_and_spells_the_same_source_under_its_own_name(made):
    _, run = made
    data = run["again"].summary["data"]
    assert list(data) == ["only", "long", "short"]
    assert data["long"]["share"] == pytest.approx(0.375, abs=0.1)
    only, long = data["only"], data["long"]
    assert only["rows"] == long["rows"]


def test_only_documents_that_fit_are_packed(made):
    shards = Shards(made[1]["corpus"].folder / "data")
    for within in ((60, None), (0, 59), (20, 30)):
        packed = PackedRows(shards, 128, within=within)
        fits = [size for size in shards.lengths.tolist() if within[0] <= size <= (within[1] or 1e9)]
        assert packed.packing.tokens + packed.packing.dropped_tokens == sum(fits)
        assert len(set(packed.packing.documents.tolist())) == len(fits)
    plans = [
        PackedBatches(
            [Ingredient("a", shards, within=one)], context=32, batch_tokens=32, seed=0, steps=1
        ).plan
        for one in ((0, None), (0, 10_000))
    ]
    assert plans[0].hash != plans[1].hash


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("{long: {of: corpus, min_tokens: 60, max_tokens: 20}}", "no document has as few"),
        ("{./a: {of: corpus}}", "a name without a dot"),
        ("{long: {of: nowhere}}", "`nowhere` is neither a stage"),
    ],
)
def test_portions_that_cannot_be_are_refused(tmp_path, data, error):
    text = f"  mid: {{kind: midtrain, from: base, data: {data}, steps: 2}}\n"
    with pytest.raises(TriviumError, match=error):
        prepare(road(tmp_path, text), tmp_path / "runs")


def test_one_source_is_not_held_out_in_two_ways(tmp_path):
    data = "{long: {of: ./texts, min_tokens: 60}, short: {of: ./texts, validation: 0.2}}"
    text = f"  mid: {{kind: midtrain, from: base, data: {data}, batch: 256, steps: 2}}\n"
    with pytest.raises(TriviumError, match=r"`long` and `short` read `\./texts` with another `validation`"):
        trivium.run(road(tmp_path, text), runs=tmp_path / "runs")


@pytest.mark.parametrize(
    "stage",
    [
        "{kind: sft, from: base, data: {long: {of: ./texts}}, steps: 2}",
        "{kind: sft, from: base, data: ./texts, replay: {share: 0.2, data: {corpus: {min_tokens: 60}}}}",
        "{kind: rlvr, from: base, data: {./texts: {max_tokens: 60}}, reward: [math], steps: 2}",
        "{kind: preference, from: base, data: {long: {of: ./texts}}, steps: 2}",
    ],
)
def test_stages_that_cannot_choose_by_length_refuse_to_when_planned(tmp_path, stage):
    with pytest.raises(TriviumError, match="chosen by length or stands under another name"):
        prepare(road(tmp_path, f"  after: {stage}\n"), tmp_path / "runs")


def test_a_bare_replay_of_what_was_chosen_by_length_is_refused_where_it_cannot_be(made):
    path, _ = made
    text = path.read_text() + "  taught: {kind: sft, from: mid, data: ./texts, replay: 0.2, steps: 2}\n"
    (path.parent / "more.yaml").write_text(text)
    with pytest.raises(TriviumError, match="mid chose `long` by the length"):
        trivium.run(path.parent / "more.yaml", runs=path.parent / "runs", only=["taught"])
