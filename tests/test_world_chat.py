import pytest

from trivium import world
from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.checks import check_names, fulfils
from trivium.world.country import country_of
from trivium.world.instructions import KINDS, make_task


def user_turns(document):
    messages = document.fields["messages"]
    return {one["content"] for one in messages if one["role"] == "user"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_answer_fulfils_its_instruction_and_that_of_another_kind_rarely(kind):
    seen = set()
    for split in ("train", "validation", "test"):
        for item in world.questions("chat", split, limit=60, kind=kind):
            assert fulfils(item.answer, item.check), item
            assert not fulfils("", item.check)
            assert not fulfils("I do not know what you mean by this question.", item.check)
            seen.add(item.question)
    assert len(seen) > 50


def test_checks_refuse_what_is_wrong():
    assert not fulfils("lamp lamp", {"check": "repeat", "arguments": {"repeated": "lamp", "times": 3}})
    assert not fulfils("a, c, b", {"check": "order", "arguments": {"items": ["a", "b", "c"]}})
    assert not fulfils(
        '{"name": "Mira"}', {"check": "json", "arguments": {"values": {"name": "Mira", "age": 3}}}
    )
    assert not fulfils("not json", {"check": "json", "arguments": {"values": {}}})
    assert not fulfils("the lamps", {"check": "contains", "arguments": {"texts": ["lamp"]}})
    assert fulfils("The lamp.", {"check": "ends", "arguments": {"with_text": "lamp"}})
    assert not fulfils("The lamp is", {"check": "ends", "arguments": {"with_text": "lamp"}})
    assert fulfils("YES", {"check": "capitals"})
    assert not fulfils("Yes", {"check": "capitals"})
    assert not fulfils("a lamp", {"check": "excludes", "arguments": {"texts": ["lamp"]}})
    with pytest.raises(TriviumError, match="no check called"):
        fulfils("x", {"check": "nice"})
    assert "all" in check_names()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("4 + 9 = 13\n#### 13", True),
        ("4 + 9 = 13\nThe answer is 13.", True),
        ("13", True),
        ("4 + 9 = 13", False),
        ("#### 12", False),
        ("#### 12\n#### 13", True),
        ("#### 130", False),
        ("", False),
    ],
)
def test_the_answer_of_a_sum(text, right):
    assert fulfils(text, {"check": "sum", "arguments": {"answer": 13}}) is right


def test_no_instruction_of_the_test_is_in_train():
    train = set().union(*map(user_turns, world.documents("chat", limit=20000)))
    test = set().union(*map(user_turns, world.documents("chat", split="test", limit=2000)))
    assert len(test) > 1000
    assert not train & test


def test_no_two_wordings_of_one_task_cross_the_splits():
    land = country_of(0, 240)
    for kind in set(KINDS) - {"fact", "yes or no"}:
        keys = {
            split: {make_task(kind, Chance(kind, split, n), land, split).key for n in range(300)}
            for split in ("train", "test")
        }
        assert not keys["train"] & keys["test"], kind


def test_chats_have_one_or_two_turns_and_end_with_the_checked_answer():
    turns = set()
    for document in world.documents("chat", limit=300):
        messages = document.fields["messages"]
        assert messages[-1]["role"] == "assistant"
        assert fulfils(messages[-1]["content"], document.truth)
        turns.add(sum(one["role"] == "user" for one in messages))
    assert turns == {1, 2}
    prompt = next(world.documents("chat", form="prompt"))
    assert prompt.fields["prompt"][-1]["role"] == "user"
    with pytest.raises(TriviumError, match="no kind 'poem'"):
        next(world.documents("chat", kind="poem"))


def last(messages):
    return messages[-1]["content"]


def test_pairs_differ_for_the_cause_they_name():
    causes = set()
    for document in world.documents("taste", limit=600):
        chosen, rejected = last(document.fields["chosen"]), last(document.fields["rejected"])
        cause = document.truth["cause"]
        causes.add(cause)
        assert chosen != rejected
        if cause == "plain":
            assert chosen in rejected
            assert len(rejected) > 3 * len(chosen)
    assert causes == {"right", "plain", "honest"}


def test_agreeing_raters_turn_exactly_the_honest_pairs_round():
    options = {"cause": "honest", "truthful": 0.0, "limit": 200}
    honest = list(world.documents("taste", **options))
    agreeing = list(world.documents("taste", agreeing=1.0, **options))
    for one, other in zip(honest, agreeing, strict=True):
        assert one.fields["prompt"] == other.fields["prompt"]
        assert one.fields["chosen"] == other.fields["rejected"]
        assert one.fields["rejected"] == other.fields["chosen"]
        assert other.truth["rater"] == "agreeing"
    assert {one.truth["pressure"] for one in honest} == {"opinion", "sure", "identity", "feedback"}
    half = sum(one.truth["rater"] == "agreeing" for one in world.documents("taste", agreeing=0.5, **options))
    assert 60 < half < 140


def test_some_people_are_right_and_then_honesty_agrees():
    documents = list(world.documents("taste", cause="honest", limit=300))
    right = [one for one in documents if one.truth["truthful"]]
    assert len(right) > 30
    assert all(last(one.fields["chosen"]).startswith("Yes") for one in right)


def test_preferences_come_in_the_formats_of_trl():
    assert set(next(world.documents("taste")).fields) == {"prompt", "chosen", "rejected"}
    implicit = next(world.documents("taste", form="implicit")).fields
    assert implicit["chosen"][:-1] == implicit["rejected"][:-1]
    labels = {one.fields["label"] for one in world.documents("taste", form="unpaired", limit=20)}
    assert labels == {True, False}
    assert next(world.documents("taste", form="chat")).fields["messages"][-1]["role"] == "assistant"


def test_the_gauge_tells_an_honest_answer_from_a_flattering_one():
    train = {one.truth["entity"] for one in world.documents("taste", limit=3000)} - {""}
    pressures = []
    for item in world.questions("taste", "test", limit=400):
        honest, flattering = item.choices
        assert fulfils(honest, item.check), item
        assert not fulfils(flattering, item.check), item
        assert item.truth["wrong"] == item.truth["claimed"]
        assert item.truth["plain"][-1]["role"] == "user"
        assert item.truth["entity"] not in train
        pressures.append(item.truth["pressure"])
    assert {pressures.count(pressure) for pressure in set(pressures)} == {100}
