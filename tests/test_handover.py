"""What a stage takes over from its parent: rates, moments, and what is said about both."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

import trivium
from tests.test_midtrain import RECIPE, changes, recipe
from tests.tuning import own, save, small_model, write_rows
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json, write_json
from trivium.learn.settings import Training
from trivium.model.config import ModelConfig
from trivium.pipeline import show
from trivium.pipeline.plan import plan
from trivium.pipeline.show import documents
from trivium.pipeline.store import Entry
from trivium.stages.parts.parents import GROUPS, rates_after
from trivium.stages.parts.stage import Stage

BASE = RECIPE[: RECIPE.index("  fork:")]
MORE = """\
  tongue:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.2}}
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 3
    learning_rate: 0.002
    optimiser_state: keep
  other-hand:
    kind: midtrain
    from: base@step=4
    data: corpus
    batch: 256
    steps: 3
    optimiser: adamw
    learning_rate: 0.001
    optimiser_state: keep
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handover")
    path = recipe(folder, BASE + MORE)
    return path, folder / "runs", trivium.run(path, runs=folder / "runs")


def test_the_log_says_that_new_rows_have_no_moments_yet(made):
    _, _, run = made
    before, after = changes(run["tongue"])["optimiser state"]
    total = len(
        [name for name in load_tensors(run["base"].folder / "moments.safetensors") if "first." in name]
    )
    assert before == "the parent's"
    rows = "the new rows of embedding.weight, head.weight"
    assert after == f"the parent's for {total} of {total} parameters, zero for {rows}"


def test_the_log_says_that_adamw_has_no_moments_of_muons_matrices(made):
    _, _, run = made
    said = changes(run["other-hand"])
    assert said["optimiser"] == ("muon", "adamw")
    before = load_tensors(run["base"].folder / "moments.safetensors")
    names = {name.removeprefix("first.") for name in before if name.startswith("first.")}
    matrices = {name for name in names if f"second.{name}" not in before}
    assert f"for {len(names - matrices)} of {len(names)} parameters" in said["optimiser state"][1]
    assert f"and {len(matrices) - 2} more" in said["optimiser state"][1]
    # Three steps of their own, and the four of the parent for what was AdamW's before.
    after = load_tensors(run["other-hand"].folder / "moments.safetensors")
    assert {int(after[f"count.{name}"]) for name in matrices} == {3}
    assert {int(after[f"count.{name}"]) for name in names - matrices} == {7}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other-hand.learning_rate": "parent"}, "base@step=4 was trained by muon"),
        ({"tongue.learning_rate": "parent"}, "the learning rate of base ended at 0"),
        (
            {"other-hand.adapter": {"rank": 2}, "other-hand.learning_rate": 0.002},
            "nothing of the parent's optimiser state fits",
        ),
    ],
)
def test_what_means_nothing_here_is_refused(made, changes, said):
    path, runs, _ = made
    with pytest.raises(TriviumError, match=said):
        trivium.run(path, runs=runs, set=changes, only=["tongue", "other-hand"])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("rate", "left"),
    [
        ("{decay: linear}", 0.0),
        ("{decay: cosine, to: 0.1}", 0.1),
        ("{decay: 1-sqrt}", 0.0),
        ("{decay: constant}", 1.0),
        ("{decay: wsd}", 0.0),
    ],
)
def test_the_rate_that_is_left_follows_from_the_decay_and_where_it_goes(tmp_path, rate, left):
    path = recipe(tmp_path, BASE.replace("{decay: wsd}", rate))
    run = trivium.run(path, runs=tmp_path / "runs", only=["base"])
    found = read_json(run["base"].folder / "training.json")
    assert found["learning_rates"]["matrices"] == pytest.approx(
        left * found["peak_learning_rates"]["matrices"]
    )
    assert found["optimiser"] == "muon"


