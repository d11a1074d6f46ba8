"""What a person may write after a task's name: obeyed, or refused in one sentence; never ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_tokens import own
from toys import write_recipe
from tuning import save, small_model

import trivium
from trivium.cli import cli
from trivium.evals.asking import Subject
from trivium.evals.bits import texts_of
from trivium.evals.evaluate import evaluate
from trivium.evals.results import Results
from trivium.evals.settings import Settings
from trivium.evals.task import checked_specs, outside, planned
from trivium.kit.errors import TriviumError
from trivium.lab.gather_answers import _question
from trivium.recipe import graph
from trivium.recipe.schema import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("options")
    save(place / "model", small_model(own()), own())
    (place / "q.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n')
    (place / "empty.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("passkey?lengths=abc", "lengths=abc"),
        ("passkey?depths=deep", "depths=deep"),
        ("positions?length=x", "length=x"),
        ("passkey?kind=needle", "write `kinds`"),
        ("passkey?tokens=5000", "write `lengths`"),
        ("conversation?style=chat&depth=0", "no option 'depth'"),
        ("humaneval?data=FILE&seconds=x", "seconds=x"),
        ("humaneval?data=FILE&unsafe_sandbox=perhaps", "true or false"),
        ("own?data=FILE&most=x", "most=x"),
        ("format?people=x", "people=x"),
        ("calibration?source=sums", "no choices in sums"),
        ("passkey?shots=2", "no `shots`"),
        ("sycophancy?shots=2", "no `shots`"),
        ("humaneval?data=FILE&shots=2", "no `shots`"),
        ("humaneval?data=FILE&chain_of_thought=false", "no `chain_of_thought`"),
        ("own?data=FILE&chain_of_thought=false", "no `chain_of_thought`"),
        ("format?samples=4", "no `samples`"),
    ],
)
def test_what_a_task_cannot_obey_is_one_sentence(folder: Path, task: str, words: str):
    task = task.replace("FILE", str(folder / "q.jsonl"))
    found = CliRunner().invoke(cli, ["eval", str(folder / "model"), "--tasks", task, "--limit", "3"])
    assert isinstance(found.exception, TriviumError), repr(found.exception)
    assert words in str(found.exception)
    assert "\n" not in str(found.exception)


def test_comparing_with_a_file_that_is_no_evaluation_is_one_sentence(folder: Path):
    words = ["eval", str(folder / "model"), "--tasks", "instructions", "--limit", "2"]
    found = CliRunner().invoke(cli, [*words, "--against", str(folder / "empty.json")])
    assert isinstance(found.exception, TriviumError)
    assert "holds no evaluation" in str(found.exception)


def test_a_truth_written_as_a_word_is_not_its_letters():
    assert planned("humaneval?data=x&unsafe_sandbox=false", Settings()).options["unsafe_sandbox"] is False


@pytest.mark.parametrize("value", [2.5, float("inf"), float("nan")])
def test_what_is_no_whole_number_is_not_cut_to_one(value: float):
    with pytest.raises(TriviumError, match="write a whole number"):
        planned({"task": "own", "data": "x", "most": value}, Settings())
    assert planned({"task": "own", "data": "x", "most": 2.0}, Settings()).options["most"] == 2


def test_a_file_among_other_sources_is_asked_anew_when_it_has_changed(tmp_path: Path):
    text, keys = tmp_path / "mine.txt", set()
    for words in ("one", "two"):
        text.write_text(words)
        keys |= {
            _question("bits", {}, {"sources": given}) for given in (f"prose+{text}", ["prose", str(text)])
        }
    assert len(keys) == 4
    whole = lambda: _question("own", {}, {"data": str(tmp_path), "model": str(tmp_path)})
    before = whole()
    (tmp_path / "more.jsonl").write_text("{}")
    assert whole() != before


def test_a_setting_for_all_tasks_is_left_out_where_it_means_nothing():
    settings = Settings(shots=2, samples=4, chain_of_thought=False)
    assert planned("sums", settings).settings == settings
    plain = planned("sycophancy", settings).settings
    assert (plain.shots, plain.samples, plain.chain_of_thought) == (0, 0, True)


@pytest.mark.parametrize("task", ["facts", "craft", "tongue", "instructions", "sums"])
def test_samples_that_are_drawn_become_pass_at_k(task: str):
    asked = [{"task": task, "samples": 2, "limit": 2, "max_new_tokens": 4}]
    (found,) = evaluate(small_model(own()), own(), asked).tasks.values()
    assert {"pass@1 at temperature 0.8", "pass@2 at temperature 0.8"} <= set(found.metrics)


@pytest.mark.parametrize("task", ["facts", "craft", "tongue"])
def test_the_options_of_a_source_reach_its_questions(task: str):
    def asked(written: str) -> set[str]:
        (found,) = evaluate(small_model(own()), own(), [written], Settings(limit=3)).tasks.values()
        return {record.asked for record in found.records}

    assert asked(task).isdisjoint(asked(f"{task}?country=7"))


def test_a_choice_too_long_for_the_window_is_not_chosen_and_stops_nobody():
    model = small_model(own(), context=24)
    found = evaluate(model, own(), ["facts", "sycophancy"], Settings(limit=4, style="continue"))
    assert [record.scores["multiple-choice accuracy"] for record in found.tasks["facts"].records] == [0.0] * 4
    assert all("confidence" not in record.scores for record in found.tasks["facts"].records)
    assert Subject(model, own()).window == 24


RECIPE = """
name: again
stages:
  words: {{kind: tokenizer, data: ./texts}}
  base: {{kind: pretrain, data: ./texts, tokenizer: words, tokens: 2k}}
  asked: {{kind: evaluate, from: base, on: [{spec}]}}
