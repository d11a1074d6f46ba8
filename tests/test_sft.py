"""The sft stage from a recipe: its report, its example, its batches, a stop in between, and real data."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from test_tokens import gpt2_like, own
from tuning import CHAT, cut_off, save, small_model, write_rows

import trivium
from trivium.cli import cli
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json
from trivium.pipeline import show
from trivium.stages.sft import Sft
from trivium.tokens.tokenizer import Tokenizer

SHARED = Path(os.environ.get("TRIVIUM_SHARED_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
ASKED = [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "12 sacks in the hills"}]
CHATS = [{"messages": ASKED}, {"messages": CHAT}] * 30
SETTINGS = "epochs: 2, context: 128, batch: 512, checkpoint: {every_steps: 1}, validation: {times: 1}"


def recipe(folder: Path, data: str, extra: str = "", tokenizer: Tokenizer | None = None) -> Path:
    tokenizer = tokenizer or own()
    save(folder / "base", small_model(tokenizer), tokenizer)
    text = f"name: tune\nstages:\n  sft: {{kind: sft, from: ./base, data: {data}, {SETTINGS}{extra}}}\n"
    (folder / "tune.yaml").write_text(text)
    return folder / "tune.yaml"


def conserves(facts: dict) -> None:
    """Every token that was read is packed, held out, cut or dropped."""
    assert facts["tokens_in"] == facts["tokens_kept"] + facts["tokens_cut"] + facts["tokens_dropped"]
    packed = facts["packed_tokens"] + facts["packing_dropped_tokens"] + facts["held_out_tokens"]
    assert facts["tokens_kept"] == packed
    assert facts["rows"] == facts["kept"] + facts["dropped"] + facts["unfit"]


def test_the_report_comes_first_and_conserves_every_row_and_token(tmp_path, capsys):
    long = [*CHAT, {"role": "user", "content": "12 " * 60}, {"role": "assistant", "content": "12"}]
    rows = [*CHATS, {"messages": long}, {"messages": ASKED[:1]}, "{oops", {"messages": [{"content": "a"}]}]
    write_rows(tmp_path / "chats.jsonl", rows)
    path = recipe(tmp_path, "{./chats.jsonl: {on_bad: skip, validation: 0.2}}")
    run = trivium.run(path, runs=tmp_path / "runs")
    (facts,) = run["sft"].summary["data"].values()
    conserves(facts)
    assert (facts["rows"], facts["bad"], facts["unfit"]) == (63, 1, 1)
    assert (facts["dropped"], facts["cut"]) == (1, 1)
    assert facts["shape"] == "conversations (messages)"
    assert 0 < facts["held_out_rows"] < 62
    named = "\n".join(facts["named"])
    for line in ("chats.jsonl:61", "chats.jsonl:62", "chats.jsonl:63", "chats.jsonl:64"):
        assert line in named
    told = capsys.readouterr().err
    assert told.index("recognised as conversations") < told.index("the first row of the first batch")
    assert "<|im_end|>⟧" in told
    assert told.index("tokens learned") < told.index("steps")
    metrics = [row for row in run["sft"].metrics if "loss" in row]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert {"mean_token_accuracy", "grad_norm", "learning_rate", "validation_loss"} <= set(metrics[-1])


def test_a_packed_batch_is_shown_in_colour_and_the_documents_of_a_step(tmp_path):
    from click.testing import CliRunner

    write_rows(tmp_path / "chats.jsonl", CHATS)
    trivium.run(recipe(tmp_path, "./chats.jsonl"), runs=tmp_path / "runs")
    entry = show.find(tmp_path / "runs", "sft")
    coloured = show.batch(entry, 1, colour=True)
    assert "\x1b[1;32m12 sacks in the hills<|im_end|>\x1b[0m" in coloured
    assert "<|im_start|>user\n12?<|im_end|>\n<|im_start|>assistant\n\x1b" in coloured
    plain = show.batch(entry, 1, colour=False)
    assert plain == coloured.replace("\x1b[1;32m", "⟦").replace("\x1b[2m", "").replace(
        "tokens learned\x1b[0m", "tokens learned"
    ).replace("\x1b[0m", "⟧")
    printed = CliRunner().invoke(cli, ["show", "sft", "--batch", "--runs", str(tmp_path / "runs")])
    assert printed.output.strip() == plain.strip()
    ids = show.documents(entry, 2)
    assert ids
    assert all(identity.startswith("chats.jsonl:") for identity in ids)
    with pytest.raises(TriviumError, match="none of them"):
        show.batch(entry, 999, colour=False)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", ", neftune: 5, label_smoothing: 0.1, optimiser: muon"])
def test_cut_off_and_resumed_it_ends_bit_identical(tmp_path, monkeypatch, extra):
    write_rows(tmp_path / "chats.jsonl", [{**row, "weight": 0.5 + n / 60} for n, row in enumerate(CHATS)])
    path = recipe(tmp_path, "./chats.jsonl", extra)
    whole = trivium.run(path, runs=tmp_path / "whole")
    cut_off(monkeypatch, path, tmp_path / "cut", at=4)
    cut = trivium.run(path, runs=tmp_path / "cut")
    assert cut["sft"].summary["steps"] == whole["sft"].summary["steps"] > 5
    first, second = (load_tensors(run["sft"].folder / "model" / "model.safetensors") for run in (whole, cut))
    assert all((first[name] == second[name]).all() for name in first)
    keep = ("step", "loss", "grad_norm", "learning_rate")
    rows = [[[row.get(key) for key in keep] for row in run["sft"].metrics] for run in (whole, cut)]
    assert rows[0] == rows[1]


def test_a_model_without_a_template_learns_chatml(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_rows(tmp_path / "chats.jsonl", CHATS)
    before = gpt2_like()
    run = trivium.run(recipe(tmp_path, "./chats.jsonl", tokenizer=before), runs=tmp_path / "runs")
    folder = run["sft"].folder / "model"
    after = Tokenizer.load(folder)
    assert after.vocabulary_size == before.vocabulary_size + 2
    assert after.end_of_turn_id in read_json(folder / "generation_config.json")["eos_token_id"]
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(ASKED, return_dict=True)["input_ids"]
    assert list(ids) == after.encode_chat(ASKED).ids
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == len(theirs)
    changes = [row["change"] for row in run["sft"].changes]
    assert "chat template" in changes


def test_plain_texts_need_no_template(tmp_path):
    write_rows(tmp_path / "texts.jsonl", [{"text": "the river rises " * 40}] * 20)
    run = trivium.run(recipe(tmp_path, "./texts.jsonl", tokenizer=gpt2_like()), runs=tmp_path / "runs")
    assert Tokenizer.load(run["sft"].folder / "model").vocabulary_size == gpt2_like().vocabulary_size
    (facts,) = run["sft"].summary["data"].values()
    conserves(facts)
    assert facts["shape"] == "plain text"
    assert facts["tokens_learned"] == facts["tokens_in"] - 20


def test_what_a_person_gets_wrong_is_one_sentence(tmp_path):
    write_rows(tmp_path / "chats.jsonl", CHATS)
    runs = tmp_path / "runs"
    path = recipe(tmp_path, "./chats.jsonl")
    with pytest.raises(TriviumError, match="reads 256 tokens at most"):
        trivium.run(path, runs=runs, set={"sft.context": 512})
    with pytest.raises(TriviumError, match="left no learning rate behind"):
        trivium.run(path, runs=runs, set={"sft.learning_rate": "parent"})
    with pytest.raises(TriviumError, match="left no optimiser state behind"):
        trivium.run(path, runs=runs, set={"sft.optimiser_state": "keep"})
    with pytest.raises(TriviumError, match="lss"):
        trivium.run(path, runs=runs, set={"sft.lss": "last"})
    write_rows(tmp_path / "chats.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(TriviumError, match=r"chats.jsonl:1 holds preferences"):
        trivium.run(path, runs=runs)
    write_rows(tmp_path / "chats.jsonl", [{"messages": ASKED[:1]}])
    with pytest.raises(
        TriviumError, match=r"none of its 1 rows can be learned from; chats.jsonl:1 teaches nothing"
    ):
        trivium.run(path, runs=runs)


def test_two_hundred_real_rows_without_conversion(tmp_path):
    """GSM8K's `question` and `answer` go in as they are."""
    file = SHARED / "gsm8k_train.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set TRIVIUM_SHARED_DATA to the folder that holds it")
    data = f'{{"{file.resolve()}": {{limit: 200, validation: 0.1}}}}'
    tokenizer = own()
    save(tmp_path / "base", small_model(tokenizer, context=2048), tokenizer)
    text = f"name: real\nstages:\n  sft: {{kind: sft, from: ./base, data: {data}, steps: 2, context: 2048}}\n"
    (tmp_path / "real.yaml").write_text(text)
    run = trivium.run(tmp_path / "real.yaml", runs=tmp_path / "runs")
    (facts,) = run["sft"].summary["data"].values()
    conserves(facts)
    assert (facts["rows"], facts["kept"], facts["cut"]) == (200, 200, 0)
    assert "question and answer" in facts["shape"]
    shown = show.batch(show.find(tmp_path / "runs", "sft"), 1, colour=False)
    assert re.search(r"⟦[^⟧]*#### -?[\d,]+<\|im_end\|>⟧", shown)
    assert "####" not in re.sub(r"⟦[^⟧]*⟧", "", shown)


