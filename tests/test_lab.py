"""The lab: what is compared, how far models lie apart, and what is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lab import TASKS, answered, collected, report_of, two_models
from test_tokens import own
from test_tokens_chat import with_template
from toys import write_recipe
from tuning import save, small_model, write_rows

import trivium
from trivium.cli import cli
from trivium.grade.learned import LearnedScorer
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.lab import behaviour, distance, gather_answers
from trivium.lab.behaviour import NO_KL, Passage, apart, divergence, encode, passages
from trivium.lab.compare import compare
from trivium.lab.compare_numbers import numbers
from trivium.lab.compare_stages import curves
from trivium.lab.gather import Member, Seen, compared_with, find, find_all, stages_above
from trivium.lab.gather_answers import default_tasks
from trivium.pipeline.run import run
from trivium.recipe.schema import load


def test_divergences_against_plain_sums(tmp_path: Path):
    one, other = (trivium.load(folder) for folder in two_models(tmp_path))
    ids = one.tokenizer.encode("the river rises in the hills")
    places = range(1, len(ids) - 1)
    found = apart(one.transformer, other.transformer, ids, places, one.tokenizer.vocabulary_size)
    for place, row in enumerate(range(1, len(ids) - 1)):
        p, q = (torch.softmax(model.logits(ids)[row].double(), -1).numpy() for model in (one, other))
        m = (p + q) / 2
        assert found["kl"][place] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-4)
        assert found["reverse"][place] == pytest.approx((q * np.log(q / p)).sum(), abs=1e-4)
        js = ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2
        assert found["js"][place] == pytest.approx(js, abs=1e-4)
        assert found["entropy"][place] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
        assert found["logprob before"][place] == pytest.approx(math.log(q[ids[row + 1]]), abs=1e-4)
    assert len(found["kl"]) == len(ids) - 2
    assert max(found["js"]) <= math.log(2)


def test_scores_are_compared_one_row_at_a_time_where_no_more_fit(tmp_path: Path, monkeypatch):
    one, other = (trivium.load(folder) for folder in two_models(tmp_path))
    ids = one.tokenizer.encode("the river rises in the hills")
    arguments = (one.transformer, other.transformer, ids, range(len(ids) - 1), one.tokenizer.vocabulary_size)
    whole = apart(*arguments)
    monkeypatch.setattr(behaviour, "_SCORES_AT_ONCE", 1)
    assert apart(*arguments)["kl"] == pytest.approx(whole["kl"], abs=1e-6)


def test_a_curve_has_two_points_at_least():
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert curves(rows)["loss"] == [[1, 3.0], [2, 2.0]]
    assert curves(rows[:1]) == {}


def test_a_model_lies_nowhere_apart_from_itself(tmp_path: Path):
    model = trivium.load(two_models(tmp_path)[0])
    ids = model.tokenizer.encode("the river rises")
    found = apart(
        model.transformer, model.transformer, ids, range(len(ids) - 1), model.tokenizer.vocabulary_size
    )
    assert found["kl"] == found["js"] == [0.0] * (len(ids) - 1)


def test_of_a_conversation_only_the_answer_is_looked_at():
    tokenizer = own()
    for passage in passages({}, count=3):
        ids, places = encode(passage, tokenizer, 512)
        seen = tokenizer.decode([ids[place + 1] for place in places])
        assert seen.strip() == passage.text.strip()
    prose = Passage("p", "prose", "", "the river rises")
    ids, places = encode(prose, tokenizer, 512)
    assert places == list(range(len(ids) - 1))


def test_models_that_cut_text_otherwise_get_a_sentence_and_no_number(tmp_path: Path):
    first = Member("first", save(tmp_path / "a", small_model(own()), own()))
    tokenizer = with_template("llama3")
    second = Member("second", save(tmp_path / "b", small_model(tokenizer), tokenizer))
    found = divergence(second, first, passages({}, count=2), tmp_path)
    assert found["why_not"] == NO_KL
    assert found["texts"] == []
    page = compare(
        [str(tmp_path / "a"), str(tmp_path / "b")], runs=tmp_path, to=tmp_path / "p.html", on=TASKS[:1]
    )
    assert page["numbers"]["behaviour"]["pairs"][0]["all"] == {}
    assert "no divergence per token can be given" in (tmp_path / "p.html").read_text()


def test_a_second_comparison_asks_nothing(tmp_path: Path, monkeypatch):
    models = two_models(tmp_path)
    first = compare(models, runs=tmp_path, to=tmp_path / "one.html", on=TASKS)
    monkeypatch.setattr(gather_answers, "evaluate", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr("trivium.lab.gather.load_model", lambda *_, **__: pytest.fail("weights were read"))
    again = compare(models, runs=tmp_path, to=tmp_path / "two.html", on=TASKS)
    assert first["numbers"] == again["numbers"]
    with pytest.raises(pytest.fail.Exception):
        compare(models, runs=tmp_path, to=tmp_path / "two.html", on=[{**TASKS[0], "seed": 5}])


def test_what_is_kept_belongs_to_the_weights_the_files_and_the_code_that_asks(tmp_path: Path, monkeypatch):
    models = two_models(tmp_path)
    first, second = (find(name, tmp_path) for name in models)
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == find(models[0], tmp_path).fingerprint
    file = tmp_path / "q.jsonl"
    file.write_text("{}\n")
    before = gather_answers._question("own", {}, {"data": str(file)})
    file.write_text('{"prompt": "2 + 2"}\n')
    now = gather_answers._question("own", {}, {"data": str(file)})
    assert now != before
    monkeypatch.setattr(gather_answers, "code", lambda: "another way to judge")
    assert gather_answers._question("own", {}, {"data": str(file)}) != now


def test_everything_follows_from_the_json_beside_the_page(tmp_path: Path):
    from trivium.lab.page import page

    compare(two_models(tmp_path), runs=tmp_path, to=tmp_path / "page.html", on=TASKS)
    kept = read_json(tmp_path / "page.json")
    assert numbers(kept["collected"]) == kept["numbers"]
    assert page(kept) == (tmp_path / "page.html").read_text(encoding="utf-8")
    kept["numbers"]["skills"][0]["cells"]["first"]["value"] = 0.123
    assert page(kept) != (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_model_alone_and_a_model_without_a_pair_have_a_page(tmp_path: Path):
    name = two_models(tmp_path)[0]
    found = compare([name], runs=tmp_path, to=tmp_path / "page.html", on=TASKS[:1])
    assert found["collected"]["before"] == {}
    assert "nothing to compare" in (tmp_path / "page.html").read_text()


def test_a_name_that_is_nothing_and_a_name_said_twice(tmp_path: Path):
    with pytest.raises(TriviumError, match="neither a folder nor a stage"):
        find("sfft", tmp_path)
    name = two_models(tmp_path)[0]
    with pytest.raises(TriviumError, match="named twice"):
        find_all([name, name], tmp_path)


def test_a_model_is_measured_against_the_nearest_it_grew_from(tmp_path: Path):
    def member(name: str, start: str | None) -> Member:
        folder = tmp_path / "store" / f"{name}-1"
        folder.mkdir(parents=True)
        settings = {"from": start} if start else {}
        record = {"kind": "sft", "produces": "model", "settings": settings, "parents": {}}
        if start:
            record["parents"] = {start: f"{start}-1"}
        (folder / "stage.yaml").write_text(json.dumps(record))
        return Member(name, folder, Seen(name, folder))

    base, mid, sft, other = (
        member(*one) for one in (("base", None), ("mid", "base"), ("sft", "mid"), ("other", None))
    )
    assert compared_with([base, mid, sft]) == {"mid": "base", "sft": "mid"}
    assert compared_with([base, sft]) == {"sft": "base"}, "a stage that is not compared is passed over"
    assert compared_with([base, other]) == {}, "what began from nothing is measured against nobody"
    assert compared_with([base, Member("hub", tmp_path)]) == {"hub": "base"}


def test_stages_of_two_recipes_with_one_name_are_told_apart(tmp_path: Path):
    for number in (1, 2):
        (tmp_path / f"base-{number}").mkdir()
        (tmp_path / f"base-{number}" / "stage.yaml").write_text('{"kind": "pretrain", "parents": {}}')
    seen = [Seen("base", tmp_path / f"base-{number}") for number in (1, 2)]
    assert [one.name for one in stages_above(seen)] == ["base-1", "base-2"]
    assert [one.name for one in stages_above(seen[:1])] == ["base"]


def test_a_stage_reached_by_two_paths_is_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, parents in (("base-1", {}), ("sft-1", {"base": "base-1"})):
        (tmp_path / "store" / name).mkdir(parents=True)
        record = {"kind": "sft", "stage": name[:-2], "parents": parents}
        (tmp_path / "store" / name / "stage.yaml").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    relative = [Seen("base", Path("store/base-1")), Seen("sft", Path("store/sft-1"))]
    absolute = [Seen("sft", tmp_path / "store" / "sft-1")]
    assert [one.name for one in stages_above([*relative, *absolute])] == ["base", "sft"]


def test_what_is_asked_follows_from_what_was_taught():
    alone = [one["task"] for one in default_tasks({}, [64])]
    assert alone == ["instructions", "sums", "sums"]
    taught = {"facts": {"people": "60"}, "chronicle": {}, "chat": {}}
    found = {one.get("name", one["task"]): one for one in default_tasks(taught, [256, 1024])}
    assert found["facts"]["people"] == "60"
    assert found["passkey"]["lengths"].endswith("+1008")
    assert {"sycophancy", "bits"} <= set(found)


def test_a_page_may_not_take_the_place_of_its_numbers(tmp_path: Path):
    with pytest.raises(TriviumError, match=r"name the page x\.html"):
        compare([], runs=tmp_path, to=tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_a_recipe_that_asks_for_nothing_still_ends_in_a_page(tmp_path: Path):
    prepared = run(write_recipe(tmp_path), tmp_path / "runs")
    place, rows = prepared.reported
    assert place == tmp_path / "runs" / "toy" / "report.html"
    assert rows == []
    text = place.read_text()
    assert "No model was asked anything" in text
    assert all(f">{name}</th>" in text for name in ("words", "base", "left", "right"))
    assert run(tmp_path / "toy.yaml", tmp_path / "runs", only=["base"]).reported is None


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("{compare: [bsae]}", ["bsae", "`base`?"]),
        ("{compare: [words]}", ["words", "makes a model"]),
        ("{on: [maths]}", ["maths"]),
        ("{asking: {limt: 3}}", ["limt"]),
    ],
)
def test_a_wrong_report_is_refused_before_anything_runs(tmp_path: Path, report: str, words: list[str]):
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + f"report: {report}\n")
    with pytest.raises(TriviumError) as caught:
        load(recipe)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_verb_compares_and_says_where_the_page_is(tmp_path: Path):
    words = [
        "compare",
        *two_models(tmp_path),
        "--on",
        "instructions",
        "--limit",
        "6",
        "--runs",
        str(tmp_path),
    ]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "instructions: accuracy" in done.output
    assert str(tmp_path / "compare.html") in done.output
    assert (tmp_path / "compare.json").is_file()


def test_distance_is_a_table_also_on_a_persons_prompts(tmp_path: Path):
    models = two_models(tmp_path)
    runs = ["--runs", str(tmp_path)]
    done = CliRunner().invoke(cli, ["distance", *models, "--count", "2", *runs], catch_exceptions=False)
    assert "second from first" in done.output
    assert "sums" in done.output
    (tmp_path / "prompts.txt").write_text("the river\n\nthe miller\n")
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--json", str(tmp_path / "d.json")]
    CliRunner().invoke(cli, ["distance", *models, *asked, *runs], catch_exceptions=False)
    texts = read_json(tmp_path / "d.json")[0]["texts"]
    assert [text["before"] for text in texts] == ["the river", "the miller"]
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    strange = CliRunner().invoke(cli, ["distance", *models, *asked, *runs])
    assert isinstance(strange.exception, TriviumError)
    assert "is not UTF-8 (byte 3)" in str(strange.exception)
    alone = CliRunner().invoke(cli, ["distance", models[0]])
    assert isinstance(alone.exception, TriviumError)


def test_a_win_needs_a_higher_score_and_a_tie_is_half():
    right = np.array([True, False, True, True])
    raw = collected({"instructions": {"base": right, "sft": ~right}}, {"sft": "base"})
    raw["judged"] = [
        {
            "judge": "taste",
            "task": "instructions",
            "scores": {"base": [0.0, 0.0, 1.0, None], "sft": [1.0, 0.0, 2.0, 3.0]},
        }
    ]
    (found,) = report_of(raw)["numbers"]["wins"]
    assert found["rate"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["rate"]["n"] == 3
    mirrored = collected(
        {"instructions": {"sft": ~right, "base": right}}, {"base": "sft"}, judged=raw["judged"]
    )
    (swapped,) = report_of(mirrored)["numbers"]["wins"]
    assert swapped["rate"]["value"] == pytest.approx(1 - found["rate"]["value"])


@pytest.mark.slow
def test_a_reward_stage_judges_the_answers_and_is_not_asked_itself(tmp_path: Path):
    models = two_models(tmp_path)
    pairs = [{"prompt": f"say {n}", "chosen": f"yes {n} sacks of corn", "rejected": "no"} for n in range(6)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "rm.yaml").write_text(
        "name: rm\nreport: {on: ['bits?sources=prose']}\nstages:\n"
        "  start: {kind: sft, from: ./first, data: ./chats.jsonl, steps: 1, context: 64}\n"
        "  taste: {kind: reward, from: start, data: ./pairs.jsonl, pairs: 3, steps: 3}\n"
    )
    turns = [{"role": "user", "content": "the river?"}, {"role": "assistant", "content": "rises"}]
    write_rows(tmp_path / "chats.jsonl", [{"messages": turns}] * 4)
    went = trivium.run(tmp_path / "rm.yaml", runs=tmp_path / "runs")
    asked = read_json(tmp_path / "runs" / "rm" / "report.json")["collected"]
    assert [one["name"] for one in asked["models"]] == ["start"]
    judge = Seen("taste", went["taste"].folder)
    to = tmp_path / "page.html"
    found = compare(models, runs=tmp_path / "runs", to=to, on=TASKS[:1], stages=[judge])
    (one,) = found["numbers"]["wins"]
    assert (one["judge"], one["model"], one["before"]) == ("taste", "second", "first")
    assert one["rate"]["n"] == 8
    assert "Win rate under a reward model" in to.read_text()
    answer = found["collected"]["tasks"]["instructions"]["models"]["second"]["records"][0]
    asked = found["collected"]["tasks"]["instructions"]["models"]["first"]["records"][0]["asked"]
    question = asked.removeprefix("Question: ").removesuffix("Answer:").strip()
    (score,) = LearnedScorer(judge.weights).many([question], [answer["answers"][0]["answer"]])
    assert found["collected"]["judged"][0]["scores"]["second"][0] == pytest.approx(score.value, abs=1e-4)


def test_bits_per_byte_are_no_share_even_below_one():
    content = collected({"reading": {"base": np.array([True, False])}}, {})
    content["tasks"]["reading"]["headline"] = ["accuracy", "bits per byte"]
    content["tasks"]["reading"]["models"]["base"]["records"] = answered(
        np.array([True, False]), **{"bits per byte": 0.3}
    )
    rows = {row["metric"]: row["share"] for row in numbers(content)["skills"]}
    assert rows == {"accuracy": True, "bits per byte": False}


@pytest.mark.parametrize(("further", "fits"), [(0, True), (-1, False)])
def test_a_text_that_fills_the_window_is_measured_and_a_longer_one_is_not(further, fits):
    passage = Passage("", "", "So it was", " that the river rose in the hills.")
    ids, _ = encode(passage, own(), 512)
    member = SimpleNamespace(model=small_model(own(), context=len(ids) + further), tokenizer=own())
    assert (distance._log_probability(member, passage) is not None) == fits
