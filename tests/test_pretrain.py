"""The first real road: words, corpus and base from a recipe; stopped, resumed, opened by others."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forked import forked
from transformers import AutoModelForCausalLM, AutoTokenizer

import trivium
from trivium.data.door import Door
from trivium.data.settings import mixture_of
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.pipeline import show
from trivium.pipeline.plan import plan
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer

RECIPE = """\
name: tiny
stages:
  words:  {kind: tokenizer, data: ./texts, vocabulary: 268}
  corpus: {kind: corpus, data: ./texts, tokenizer: words, validation: 0.1}
  base:
    kind: pretrain
    data: corpus
    model: {depth: 1, width: 32}
    context: 32
    batch: 256
    steps: 12
    checkpoint: {every_steps: 2, at: [step=4, tokens=2k]}
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    (folder / "texts").mkdir()
    lines = [f"{one} and {other} make {one + other}." for one in range(20) for other in range(10)]
    (folder / "texts" / "sums.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, trivium.run(write(folder), runs=folder / "runs")


def test_the_summary_and_the_log_agree(made):
    _, run = made
    rows = [row for row in run["base"].metrics if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert run["base"].summary["steps"] == 12
    assert run["base"].summary["tokens"] == rows[-1]["tokens"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["bits_per_byte"] > 0
    assert not (run["base"].folder / "checkpoints").exists()


def test_the_model_is_a_hugging_face_folder(made, tmp_path):
    _, run = made
    model = run["base"].model()
    folder = run["base"].folder / "model"
    ids = model.tokenizer.encode("3 and 4 make 7.")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("3 and 4 make 7.").input_ids == ids
    assert torch.allclose(theirs(torch.tensor([ids])).logits[0], model.logits(ids), atol=5e-5)
    model.save(tmp_path / "saved")
    assert torch.equal(trivium.load(tmp_path / "saved").logits(ids), model.logits(ids))
    # transformers ends an answer where Trivium does
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert set(saved.eos_token_id) == model.tokenizer.stop_ids
    assert len(saved.eos_token_id) == 2


def test_saving_a_model_never_takes_anything_else_away(made, tmp_path):
    model = made[1]["base"].model()
    model.save(tmp_path / "saved")
    model.save(tmp_path / "saved")  # of a model the next one takes the place
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TriviumError, match="holds saved, which is no part of a model"):
        model.save(tmp_path)
    with pytest.raises(TriviumError, match=r"thesis\.txt cannot be written: Not a directory"):
        model.save(tmp_path / "thesis.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "thesis.txt"}
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_generation_of_one_and_of_many(made):
    folder, run = made
    model = trivium.load(folder / "runs" / "tiny" / "base")
    one = model.generate("3 and", max_new_tokens=4, temperature=0)
    many = model.generate(["3 and", [{"role": "user", "content": "Hi"}]], max_new_tokens=4, temperature=0)
    assert one.text == many[0].text
    assert len(many) == 2
    assert model.generate("", max_new_tokens=1).tokens
    with pytest.raises(TriviumError, match="`temprature`"):
        model.generate("3 and", temprature=1)
    for wrong in (5, None, [1, 2]):
        with pytest.raises(TriviumError, match="A prompt is a text or a list of messages"):
            model.generate(wrong)
    for tokens in ([99999], [-1], [1.5], "abc"):
        with pytest.raises(TriviumError, match="whole numbers from 0 to 267"):
            model.logits(tokens)
    with pytest.raises(TriviumError, match="A chat takes a list of messages"):
        model.chat("Hi")
    with pytest.raises(TriviumError, match="leaves no room for a question"):
        model.chat([{"role": "user", "content": "Hi"}], max_new_tokens=5000)
    assert list(trivium.run(folder / "tiny.yaml", only="words", runs=folder / "runs")) == ["words"]
    with pytest.raises(TriviumError, match="makes no model"):
        trivium.load(folder / "runs" / "tiny" / "corpus")
    with pytest.raises(TriviumError, match="made no stage `bse`"):
        run["bse"]


def test_the_documents_of_a_step_are_lines_of_the_source(made):
    folder, _ = made
    entry = show.find(folder / "runs", "base")
    ids = show.documents(entry, 3)
    assert ids
    assert all(identity.startswith("texts/sums.jsonl:") for identity in ids)
    assert show.documents(entry, 3) == ids
    assert show.documents(entry, 4) != ids
    with pytest.raises(TriviumError, match="1 to 12"):
        show.documents(entry, 13)


def test_kept_checkpoints_are_models_with_what_is_handed_over(made):
    _, run = made
    kept = sorted((run["base"].folder / "kept").iterdir())
    assert read_json(kept[0] / "kept.json")["step"] == 4
    tokens = read_json(kept[1] / "kept.json")
    assert ["tokens", 2000] in tokens["at"]
    assert tokens["tokens"] >= 2000
    assert trivium.load(kept[0] / "model").logits([1]).shape == (1, 268)
    early = read_json(kept[0] / "training.json")["learning_rates"]["matrices"]
    late = read_json(run["base"].folder / "training.json")["learning_rates"]["matrices"]
    assert early > late == 0


def test_the_plan_derives_the_same_numbers_before_and_after(made, tmp_path):
    """What is planned from the first rows of the texts is what a plan of the finished run says."""
    folder, run = made
    before, after = (
        dict(part.rpartition(" ")[::2] for part in plan(recipe, runs)[3][4].split(", "))
        for recipe, runs in ((write(tmp_path), tmp_path / "runs"), (folder / "tiny.yaml", folder / "runs"))
    )
    same = (before.keys() & after.keys()) - {"tokens"}
    assert {"layers", "width", "parameters", "batch", "steps", "Muon learning rate"} <= same
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert before["steps"] == "12"
    assert before["parameters"] == f"{run['base'].summary['parameters']:,}"
    # Rows are not filled to the last token: the plan's count is near the truth.
    learned = run["base"].summary["tokens"]
    assert float(before["tokens"].replace(",", "")) == pytest.approx(learned, rel=0.2)


def test_a_mixture_of_raw_sources_needs_a_tokenizer_and_says_so(tmp_path):
    text = RECIPE.replace("data: corpus\n", "data: {./texts: {weight: 1}}\n")
    with pytest.raises(TriviumError, match="name one in `tokenizer`"):
        trivium.run(write(tmp_path, text), runs=tmp_path / "runs", only=["base"])
    run = trivium.run(
        tmp_path / "tiny.yaml",
        runs=tmp_path / "runs",
        only=["base"],
        set={"base.tokenizer": "words", "base.steps": 2},
    )
    assert run["base"].summary["steps"] == 2


def test_bits_per_byte_rests_on_exact_bytes(made, tmp_path):
    _, run = made
    corpus = run["corpus"].folder / "data"
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    work = Work("base", tmp_path, {"corpus": corpus}, 1, MetricsLog(tmp_path / "log"), Progress())
    rows = Door(work, tokenizer).validation_rows(mixture_of({"corpus": None}), 32, 10_000)["corpus"]
    assert rows
    for row in rows:
        text = tokenizer.decode(row.targets[row.targets >= 0])
        assert row.columns["bytes"].sum() == len(text.encode())


def started(recipe: Path, runs: Path) -> subprocess.Popen[str]:
    return forked("run", recipe, "--runs", runs, stderr=subprocess.PIPE)


LONG = RECIPE.replace("steps: 12", "steps: 300").replace("every_steps: 2", "every_steps: 5")


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the long run when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    assert started(write(folder, LONG), folder / "runs").wait(timeout=120) == 0
    return (folder / "runs" / "tiny" / "base" / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130)])
def test_a_stopped_stage_ends_bit_identical(tmp_path, left_alone, number, status):
    recipe = write(tmp_path, LONG)
    process = started(recipe, tmp_path / "cut")
    while not list((tmp_path / "cut").glob("store/base-*/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    assert not list((tmp_path / "cut").glob("store/base-*/COMPLETE"))
    again = started(recipe, tmp_path / "cut")
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0
    assert "Going on after step" in said
    assert (tmp_path / "cut" / "tiny" / "base" / "model" / "model.safetensors").read_bytes() == left_alone