"""


@pytest.mark.parametrize(
    "spec",
    [
        '"own?data=./q.jsonl"',
        "{task: own, data: ./q.jsonl}",
        "{task: gsm8k, data: ./same.jsonl, examples: ./q.jsonl, shots: 1}",
        '"gsm8k?data=./same.jsonl&examples=./q.jsonl&shots=1"',
        '"bits?sources=prose+./same.jsonl+./q.jsonl"',
        "{task: bits, sources: prose+./q.jsonl}",
        "{task: bits, sources: [./q.jsonl, prose]}",
        "{task: positions, source: ./q.jsonl, length: 64}",
        '"positions?source=./q.jsonl"',
    ],
)
def test_an_evaluation_is_made_anew_when_a_file_it_reads_has_changed(tmp_path: Path, spec: str):
    path = write_recipe(tmp_path, RECIPE.format(spec=spec))
    (tmp_path / "same.jsonl").write_text('{"question": "a", "answer": "x"}\n')
    prints = []
    for answer in ("1", "2", "1"):
        (tmp_path / "q.jsonl").write_text(json.dumps({"question": "a", "answer": answer}) + "\n")
        prints.append(graph.build(load(path))["asked"].fingerprint)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    "spec",
    ['"own?data=./none.jsonl"', "{task: own, data: ./none.jsonl}", '"bits?sources=prose+./none.jsonl"'],
)
def test_a_file_that_is_not_there_is_named_before_anything_runs(tmp_path: Path, spec: str):
    path = write_recipe(tmp_path, RECIPE.format(spec=spec))
    with pytest.raises(TriviumError, match=r"none\.jsonl"):
        graph.build(load(path))
    report = RECIPE.format(spec="facts") + f"report: {{on: [{spec}]}}\n"
    with pytest.raises(TriviumError, match=r"report\.on\.0: there is no `\./none\.jsonl`"):
        load(write_recipe(tmp_path, report))


JUDGE = "search: {method: best_of, n: 2, scorer: './judge.py:spread'}"


def judge(folder: Path, words: str) -> None:
    (folder / "judge.py").write_text(f"def spread(completions, **columns):\n    return [{words}]\n")


OWN = "{task: own, data: ./world.jsonl, scorer: './judge.py:spread'}"


@pytest.mark.parametrize("spec", [f"{{task: sums, {JUDGE}}}", f"sums], asking: {{{JUDGE}}}, against: [", OWN])
def test_the_function_that_scores_counts_with_its_text(tmp_path: Path, spec: str):
    (tmp_path / "world.jsonl").write_text("{}")
    path = write_recipe(tmp_path, RECIPE.format(spec=spec))
    prints = []
    for words in ("1", "2", "1"):
        judge(tmp_path, words)
        prints.append(graph.build(load(path))["asked"].fingerprint)
    assert prints[0] == prints[2] != prints[1]
    (tmp_path / "judge.py").unlink()
    with pytest.raises(TriviumError, match=r"judge\.py"):
        graph.build(load(path))


def test_a_stage_that_scores_all_searches_is_made_first(tmp_path: Path):
    for scorer in ("prm", "{model: prm, aggregate: last}"):
        spec = f"sums], asking: {{search: {{method: beam, scorer: {scorer}}}}}, against: ["
        reward = "  prm: {kind: reward, steps: true, from: base, data: ./s.jsonl}\n"
        (tmp_path / "s.jsonl").write_text("{}")
        path = write_recipe(tmp_path, RECIPE.format(spec=spec) + reward)
        node = graph.build(load(path))["asked"]
        assert node.parents["prm"].stage == "prm"


def test_a_report_finds_the_scorer_of_its_searches_beside_the_recipe(tmp_path: Path, monkeypatch):
    asked = f"{{on: [{{task: sums, {JUDGE}}}], asking: {{{JUDGE}}}}}"
    path = write_recipe(tmp_path, RECIPE.format(spec="facts") + f"report: {asked}\n")
    with pytest.raises(TriviumError, match=r"report\.on\.0: there is no `\./judge\.py`"):
        load(path)
    judge(tmp_path, "1")
    monkeypatch.chdir("/")
    report, keys = load(path).report, []
    assert report.on[0]["search"]["scorer"] == f"{tmp_path}/judge.py:spread"
    assert report.asking.search.scorer == f"{tmp_path}/judge.py:spread"
    for words in ("1", "2"):
        judge(tmp_path, words)
        keys.append(_question("sums", report.asking.model_dump(), {}))
    assert keys[0] != keys[1]


def test_a_report_reads_its_questions_beside_the_recipe_and_asks_a_hundred(tmp_path: Path, monkeypatch):
    specs = '"own?data=./q.jsonl", "bits?sources=prose+./q.jsonl"'
    report = RECIPE.format(spec="facts") + f"report: {{on: [{specs}], asking: {{shots: 2}}}}\n"
    path = write_recipe(tmp_path, report)
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    monkeypatch.chdir("/")
    found = load(path).report
    assert found.on[0]["data"] == str(tmp_path / "q.jsonl")
    assert found.on[1]["sources"] == ["prose", str(tmp_path / "q.jsonl")]
    assert (found.asking.limit, found.asking.shots) == (100, 2)


@pytest.mark.parametrize("word", ["on", "off"])
def test_on_and_off_are_words_and_no_truths(tmp_path: Path, word: str):
    text = RECIPE.format(spec="facts").replace("tokens: 2k", f"tokens: 2k, compile: {word}")
    path = write_recipe(tmp_path, text.replace("[facts]", "[facts], asking: {reasoning: off}"))
    stages = load(path, [f"base.compile={word}"]).stages
    assert (stages["base"].compile, stages["asked"].asking.reasoning) == (word, "off")


def test_what_only_the_world_is_asked_for_keeps_its_fingerprint():
    for spec in ("bits?sources=prose+facts", "positions?source=chronicle", "calibration?source=facts"):
        assert checked_specs([spec]) == [spec]
    for options in ({"sources": "prose+facts"}, {"sources": ["world:prose", "facts"]}):
        (kept,) = checked_specs([{"task": "bits", **options}])
        assert kept == {"task": "bits", **options}
        assert outside(kept) == []


def test_a_text_is_read_beside_the_recipe(folder: Path, monkeypatch):
    (folder / "mine.txt").write_text("Some words that a person wrote.\n")
    spec = "{task: bits, sources: prose+./mine.txt, limit: 2}"
    (folder / "r.yaml").write_text(
        f"name: r\nstages:\n  asked: {{kind: evaluate, from: ./model, on: [{spec}]}}\n"
    )
    monkeypatch.chdir("/")
    report = trivium.run(folder / "r.yaml", runs=folder / "runs")["asked"].folder / "report"
    (found,) = Results.load(report / "results.json").tasks.values()
    assert set(found.by_group()["source"]) == {"prose", str(folder / "mine.txt")}


@pytest.mark.parametrize("value", [{"a": 1}, [["prose"]], [None], [{}]])
def test_an_option_that_is_no_text_is_refused_in_a_sentence(value: object) -> None:
    """It was a raw AttributeError."""
    with pytest.raises(TriviumError):
        planned({"task": "bits", "sources": value}, Settings())


def test_a_number_is_a_text_where_one_is_wanted() -> None:
    assert planned({"task": "gsm8k", "data": 2020}, Settings()).options["data"] == "2020"
    assert planned({"task": "bits", "sources": ["prose", 3]}, Settings()).options["sources"] == ["prose", "3"]


@pytest.mark.parametrize(
    "spec",
    [
        {"task": "calibration", "source": None}, {"task": "calibration", "source": ["facts"]},
        {"task": "facts", "shots": 10**30}, {"task": "facts", "samples": 10**30}, "sums?shots=1000000000",
    ],
)  # fmt: skip
def test_what_no_task_can_do_is_refused_before_it_is_tried(spec: object) -> None:
    """A thousand million worked examples were drawn before any model was asked."""
    with pytest.raises(TriviumError):
        planned(spec, Settings())


def test_a_long_text_is_cut_into_items_that_the_limit_counts(tmp_path: Path) -> None:
    """A book in one file was a single item without an interval, and `limit` did not shorten it."""
    lines = [f"Line {number} of the book.\n" for number in range(600)]
    (tmp_path / "book.txt").write_text("".join(lines) + "x" * 5000)
    cut = list(texts_of(str(tmp_path / "book.txt"), Settings(limit=100)))
    texts = [text for _, text, _ in cut]
    assert "".join(texts) == "".join(lines) + "x" * 5000
    assert max(map(len, texts)) <= 4096
    assert all(text.endswith("\n") for text in texts[:3])
    assert len({name for name, _, _ in cut}) == len(cut) == 6
    assert texts[:2] == [text for _, text, _ in texts_of(str(tmp_path / "book.txt"), Settings(limit=2))]
