"""Search where people meet it: in evaluate, the report, `trivium eval` and `model.search`."""

from __future__ import annotations

import json

import pytest
from tuning import own, save, small_model, write_rows

import trivium
from trivium.cli import main
from trivium.evals.searching import answer_key
from trivium.evals.settings import Settings
from trivium.evals.task import outside, placed, planned
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.lab import sections

ROWS = [{"prompt": f"{n} and {n} make", "answer": str(2 * n)} for n in range(6)]
STEPS = [
    {"prompt": f"{n} and", "completions": ["the river", "345"], "labels": [True, n % 2 == 0]}
    for n in range(6)
]
SEARCH = {"task": "own", "data": "./problems.jsonl", "most": 24}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    save(folder / "base", small_model(own()), own())
    write_rows(folder / "problems.jsonl", ROWS)
    write_rows(folder / "steps.jsonl", STEPS)
    (folder / "mine.py").write_text(
        "def spread(completions, **columns):\n    return [0.25] * len(completions)\n"
    )
    beam = "search: {method: beam, n: 4, width: 2, separator: ' ', scorer: prm}"
    (folder / "searched.yaml").write_text(
        "name: searched\nstages:\n"
        "  sft: {kind: sft, from: ./base, data: ./problems.jsonl, steps: 1, batch: 128, context: 64}\n"
        "  prm: {kind: reward, steps: true, from: ./base, data: ./steps.jsonl, pairs: 2, epochs: 1}\n"
        "  asked: {kind: evaluate, from: sft, on: ["
        f"{{task: own, data: ./problems.jsonl, most: 24, {beam}}}, "
        "{task: own, name: majority, data: ./problems.jsonl, most: 24, search: {method: majority, n: 5}}]}\n"
        "  all: {kind: evaluate, from: sft, on: [{task: own, data: ./problems.jsonl, most: 12}, {task: own, "
        "name: mine, data: ./problems.jsonl, most: 12, search: {n: 2, scorer: './mine.py:spread'}}], "
        "asking: {limit: 2, search: {method: best_of, n: 2, scorer: prm}}}\n"
        "report: {compare: [sft], on: [{task: own, name: beam, data: ./problems.jsonl, most: 24, "
        f"limit: 3, {beam}}}]}}\n"
    )
    return folder, trivium.run(folder / "searched.yaml", runs=folder / "runs")


