"""What becomes of a pass key when a conversation is fitted: the model repeats any key it still reads."""

import re
from types import SimpleNamespace

import pytest
from generating import tokenizer

from trivium.evals.conversation import run_conversation, told_in_turns
from trivium.evals.settings import Settings
from trivium.evals.task import planned
from trivium.generate.requests import Completion, Slide
from trivium.kit.errors import TriviumError

WINDOW = 512
DEPTHS = [0.0, 0.5, 1.0]


class Reader:
    """Has the engine's face, and says the last number that it can still read, or sums up nothing."""

    def __init__(self, recalls):
        self.tokenizer, self.window, self.recalls, self.read = tokenizer(), WINDOW, recalls, []

    def generate(self, requests):
        return [[self.answer(request)] for request in requests]

    def answer(self, request):
        ids = request.prompt
        self.read.append(len(ids))
        if request.slide is None:
            assert len(ids) + request.sampling.max_new_tokens <= WINDOW
        else:
            forgotten = Slide().forgotten(len(ids), WINDOW)
            ids = [*ids[:4], *ids[4 + forgotten :]]
        text = tokenizer().decode(ids)
        keys = re.findall(r"The pass key is (\d+)|bells and (\d+)", text)
        said = "".join(keys[-1]) if keys else "none"
        if "Summarise the conversation" in text and self.recalls:
            said = f"bells and {said}"
        return Completion(said, [1] * 7, [], "stop", len(ids))


def asked(overflow, recalls=True, limit=9, depths=DEPTHS):
    subject = SimpleNamespace(tokenizer=tokenizer(), window=WINDOW, engine=Reader(recalls))
    found = run_conversation(subject, Settings(limit=limit), overflow, 1200, depths)
    right = {
        depth: [one.scores["accuracy"] for one in found.records if one.groups["depth"] == f"{depth:g}"]
        for depth in DEPTHS
    }
    return found.records, right, subject.engine


def test_what_is_dropped_is_not_known_and_the_end_is():
    records, right, engine = asked("drop")
    assert right == {0.0: [0.0] * 3, 0.5: [0.0] * 3, 1.0: [1.0] * 3}
    assert [one.scores["tokens"] for one in records] == [size + 7 for size in engine.read]


def test_what_slides_is_forgotten_in_the_cache():
    records, right, _ = asked("slide")
    assert right == {0.0: [0.0] * 3, 0.5: [0.0] * 3, 1.0: [1.0] * 3}
    # more is read for the same answers
    assert min(one.scores["tokens"] for one in records) > 1000


def test_a_summary_keeps_what_it_says_and_costs_what_it_reads():
    records, right, engine = asked("summarise", limit=3)
    assert right == {0.0: [1.0], 0.5: [1.0], 1.0: [1.0]}
    assert sum(one.scores["tokens"] for one in records) == sum(engine.read) + 7 * len(engine.read)
    assert len(engine.read) > 2 * len(records)
    # a needle that no summary names is lost
    assert asked("summarise", recalls=False, limit=3)[1][0.0] == [0.0]


def test_a_refusal_answers_nothing_and_says_why():
    records, right, engine = asked("refuse")
    assert right == {depth: [0.0] * 3 for depth in DEPTHS}
    assert engine.read == []
    assert "the window leaves room" in records[0].answers[0]["finish"]


def test_wrong_dials_are_refused():
    subject = SimpleNamespace(tokenizer=tokenizer(), window=WINDOW)
    with pytest.raises(TriviumError, match="refuse, drop, slide, summarise"):
        planned("conversation?overflow=forget", Settings())
    with pytest.raises(TriviumError, match="chat template"):
        run_conversation(subject, Settings(style="continue"))


def test_one_depth_may_be_written_without_a_list():
    records, _, _ = asked("drop", limit=1, depths=1.0)
    assert [one.groups["depth"] for one in records] == ["1"]


def test_nothing_of_a_chronicle_is_lost_in_turns():
    told = told_in_turns("One. Two! " * 60 + "\nThe pass key is")
    assert [one["role"] for one in told] == ["user", "assistant"] * (len(told) // 2) + ["user"]
    assert " ".join(one["content"] for one in told[:-1:2]) == ("One. Two! " * 60).strip()
    assert told[-1]["content"] == "The pass key is"
