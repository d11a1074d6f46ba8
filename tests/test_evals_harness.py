"""Tasks of lm-evaluation-harness by name; what the harness computes is compared in tests/real."""

import sys
from unittest.mock import MagicMock

import pytest
from click.testing import CliRunner
from gguf_files import folder_of
from test_tokens import own
from tuning import small_model

from trivium.cli import cli
from trivium.evals.asking import Subject
from trivium.evals.harness import _model_class, _records
from trivium.evals.likelihood import log_likelihoods
from trivium.evals.task import task
from trivium.kit.errors import TriviumError


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    folder_of("llama", tmp_path)
    with pytest.raises(
        TriviumError, match=r"lm_eval:NAME need lm-evaluation-harness: `pip install trivium\[eval\]`"
    ):
        CliRunner().invoke(cli, ["eval", str(tmp_path), "--tasks", "lm_eval:any"], catch_exceptions=False)


def test_a_task_of_the_harness_takes_a_folder_of_others():
    assert task("lm_eval:arc_easy").checked({"include": "here"}) == {"include": "here"}
    with pytest.raises(TriviumError, match="has no option 'data'; it has include"):
        task("lm_eval:arc_easy").checked({"data": "here"})


def test_a_continuation_is_scored_after_as_much_of_its_context_as_fits(monkeypatch):
    """The harness gives the base class alone, so it need not be there."""
    names = ("api", "api.model", "models", "models.utils", "utils")
    for name in ("lm_eval", *(f"lm_eval.{name}" for name in names)):
        monkeypatch.setitem(sys.modules, name, MagicMock(TemplateLM=object))
    subject = Subject(small_model(own(), context=24), own())
    ids = list(range(10, 45))
    asked = [("", ids[:6], ids[6:9]), ("", ids[:30], ids[30:])]
    found = _model_class.__wrapped__()(subject)._loglikelihood_tokens(asked)
    alone = log_likelihoods(subject.model, [ids[:6], ids[10:30]], [ids[6:9], ids[30:]])
    assert found == [(one.total, one.greedy) for one in alone]


def test_every_item_is_one_record_with_the_scores_of_all_filters():
    row = {"arguments": [("What is 2 + 3?", {})], "target": "5", "filtered_resps": ["5"]}
    strict = row | {"doc_id": 0, "filter": "strict", "metrics": ["exact_match"], "exact_match": 0.0}
    loose = row | {"doc_id": 0, "filter": "loose", "metrics": ["exact_match"], "exact_match": 1.0}
    whole = row | {"doc_id": 1, "filter": "none", "metrics": ["f1", "bits"], "f1": 0.5, "bits": (3.0, 2)}
    one, two = _records({"sums": [strict, loose, whole]})
    assert (one.id, one.asked, one.expected) == ("sums/0", "What is 2 + 3?", "5")
    assert one.scores == {"exact_match (strict)": 0.0, "exact_match (loose)": 1.0}
    assert two.scores == {"f1": 0.5}, "a pair is no number of an item"
    assert {one.groups["task"] for one in _records({"a": [strict], "b": [whole]})} == {"a", "b"}