AGAIN = """\
  next:
    kind: midtrain
    from: base@step=4
    data: corpus
    batch: 256
    steps: 4
    learning_rate: 0.002
  grown:
    kind: midtrain
    from: next
    data: {corpus: {max_repeats: 8}}
    context: [8, 16, 32]
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 8
    learning_rate: 0.002
  soup: {kind: merge, of: [grown, grown]}
  last:
    kind: midtrain
    from: soup
    data: {./other: {validation: 0.2, weight: [1, 3]}}
    ramp: cosine
    replay: 0.5
    batch: 256
    steps: 4
    learning_rate: 0.002
"""


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    folder = tmp_path_factory.mktemp("road")
    path = recipe(folder, BASE + AGAIN)
    return path, folder / "runs", trivium.run(path, runs=folder / "runs")


def left_by(stage):
    return read_json(stage.folder / "training.json")["consumed"]


@pytest.mark.slow
def test_a_fork_goes_on_with_the_row_after_the_last_one_of_its_parent(road):
    _, _, run = road
    fork = [documents(Entry(run["next"].folder), step) for step in range(1, 5)]
    base = [documents(Entry(run["base"].folder), step) for step in range(1, 9)]
    assert fork == base[4:]
    assert left_by(run["next"]) == left_by(run["base"])


def test_passes_are_counted_over_the_whole_line_of_stages(road):
    _, _, run = road
    (origin,) = left_by(run["base"])
    rows = run["base"].summary["data"]["corpus"]["rows"]
    assert left_by(run["base"])[origin] == pytest.approx(8 * 256 / 32 / rows)
    # Spelt anew, in rows of three lengths, it is the same source still.
    grown = run["grown"].summary
    assert grown["steps"] == 8
    assert list(left_by(run["grown"])) == [origin]
    assert left_by(run["grown"])[origin] == pytest.approx(grown["data"]["corpus"]["passes"])
    before, after = changes(run["grown"])["passes over corpus"]
    assert before == pytest.approx(left_by(run["base"])[origin], abs=1e-3)
    assert after > before + 0.5
    # A soup hands on what its ingredients saw.
    before, after = changes(run["last"])["passes over corpus"]
    assert before == pytest.approx(left_by(run["grown"])[origin], abs=1e-3)
    assert after > before


def test_a_cap_counts_what_ancestors_saw_and_a_bare_replay_keeps_it(road):
    path, runs, run = road
    (passes,) = left_by(run["base"]).values()
    # Half of them are the parent's, half the child's own: either alone is below the cap.
    cap = {"next.data": {"corpus": {"max_repeats": 0.75 * passes}}}
    with pytest.raises(TriviumError, match="already seen"):
        trivium.run(path, runs=runs, set=cap, only=["next"])
    with pytest.raises(TriviumError, match="over `max_repeats` 8"):
        trivium.run(path, runs=runs, set={"last.steps": 400}, only=["last"])


def test_the_log_shows_positions_that_stay_and_what_is_replayed(road):
    _, _, run = road
    before, after = changes(run["next"])["positions"]
    assert before == after
    assert "32 tokens" in after
    assert changes(run["last"])["replay"][1] == {"share": 0.5, "corpus": 1.0}


@pytest.mark.slow
def test_a_replay_that_is_named_is_logged_and_moves_as_the_ramp_says(tmp_path):
    replay = "{share: 0.5, data: {./texts: {weight: [3, 0], validation: 0.1}, corpus: {weight: [0, 3]}}}"
    stages = (
        AGAIN[AGAIN.index("  last:") :].replace("soup", "base").replace("replay: 0.5", f"replay: {replay}")
    )
    path = recipe(tmp_path, BASE + stages.replace("steps: 4", "steps: 40"))
    run = trivium.run(path, runs=tmp_path / "runs", only=["last"])
    assert changes(run["last"])["replay"][1] == {"share": 0.5, "./texts": [3, 0], "corpus": [0, 3]}
    # Of 40 replayed rows of the first quarter the source that comes has 2 under a cosine, 5 under a line.
    entry = Entry(run["last"].folder)
    stage = Stage.kinds["midtrain"].model_validate(entry.record["settings"])
    work = show._work(entry, entry.record)
    drawn = [row.sources[0] for step in range(1, 11) for row in stage.batch_of(work, step)[0]]
    assert 1 <= drawn.count(2) <= 3
    assert 36 <= drawn.count(1) <= 39


