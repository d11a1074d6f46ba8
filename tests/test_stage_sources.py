"""A stage that makes data is a source wherever data is named: its folder is read as any other."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

import trivium
from trivium.data.settings import Sources
from trivium.data.sources import Source
from trivium.kit.errors import TriviumError
from trivium.pipeline.run import prepare

STAGE = '''
"""Write rows for the stages that follow."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

import pyarrow
import pyarrow.parquet

from trivium.kit.files import whole_folder
from trivium.stages.parts.stage import Product, Stage, Work


class Rows(Stage):
    kind: Literal["rows"]
    produces: ClassVar[Product] = "data"
    computes: ClassVar[bool] = False
    of: Literal["texts", "answers", "pairs"]

    def run(self, work: Work) -> dict[str, Any]:
        rows = [self.row(one, other) for one in range(9) for other in range(9)]
        with whole_folder(work.output("data")) as folder:
            if self.of == "texts":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part-0.parquet")
            else:
                (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
        return {"rows": len(rows)}

    def row(self, one: int, other: int) -> dict[str, str]:
        asked, right = f"{one} and {other} make", f" {one + other}."
        if self.of == "texts":
            return {"text": asked + right}
        if self.of == "answers":
            return {"prompt": asked, "completion": right, "answer": str(one + other)}
        return {"prompt": asked, "chosen": right, "rejected": " a river."}
'''
RECIPE = """\
name: made
stages:
  texts: {kind: mine.py:Rows, of: texts}
  answers: {kind: mine.py:Rows, of: answers}
  pairs: {kind: mine.py:Rows, of: pairs}
  words: {kind: tokenizer, data: texts, vocabulary: 272}
  corpus: {kind: corpus, data: [{path: texts, limit: 50}], tokenizer: words, validation: 0.1}
  base: {kind: pretrain, data: {corpus: {weight: 1}, texts: {weight: 1, validation: 0.2}}, tokenizer: words,
         model: {depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32}, context: 64, batch: 128,
         steps: 2, optimiser: adamw}
  mid: {kind: midtrain, from: base, data: {texts: {validation: 0.2}}, batch: 128, steps: 1}
  sft: {kind: sft, from: mid, data: answers, replay: {share: 0.5, data: {texts: {}}}, context: 64, steps: 1}
  dpo: {kind: preference, from: sft, data: pairs, steps: 1, pairs: 4, sycophancy: 0, context: 64}
  rm: {kind: reward, from: sft, data: {pairs: {validation: 0.2}}, test: pairs, steps: 1, pairs: 4,
       context: 64}
  rl: {kind: rlvr, from: sft, data: answers, reward: [math], steps: 1, prompts_per_step: 2,
       num_generations: 2, max_new_tokens: 4}
  small: {kind: quantize, from: mid, data: {texts: {validation: 0.2}}, context: 64}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(STAGE)
    (folder / "made.yaml").write_text(RECIPE)
    return trivium.run(folder / "made.yaml", runs=folder / "runs")


@pytest.mark.slow
def test_every_stage_that_reads_data_reads_what_a_stage_made(made):
    assert made["corpus"].summary["documents"] == 50
    assert list(made["base"].summary["data"]) == ["corpus", "texts"]
    assert made["mid"].summary["data"]["texts"]["share"] == 1
    learnt = made["sft"].summary["data"]
    assert (learnt["answers"]["rows"], learnt["texts"]["rows"]) == (81, 81)
    assert learnt["answers"]["share"] == pytest.approx(0.5, abs=0.1)
    assert made["dpo"].summary["data"]["pairs"]["rows"] == made["rm"].summary["data"]["pairs"]["rows"] == 81
    assert made["rm"].summary["test"]["pairs"] == 81
    assert made["rl"].summary["problems"] == 81
    assert made["small"].summary["tokens"] > 0


def test_documents_of_a_stage_are_named_by_file_and_row(made):
    from trivium.pipeline import show

    names = show.documents(show.find(made["mid"].folder.parents[1], "made/mid"), 1)
    assert names
    assert all(name.startswith("data/part-0.parquet:") for name in names)


@pytest.mark.parametrize("kind", ["preference, pairs: 4", "rlvr, reward: [math]", "reward, pairs: 4"])
def test_a_tokenised_corpus_has_no_rows_to_read(tmp_path, kind):
    (tmp_path / "mine.py").write_text(STAGE)
    wrong = f"  wrong: {{kind: {kind}, from: sft, data: corpus, steps: 1}}\n"
    (tmp_path / "made.yaml").write_text(RECIPE + wrong)
    with pytest.raises(
        TriviumError, match=r"stages\.wrong\.data.* needs documents, but `corpus` is a corpus"
    ):
        prepare(tmp_path / "made.yaml", tmp_path / "runs")


def test_every_documented_form_of_data_is_the_same_list():
    forms = [
        "./texts",
        ["./texts"],
        {"path": "./texts"},
        [{"path": "./texts"}],
        {"./texts": {}},
        {"./texts": None},
    ]
    read = TypeAdapter(Sources).validate_python
    assert all(read(form) == [Source(path="./texts")] for form in forms)
    assert read({"a": {"limit": 3}, "b": {}}) == [Source(path="a", limit=3), Source(path="b")]
