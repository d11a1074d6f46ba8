"""Replay by a bare share, chats among documents, and a curriculum, as stages."""

from __future__ import annotations

import json
import shutil

import pytest

import trivium
from tests.test_midtrain import RECIPE, recipe
from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError
from trivium.pipeline.show import documents
from trivium.pipeline.store import Entry
from trivium.tokens.tokenizer import Tokenizer

ROAD = """\
  again:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.2}}
    replay: 0.25
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 8
    learning_rate: 0.002
    checkpoint: {at: [step=4]}
  chats:
    kind: midtrain
    from: again@step=4
    data: {./chats: {validation: 0}}
    replay: {share: 0.5}
    batch: 256
    steps: 4
    learning_rate: 0.002
  soup: {kind: merge, of: [again, again]}
  after-soup:
    kind: midtrain
    from: soup
    data: {./graded: {easy_first: hard, validation: 0}}
    replay: 0.5
    batch: 64
    steps: 12
    learning_rate: 0.002
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    path = recipe(folder, RECIPE[: RECIPE.index("  fork:")] + ROAD)
    (folder / "chats").mkdir()
    said = [{"role": "user", "content": "1 and 2?"}, {"role": "assistant", "content": "make 3."}]
    (folder / "chats" / "some.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 20)
    (folder / "graded").mkdir()
    graded = [{"text": f"{one} and one more make {one + 1}.", "hard": (7 * one) % 40} for one in range(40)]
    (folder / "graded" / "some.jsonl").write_text("".join(json.dumps(one) + "\n" for one in graded))
    return trivium.run(path, runs=folder / "runs")


@pytest.mark.slow
def test_a_bare_share_replays_what_the_parent_learnt_from(made):
    data = made["again"].summary["data"]
    assert list(data) == ["./other", "corpus"]
    assert data["corpus"]["share"] == pytest.approx(0.25, abs=1 / 64)


def test_a_corpus_is_spelt_anew_with_the_grown_vocabulary_and_holds_out_the_same(made):
    (folder,) = (made["again"].folder / "retokenised").iterdir()
    corpus = made["corpus"].folder / "data"
    before, after = Tokenizer.load(corpus / "tokenizer"), Tokenizer.load(made["again"].folder / "model")
    for split in ("train", "validation"):
        old, new = Shards(corpus, split), Shards(folder, split, tokenizer=after)
        assert len(old) == len(new) > 0
        for index in range(len(old)):
            assert new.id(index) == old.id(index)
            assert after.decode(new.document(index).tolist()) == before.decode(old.document(index).tolist())


def test_a_replay_hands_on_what_the_parent_itself_replayed(made):
    data = made["chats"].summary["data"]
    assert list(data) == ["./chats", "./other", "corpus"]
    assert data["./chats"]["share"] == pytest.approx(0.5, abs=1 / 32)
    assert data["./other"]["share"] == pytest.approx(0.5 * 0.75, abs=1 / 32)
    assert data["corpus"]["share"] == pytest.approx(0.5 * 0.25, abs=1 / 32)


def test_chats_among_documents_go_through_the_template_and_only_answers_are_learnt(made):
    tokenised = (made["chats"].folder / "tokenised").iterdir()
    shards = next(one for one in (Shards(folder, "train") for folder in tokenised) if one.has_masks)
    tokens, learned = shards.document(0), shards.learned_of(0, 0, int(shards.lengths[0]))
    spelling = Tokenizer.load(made["chats"].folder / "model")
    assert "user" in spelling.decode(tokens.tolist(), skip_control=False)
    assert spelling.decode(tokens[learned].tolist()).strip() == "make 3."


def test_a_soup_replays_what_its_first_ingredient_learnt_from(made):
    assert list(made["after-soup"].summary["data"]) == ["./graded", "./other", "corpus"]


def test_easy_documents_come_before_hard_ones(made):
    tokenised = (made["after-soup"].folder / "tokenised").iterdir()
    shards = next(one for one in (Shards(folder, "train") for folder in tokenised) if one.manifest["columns"])
    hard = {shards.id(index): float(shards.column("hard")[index]) for index in range(len(shards))}
    steps = [documents(Entry(made["after-soup"].folder), step) for step in range(1, 13)]
    seen = [[hard[one] for one in step if one in hard] for step in steps]
    means = [sum(step) / len(step) for step in seen if step]
    assert len(means) >= 8
    # One pass goes from the easiest to the hardest; only a second pass could go down again.
    first = means[: means.index(max(means)) + 1]
    assert len(first) >= 4
    assert first == sorted(first)


@pytest.mark.slow
def test_what_a_bare_share_replays_is_not_watched(tmp_path):
    text = RECIPE[: RECIPE.index("  fork:")] + ROAD[: ROAD.index("  chats:")]
    path = recipe(tmp_path, text.replace("replay: 0.25", "replay: 0.25\n    watch: corpus"))
    with pytest.raises(TriviumError, match="again: `corpus` is in `watch` and in `replay`; leave it in one"):
        trivium.run(path, runs=tmp_path / "runs")


@pytest.mark.slow
def test_what_left_no_mixture_behind_is_named(tmp_path):
    text = RECIPE[: RECIPE.index("  fork:")] + ROAD[: ROAD.index("  chats:")]
    path = recipe(tmp_path, text)
    run = trivium.run(path, runs=tmp_path / "runs", only=["base"])
    away = shutil.copytree(run["base"].folder / "model", tmp_path / "away" / "model")
    with pytest.raises(TriviumError, match="nothing is known of what"):
        trivium.run(path, runs=tmp_path / "runs", set={"stages.again.from": str(away)}, only=["again"])