def test_an_adapter_beside_a_new_template_trains_the_new_tokens_too(tmp_path):
    """The two marks that the template brings have rows of their own, which no matrix beside them teaches."""
    write_rows(tmp_path / "chats.jsonl", CHATS)
    path = recipe(tmp_path, "./chats.jsonl", ", adapter: {rank: 4}", tokenizer=gpt2_like())
    run = trivium.run(path, runs=tmp_path / "runs")
    before, after = gpt2_like(), Tokenizer.load(run["sft"].folder / "model")
    weights = load_tensors(run["sft"].folder / "model" / "model.safetensors")["model.embed_tokens.weight"]
    base = load_tensors(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    assert weights.shape[0] == after.vocabulary_size == before.vocabulary_size + 2
    assert not (weights[: len(base)] == base).all()
    metrics = [row for row in run["sft"].metrics if "loss" in row]
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_a_plan_says_what_a_given_length_costs(tmp_path):
    model = small_model(own())
    save(tmp_path / "base", model, own())
    size = sum(parameter.numel() for parameter in model.parameters())
    stage = Sft.model_validate({"kind": "sft", "from": "base", "data": "a.jsonl", "tokens": "10k"})
    found = stage.plan({"base": tmp_path / "base"})
    assert (found["parameters"], found["tokens"]) == (size, 10_000)
    assert found["flops"] == 6 * size * 10_000
    assert stage.plan({"base": {"parameters": 7}})["flops"] == 420_000
    assert "flops" not in Sft.model_validate({**stage.settings(), "tokens": None, "epochs": 1}).plan({})