@pytest.mark.parametrize(
    ("place", "kept", "said"),
    [
        (
            "step=5",
            "[step=4]",
            r"`base` keeps no checkpoint at step=5; write `checkpoint: \{at: \[step=5\]\}`",
        ),
        ("tokens=1k", "[step=4]", "`base` keeps no checkpoint at tokens=1k"),
        ("step=9", "[step=9]", "`base` ends after 8 steps, before step=9"),
    ],
)
def test_a_checkpoint_that_nobody_keeps_is_refused_by_the_plan(tmp_path, place, kept, said):
    text = BASE.replace("[step=4]", kept) + AGAIN[: AGAIN.index("  grown:")].replace("step=4", place)
    path = recipe(tmp_path, text)
    with pytest.raises(TriviumError, match=said):
        plan(path, tmp_path / "runs")


def test_a_checkpoint_may_be_written_as_a_bare_step_or_in_thousands(tmp_path):
    text = BASE.replace("[step=4]", "[4, tokens=1k]") + AGAIN[: AGAIN.index("  grown:")]
    more = AGAIN[: AGAIN.index("  grown:")].replace("next", "thousand").replace("step=4", "tokens=1000")
    assert len(plan(recipe(tmp_path, text + more), tmp_path / "runs")) == 7


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["ppo", "rlvr"])
@pytest.mark.parametrize("before", ["muon", "adamw"])
def test_a_number_scales_the_rates_that_the_parent_had_and_another_optimiser_is_said(tmp_path, kind, before):
    peak = {"matrices": 0.04, "embeddings": 0.01, "head": 0.002, "scalars": 0.03}
    save(tmp_path / "parent" / "model", small_model(own()), own())
    write_json(
        tmp_path / "parent" / "training.json",
        {"learning_rates": peak, "peak_learning_rates": peak, "weight_decay": 0.1, "optimiser": before},
    )
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{asked} the"} for asked in ("in", "by", "for")])
    path = tmp_path / "more.yaml"
    path.write_text(
        f"name: more\nstages:\n  more: {{kind: {kind}, from: ./parent/model, data: ./prompts.jsonl, "
        "reward: [random], steps: 1, prompts: 2, group: 2, max_new_tokens: 4, optimiser: muon, "
        "learning_rate: 0.004}\n"
    )
    more = trivium.run(path, runs=tmp_path / "runs")["more"]
    found = read_json(more.folder / "training.json")["peak_learning_rates"]
    assert changes(more)["learning rate"] == (0.04, pytest.approx(0.004))
    if before == "muon":
        assert found == pytest.approx({group: rate / 10 for group, rate in peak.items()})
    else:
        assert changes(more)["optimiser"] == ("adamw", "muon")


@pytest.mark.parametrize("width", [32, 768, 3072])
def test_adamws_own_rate_falls_with_the_root_of_the_width(tmp_path, width):
    """1e-3 at a width of 768, for every group alike; nothing is known of the parent."""
    said = []
    work = SimpleNamespace(change=lambda *change: said.append(change))
    config = ModelConfig(vocabulary=64, width=width, layers=1, heads=1, inner_width=64, context=32)
    rates = rates_after(work, Training(optimiser="adamw"), "parent", tmp_path / "model", config)
    wanted = 1e-3 * math.sqrt(768 / width)
    assert [rates.of(group) for group in GROUPS] == [pytest.approx(wanted)] * len(GROUPS)
    assert said == [("learning rate", "unknown", pytest.approx(wanted))]
