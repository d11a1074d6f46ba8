"""Preference rows in every form TRL's users keep them: read alike, laid out as one row, counted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tuning import tokenizer_of

from trivium.data.counted import CountedSource
from trivium.data.preferences import (
    Completion,
    PreferenceBatches,
    PreferenceData,
    PreferencePair,
    Preferences,
    read_preferences,
    row_of,
    typical_tokens,
    unpaired,
)
from trivium.data.settings import mixture_of
from trivium.data.sources import Document
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.stages.parts.stage import Work

ASKED = [{"role": "user", "content": "the river rises"}]
GOOD = [{"role": "assistant", "content": "in the hills"}]
BAD = [{"role": "assistant", "content": "in the mill"}]
CONVERSATIONS = {
    "explicit": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "implicit": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "prompt repeated": {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "prompt as text": {"prompt": "the river rises", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "answers as text": {"prompt": ASKED, "chosen": "in the hills", "rejected": "in the mill"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "the river rises"}],
        "chosen": {"from": "gpt", "value": "in the hills"},
        "rejected": {"from": "gpt", "value": "in the mill"},
    },
    "question": {"question": "the river rises", "chosen": "in the hills", "rejected": "in the mill"},
    "messages": {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
}


def read(
    rows: list[dict], context: int = 256, **options: bool
) -> tuple[list[PreferencePair], PreferenceData]:
    reader = PreferenceData(tokenizer_of("own"), context)
    documents = [Document(None, row, f"rows.jsonl:{n}") for n, row in enumerate(rows, 1)]
    return list(reader.read(documents, **options)), reader


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_every_form_of_a_conversation_reads_alike(form: str) -> None:
    (expected,), _ = read([CONVERSATIONS["explicit"]])
    (found,), _ = read([CONVERSATIONS[form]])
    tokenizer = tokenizer_of("own")
    asked = tokenizer.encode_chat(ASKED, add_generation_prompt=True).ids
    assert found.prompt.tolist() == expected.prompt.tolist() == asked
    for mine, theirs, answer in zip(found.completions, expected.completions, (GOOD, BAD), strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        whole = tokenizer.encode_chat(ASKED + answer)
        assert [*found.prompt, *mine.tokens] == whole.ids
        assert mine.learned.tolist() == whole.learned[len(asked) :]


def test_texts_explicit_and_implicit_read_alike() -> None:
    explicit = {"prompt": "the river", "chosen": " rises", "rejected": " runs"}
    implicit = {"chosen": "the river rises", "rejected": "the river runs"}
    (one,), _ = read([explicit])
    (other,), _ = read([implicit])
    assert one.prompt.tolist() == other.prompt.tolist()
    end = tokenizer_of("own").end_of_reply_id
    for mine, theirs in zip(one.completions, other.completions, strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        assert mine.tokens[-1] == end
        assert mine.learned.all()


def test_numbers_of_a_row_and_what_refuses_them() -> None:
    (pair,), _ = read([{**CONVERSATIONS["explicit"], "margin": 1.5, "weight": 2}])
    assert (pair.margin, pair.weight) == (1.5, 2.0)
    single = {"prompt": ASKED, "completion": GOOD}
    found, _ = read([{**single, "label": value} for value in (True, False, "true", 0.25)])
    assert [one.label for one in found] == [1.0, 0.0, 1.0, 0.25]
    for bad in ({"label": 2}, {"label": "good"}, {"label": 1, "weight": -1}):
        with pytest.raises(TriviumError, match=r"rows\.jsonl:1 has the"):
            read([{**single, **bad}])
    with pytest.raises(TriviumError, match="neither `chosen` and `rejected`"):
        read([{"text": "the river"}])
    found, reader = read([{**single, "label": True}, {**single, "label": 5}], skip=True)
    assert len(found) == 1
    assert reader.tally.unfit == 1


def test_what_is_too_long_loses_its_oldest_turns_or_is_dropped_and_named() -> None:
    earlier = [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "the miller counts the sacks and the river rises in the hills " * 3},
        {"role": "assistant", "content": "the river"},
    ]
    (whole,), _ = read([{"prompt": earlier + ASKED, "chosen": GOOD, "rejected": BAD}])
    (cut,), reader = read([{"prompt": earlier + ASKED, "chosen": GOOD, "rejected": BAD}], context=60)
    tokenizer = tokenizer_of("own")
    assert tokenizer.decode(cut.prompt.tolist()).count("You count.") == 1
    assert "sacks" not in tokenizer.decode(cut.prompt.tolist())
    assert [one.tokens.tolist() for one in cut.completions] == [
        one.tokens.tolist() for one in whole.completions
    ]
    assert reader.tally.cut == 1
    found, reader = read([CONVERSATIONS["explicit"]], context=8)
    assert not found
    assert reader.tally.dropped == 1
    assert "do not fit whole" in reader.tally.named[0]
    tally = reader.tally
    assert tally.tokens_in == tally.tokens_kept + tally.tokens_cut + tally.tokens_dropped > 0


@pytest.mark.parametrize("share", [True, False])
def test_a_row_predicts_the_answers_and_nothing_else(share: bool) -> None:
    pairs, _ = read([CONVERSATIONS["explicit"], {"prompt": ASKED, "chosen": BAD, "rejected": GOOD}])
    row = row_of(pairs, share=share, references=[(-1.0, -2.0), (-3.0, -4.0)])
    expected = [answer.tokens[answer.learned] for pair in pairs for answer in pair.completions]
    assert row.targets[row.weights > 0].tolist() == np.concatenate(expected).tolist()
    roles = ["prompt", "chosen", "rejected"] if share else ["chosen", "rejected"]
    assert row.facts["role"] == roles * 2
    assert row.facts["back"] == ([0, 1, 2] if share else [0, 0]) * 2
    assert [one for one in row.facts["reference"] if one] == [-1.0, -2.0, -3.0, -4.0]


def test_pairs_become_single_answers_and_mismatched_prompts() -> None:
    other = [{"role": "user", "content": "and the miller?"}]
    pairs, _ = read([CONVERSATIONS["explicit"], {"prompt": other, "chosen": GOOD, "rejected": BAD}])
    single = unpaired(pairs)
    assert [one.label for one in single] == [1.0, 0.0, 1.0, 0.0]
    batches = PreferenceBatches(
        [CountedSource("rows", single)], batch=4, seed=0, mismatched=True, together=True
    )
    (row,) = batches.rows(0)
    assert row.facts["role"] == ["prompt", "judged", "mismatched"] * 4
    starts = np.cumsum([0, *row.lengths])
    for _, number in batches.plan.rows(0):
        place = row.ids.index(single[number].id)
        mine = row.tokens[starts[place + 2] : starts[place + 3]]
        # The judgement before may be the other answer to the same prompt, which is no mismatch.
        partner = single[number - 1 - number % 2]
        assert partner.prompt.tolist() != single[number].prompt.tolist()
        assert mine.tolist() == [single[number].prompt[-1], *partner.completions[0].tokens]


def test_the_feed_is_a_pure_function_of_the_step() -> None:
    pairs, _ = read([CONVERSATIONS["explicit"]] * 7)
    sources = [PreferenceBatches([CountedSource("rows", pairs)], batch=3, seed=5, epochs=2) for _ in range(2)]
    assert sources[0].steps == 5
    assert [row.ids for row in sources[0].rows(3)] == [row.ids for row in sources[1].rows(3)]
    seen = [row.ids[0] for step in range(2) for row in sources[0].rows(step)]
    assert len(set(seen)) == 6
    assert sources[0].fingerprint == sources[1].fingerprint
    fewer = PreferenceBatches([CountedSource("rows", pairs[1:])], batch=3, seed=5, epochs=2)
    assert fewer.fingerprint != sources[0].fingerprint
    with pytest.raises(TriviumError, match="have changed"):
        fewer.restore(sources[0].state()[0], {})


@pytest.mark.parametrize("single", [False, True])
def test_a_source_whose_pairs_are_all_held_out_is_refused_and_not_learned_from(tmp_path, single) -> None:
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(CONVERSATIONS['explicit'])}\n" * 3)
    work = Work(
        "dpo", tmp_path, {"pairs": tmp_path / "pairs.jsonl"}, 1, MetricsLog(tmp_path / "log"), Progress()
    )
    tokenizer = tokenizer_of("own")

    def reading(share: float) -> Preferences:
        mixture = mixture_of({"pairs": {"validation": share}})
        return read_preferences(work, mixture, tokenizer, 256, single=single)

    count = 3 * (2 if single else 1)
    with pytest.raises(TriviumError, match=f"`validation: 0.999999` holds out all of its {count} pairs"):
        reading(0.999999)
    read = reading(0.0)
    assert [len(source.items) for source in (*read.training, *read.validation)] == [count, 0]


def test_a_pair_of_which_one_answer_has_no_token_teaches_nothing() -> None:
    found, reader = read([{"prompt": ASKED, "chosen": GOOD, "rejected": ASKED}])
    assert not found
    assert reader.tally.named == ["rows.jsonl:1 teaches nothing: an answer of it has no token"]


def test_the_tokens_of_a_step_are_a_mean_over_first_answers_by_weight() -> None:
    second = Completion(np.arange(9), np.ones(9, dtype=bool))
    pairs = [
        PreferencePair(
            "", np.arange(3), (Completion(np.arange(size), np.arange(size) >= 1), second), weight=weight
        )
        for size, weight in ((4, 1.0), (6, 3.0))
    ]
    assert typical_tokens(pairs) == pytest.approx((1 * 3 + 3 * 5) / 4)
    assert typical_tokens(pairs, whole=True) == pytest.approx((1 * 6 + 3 * 8) / 4)