@pytest.mark.slow
def test_the_evaluate_stage_and_the_report_search_and_keep_the_trees(made):
    folder, run = made
    summary = run["asked"].summary
    assert {"own: accuracy", "majority: accuracy"} <= set(summary)
    lines = (run["asked"].folder / "report" / "results.answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 12
    search = records[0]["answers"][0]["search"]
    assert search["settings"]["method"] == "beam"
    assert search["tree"][0]["parent"] == 0
    assert all(0 <= node["score"] <= 1 for node in search["tree"])
    path = [node["text"] for node in search["tree"] if node["chosen"]]
    assert "".join(path) == search["text"]
    assert records[0]["scores"]["tokens drawn"] == search["tokens"] > 0
    assert records[0]["scores"]["oracle"] >= records[0]["scores"]["accuracy"]
    majority = records[6]["answers"][0]["search"]
    keys = [answer_key(node["text"]) for node in majority["tree"] for _ in range(node["drawn"])]
    assert len(keys) == 5
    assert keys.count(majority["answer"]) == max(map(keys.count, keys))
    report = read_json(folder / "runs" / "searched" / "report.json")
    asked = report["collected"]["tasks"]["beam"]["models"]["sft"]["records"]
    assert len(asked) == 3
    assert asked[0]["answers"][0]["search"]["settings"]["method"] == "beam"
    page = (folder / "runs" / "searched" / "report.html").read_text()
    drawn = page[page.index('id="search"') :]
    assert drawn.count('<details class="step"') >= len(asked[0]["answers"][0]["search"]["tree"])
    assert drawn.count("<details") == drawn.count("</details>")
    assert "<mark>" in drawn


def test_a_search_for_all_tasks_and_a_function_of_a_file_are_found_beside_the_recipe(made):
    _, run = made
    lines = (run["all"].folder / "report" / "results.answers.jsonl").read_text().splitlines()
    searches = [json.loads(line)["answers"][0]["search"] for line in lines]
    assert [search["score"] == 0.25 for search in searches] == [False, False, True, True]


def test_model_search_takes_any_callable_and_the_name_of_a_reward_model(made, monkeypatch):
    folder, run = made
    monkeypatch.chdir(folder)
    model = run["sft"].model()
    asked: list[str] = []

    def shortest(text: str) -> float:
        asked.append(text)
        return -len(text)

    found = model.search("0 and 0 make", n=6, max_new_tokens=12, scorer=shortest, seed=3)
    assert len(found.text) == min(map(len, asked)) == min(len(one.node.text) for one in found.solutions)
    assert found.score == -len(found.text)
    by_stage = model.search(
        "0 and 0 make", method="mcts", n=4, width=2, separator=" ", max_new_tokens=12, scorer="searched/prm"
    )
    by_folder = model.search(
        "0 and 0 make", method="mcts", n=4, width=2, separator=" ", max_new_tokens=12,
        scorer=run["prm"].folder / "model",
    )  # fmt: skip
    assert by_stage.as_json()["tree"] == by_folder.as_json()["tree"]
    chat = model.search("0 and", "majority", n=3, max_new_tokens=8)
    assert len(chat.solutions) <= 3
    with pytest.raises(TriviumError, match="no multiple"):
        model.search("0 and", "beam", n=3)
    with pytest.raises(TriviumError, match="window"):
        model.search("0 and " * 300, n=3)


def test_a_step_that_could_not_be_judged_is_drawn_last_and_says_so():
    step = {"parent": 0, "text": "a", "drawn": 1, "visits": 2, "finished": True, "chosen": False}
    tree = [{**step, "id": 1, "score": None, "value": None}, {**step, "id": 2, "score": 0.5, "value": 0.5}]
    found = sections._below(0, tree)
    assert [one["score"] for one in found] == ["0.50", "not judged"]
    assert found[1]["facts"] == "2 visits, value none, ends"


def test_the_command_searches(made, capsys, monkeypatch):
    folder, _ = made
    monkeypatch.chdir(folder)
    words = ["eval", "searched/sft", "--tasks", "own?data=problems.jsonl&most=12", "--limit", "2"]
    main([*words, "--search", "best_of", "--n", "3", "--scorer", "searched/prm", "--json", "found.json"])
    answers = (folder / "found.answers.jsonl").read_text().splitlines()
    assert json.loads(answers[0])["answers"][0]["search"]["settings"]["n"] == 3
    with pytest.raises(SystemExit):
        main([*words, "--n", "3"])
    assert "add --search" in capsys.readouterr().err


def test_a_task_names_the_reward_model_of_its_search():
    spec = {**SEARCH, "search": {"method": "best_of", "scorer": "prm"}}
    assert ("search.scorer", "prm") in outside(spec)
    assert placed(spec, lambda option, name: f"at/{name}")["search"]["scorer"] == "at/prm"
    spec["search"]["scorer"] = {"model": "prm", "aggregate": "last"}
    assert placed(spec, lambda option, name: f"at/{name}")["search"]["scorer"]["model"] == "at/prm"
    for plain in ("logprob", "steps", "mine.py:spread"):
        spec["search"]["scorer"] = plain
        files = ["mine.py"] if ".py" in plain else []
        assert [name for _, name in outside(spec)] == [*files, "./problems.jsonl"]
    assert placed(spec, lambda option, name: f"at/{name}")["search"]["scorer"] == "at/mine.py:spread"
    with pytest.raises(TriviumError, match="samples"):
        planned({"task": "sums", "samples": 2, "search": "majority"}, Settings())
    with pytest.raises(TriviumError, match="search"):
        planned({"task": "bits", "search": "majority"}, Settings())
    assert answer_key("1 + 1 = 2\n#### 2") == answer_key("2") == "2"
    assert answer_key("so\nit is Blue.") == "it is blue"
