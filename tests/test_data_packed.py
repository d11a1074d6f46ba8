"""Packed batches: targets stay inside documents, rows name their documents, any process sees the same."""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_shards import documents, tokenizer

from trivium.data.door import Door
from trivium.data.ingredients import Ingredient
from trivium.data.packed import PackedBatches, PackedRows
from trivium.data.preview import previewed
from trivium.data.ramped import RampedBatches
from trivium.data.rows import PackedSequence, collate, row_of_documents
from trivium.data.settings import mixture_of
from trivium.data.shards import Shards, write_shards
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.stages.parts.stage import Work


@cache
def _texts():
    return [document for document in documents(300) if document.text]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    write_shards(_texts(), tokenizer(), tmp_path / "texts", validation=0.2, columns=("score",))
    return Shards(tmp_path / "texts")


def batches(shards: Shards, **settings) -> PackedBatches:
    options = {"context": 64, "batch_tokens": 512, "seed": 1, "epochs": 2.0, **settings}
    return PackedBatches([Ingredient("texts", shards)], **options)


def test_targets_are_the_next_token_of_the_same_document(shards: Shards) -> None:
    by_id = {shards.id(index): shards.document(index) for index in range(len(shards))}
    rows = PackedRows(shards, 32)
    seen: dict[str, int] = dict.fromkeys(by_id, 0)
    cut = 0
    for index in range(len(rows)):
        row = rows.row(index)
        place = 0
        for name, length in zip(row.ids, row.lengths, strict=True):
            piece = row.tokens[place : place + length].tolist()
            targets = row.targets[place : place + length].tolist()
            weights = row.weights[place : place + length].tolist()
            whole = by_id[name].tolist()
            start = next(at for at in range(0, len(whole), 32) if whole[at : at + length] == piece)
            following = whole[start + 1 : start + 1 + length]
            cut += len(following) == length
            assert targets == following + [-1] * (length - len(following))
            assert weights == [1.0] * len(following) + [0.0] * (length - len(following))
            seen[name] += len(following)
            place += length
        assert place == len(row) <= 32
    assert cut > 0
    # Every token but each document's first is predicted exactly once.
    assert seen == {name: len(tokens) - 1 for name, tokens in by_id.items()}


def test_rows_that_grow_longer_go_on_where_the_shorter_ones_stopped(shards: Shards) -> None:
    texts = [Ingredient("texts", shards, origin="here")]
    ramped = RampedBatches(texts, contexts=[32, 64], batch_tokens=256, seed=1, epochs=1.0)
    passes = [ramped.consumed(step)["here"] for step in (ramped.parts[0].steps, ramped.steps)]
    assert passes == pytest.approx([0.5, 1.0], abs=0.1)


def test_conversations_learn_only_the_assistant(tmp_path: Path) -> None:
    write_shards(documents(100), tokenizer(), tmp_path / "s")
    shards = Shards(tmp_path / "s")
    rows = PackedRows(shards, 256)
    spoken = []
    for index in range(len(rows)):
        row = rows.row(index)
        starts = np.cumsum((0, *row.lengths))
        for number, name in enumerate(row.ids):
            inside = slice(starts[number], starts[number + 1])
            learned = row.targets[inside][row.weights[inside] > 0]
            if name.startswith("c:"):
                spoken.append(tokenizer().decode(learned.tolist(), False))
    assert len(spoken) == 10
    assert set(spoken) == {"three sacks<|im_end|>"}


