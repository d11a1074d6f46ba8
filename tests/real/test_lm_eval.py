"""Local tasks of lm-evaluation-harness on our engine against its own `hf` backend, on the same folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from trivium.evals.evaluate import compare, evaluate
from trivium.evals.settings import Settings
from trivium.model.folder import load_model
from trivium.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.real
FOLDER = Path(os.environ["TRIVIUM_REAL"]).expanduser() / "smollm2"
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
ROLL = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} It is {{{{choices[0]}}}}."
metric_list: [{{metric: bits_per_byte}}]
"""
ROWS = [
    ("What is the capital of France?", ["Paris", "Rome", "New York City"], 0),
    ("How many legs has a spider?", ["six", "eight", "ten legs in all"], 1),
    ("What colour is the sky?", ["green", "dark red", "blue"], 2),
    ("What is 2 + 3?", ["5", "6", "23"], 0),
]
TASKS = {"local_choice": CHOICE, "local_write": WRITE, "local_text": ROLL}


@pytest.mark.parametrize("task", TASKS)
def test_our_engine_finds_what_the_hf_backend_finds(task: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"question": asked, "choices": choices, "label": label} for asked, choices, label in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / f"{task}.yaml").write_text(TASKS[task].format(data=data))
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(FOLDER), "dtype": "float32"}, tasks=[task], device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")), bootstrap_iters=0,
    )["samples"][task]  # fmt: skip
    results = evaluate(
        load_model(FOLDER, dtype=torch.float32), Tokenizer.load(FOLDER),
        [{"task": f"lm_eval:{task}", "include": str(tmp_path / "tasks")}], Settings(style="continue"),
    )  # fmt: skip
    [found] = results.tasks.values()
    assert len(found.records) == len(ROWS)
    for record, sample in zip(found.records, sorted(theirs, key=lambda row: row["doc_id"]), strict=True):
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                assert record.scores[metric] == pytest.approx(sample[metric], abs=1e-4)
        for answer, response in zip(record.answers, sample["filtered_resps"], strict=True):
            if task == "local_choice":
                total, greedy = answer["text"].strip("()").split(", ")
                assert float(total) == pytest.approx(float(response[0]), abs=1e-4)
                assert greedy == str(response[1])
            elif task == "local_write":
                assert answer["text"] == response
            else:
                assert float(answer["text"]) == pytest.approx(float(response), abs=1e-3)
    if task == "local_choice":
        assert compare(results, results)[0].difference.interval.value == 0