def test_the_batch_of_a_step_is_the_same_whoever_asks(shards: Shards) -> None:
    one, other = batches(shards), batches(shards)
    assert one.fingerprint == other.fingerprint
    steps = [[row.ids for row in one.rows(step)] for step in range(one.steps)]
    for step in reversed(range(one.steps)):
        assert [row.ids for row in other.rows(step)] == steps[step]
    assert all(len(batch) == 512 // 64 for batch in steps)


def test_two_epochs_read_every_document_twice(shards: Shards) -> None:
    source = batches(shards, batch_tokens=64)
    tokens = sum(len(row) for step in range(source.steps) for row in source.rows(step))
    assert tokens == 2 * source.packed[0].packing.tokens
    assert source.report()["texts"]["passes"] == 2


def test_durations_in_tokens_steps_and_epochs(shards: Shards) -> None:
    assert batches(shards, epochs=None, steps=7).steps == 7
    by_tokens = batches(shards, epochs=None, tokens=10_000)
    trained = sum(len(row) for step in range(by_tokens.steps) for row in by_tokens.rows(step))
    assert abs(trained - 10_000) < 512
    by_epochs = batches(shards, epochs=3.5)
    rows = len(by_epochs.packed[0])
    assert by_epochs.steps == round(3.5 * rows / 8)
    assert by_epochs.report()["texts"]["passes"] == pytest.approx(by_epochs.steps * 8 / rows)
    with pytest.raises(TriviumError, match="exactly one of"):
        batches(shards, tokens=10, steps=1)


def test_a_changed_mixture_does_not_resume(shards: Shards) -> None:
    json, tensors = batches(shards).state()
    batches(shards).restore(json, tensors)
    for changed in (batches(shards, seed=2), batches(shards, epochs=3.0), batches(shards, context=32)):
        assert changed.fingerprint != batches(shards).fingerprint
        with pytest.raises(TriviumError, match="has changed since this run began"):
            changed.restore(json, tensors)


def test_a_mixture_names_its_sources(shards: Shards, tmp_path: Path) -> None:
    write_shards(documents(100)[9::10], tokenizer(), tmp_path / "chats")
    mixed = PackedBatches(
        [
            Ingredient("texts", shards, weights=((0.0, 0.75),)),
            Ingredient("chats", Shards(tmp_path / "chats"), weights=((0.0, 0.25),)),
        ],
        context=128,
        batch_tokens=1024,
        seed=0,
        steps=20,
    )
    rows = [row for step in range(20) for row in mixed.rows(step)]
    for row in rows:
        assert {name[0] for name in row.ids} == ({"t"} if row.sources[0] == 0 else {"c"})
        assert len(set(row.sources)) == 1
    assert sum(row.sources[0] for row in rows) == 40
    assert mixed.report()["chats"]["share"] == 0.25


def test_a_curriculum_goes_from_easy_to_hard(shards: Shards) -> None:
    source = PackedBatches(
        [Ingredient("texts", shards, easy_first="score")], context=32, batch_tokens=32, seed=0, epochs=1.0
    )
    easier = {shards.id(index): score for index, score in enumerate(shards.column("score").tolist())}
    means = []
    for step in range(source.steps):
        (row,) = source.rows(step)
        scores = [easier[name] for name in row.ids]
        means.append(np.average(scores, weights=row.lengths))
    assert means == sorted(means)


@pytest.mark.parametrize("change", ["nothing", "twice", "small", "empty"])
def test_feeds_that_cannot_be_are_refused(change: str, shards: Shards, tmp_path: Path) -> None:
    write_shards([], tokenizer(), tmp_path / "empty")
    one = Ingredient("a", shards)
    ingredients = {"nothing": [], "twice": [one, one], "small": [one]}
    ingredients["empty"] = [Ingredient("e", Shards(tmp_path / "empty"))]
    message = {
        "nothing": "nothing to train on",
        "twice": "same name",
        "small": "holds no row",
        "empty": "two tokens",
    }
    with pytest.raises(TriviumError, match=message[change]):
        PackedBatches(
            ingredients[change], context=64, batch_tokens=63 if change == "small" else 64, seed=0, steps=1
        )


def measured(shards: Shards, context: int, tokens: int) -> list[PackedSequence]:
    log = MetricsLog(shards.folder / "log")
    work = Work("one", shards.folder, {"texts": shards.folder}, 1, log, Progress())
    return Door(work, tokenizer()).validation_rows(mixture_of({"texts": {}}), context, tokens)["texts"]


def test_validation_rows_are_fixed_and_their_bytes_exact(shards: Shards) -> None:
    held_out = Shards(shards.folder, "validation")
    lengths = tokenizer().byte_lengths()
    rows = measured(shards, 4096, 100_000)
    firsts = sum(int(lengths[held_out.document(index)[0]]) for index in range(len(held_out)))
    counted = sum(float(row.columns["bytes"].sum()) for row in rows)
    assert counted == held_out.bytes.sum() - firsts
    some = measured(shards, 64, 300)
    assert 300 <= sum(map(len, some)) < 300 + 64
    assert [row.ids for row in some] == [row.ids for row in measured(shards, 64, 300)]


def test_collate_lays_rows_end_to_end(shards: Shards) -> None:
    rows = batches(shards).rows(0)
    batch = collate(rows)
    assert batch.rows == len(rows)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    assert batch.tokens.tolist() == [token for row in rows for token in row.tokens.tolist()]
    assert sum(batch.lengths) == len(batch.tokens) == sum(map(len, rows))
    assert len(batch.ids) == len(batch.sources) == len(batch.lengths)
    # Nothing pads: a batch is exactly its documents.
    assert (batch.targets[batch.weights > 0] >= 0).all()


def test_rows_made_by_hand_carry_masks_columns_and_facts() -> None:
    row = row_of_documents(
        [np.array([5, 6, 7]), np.array([8, 9])],
        learned=[np.array([0, 1, 0]), None],
        columns={"advantage": [np.array([0.0, 0.5, 1.0]), np.array([2.0, 3.0])]},
        facts={"score": [1.0, 0.0]},
        ids=("a", "b"),
    )
    assert row.targets.tolist() == [6, 7, -1, 9, -1]
    assert row.weights.tolist() == [1, 0, 0, 1, 0]
    batch = collate([row, row])
    assert batch.columns["advantage"].tolist() == [0, 0.5, 1, 2, 3] * 2
    assert batch.facts["score"] == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(AssertionError):
        PackedSequence(row.tokens, row.targets, row.weights, (4,), ids=("a",), sources=(0,))


def test_a_preview_marks_the_learned_tokens_of_every_document() -> None:
    first, second = (np.array(tokenizer().encode(text)[:4]) for text in ("one of them", "and another"))
    masks = [np.array([0, 0, 1, 1], dtype=bool), np.array([0, 1, 0, 0], dtype=bool)]
    row = row_of_documents([first, second], learned=masks, ids=["a", "b"])
    parts = [tokenizer().decode(one) for one in (first[:2], first[2:], second[:1], second[1:2], second[2:])]
    assert previewed(row, tokenizer(), colour=False) == (
        "--- a: 2 of 4 tokens learned\n{}⟦{}⟧\n--- b: 1 of 4 tokens learned\n{}⟦{}⟧{}".format(*parts)
    )


def test_a_row_without_a_text_stops_the_work_or_is_skipped_as_its_source_says(tmp_path: Path) -> None:
    place = tmp_path / "a.jsonl"
    place.write_text('{"text": "one two three"}\n{"prompt": "p"}\n{"text": "four five six"}\n')
    work = Work("one", tmp_path, {str(place): place}, 1, MetricsLog(tmp_path / "log"), Progress())
    for on_bad in ("skip", "stop"):
        (source,) = mixture_of({str(place): {"on_bad": on_bad}}).values()
        with nullcontext() if on_bad == "skip" else pytest.raises(TriviumError, match=r"a\.jsonl:2"):
            Door(work, tokenizer())._tokenise(source, tmp_path / on_bad, ())
    assert len(Shards(tmp_path / "skip")) == 2
