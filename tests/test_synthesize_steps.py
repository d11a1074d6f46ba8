"""The steps of a synthesis, each against a teacher whose every word is known."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint, serving
from generating import tiny_model, tokenizer
from synthesizing import QUICK, lines, synthesized, write_rows

from trivium.generate.asking.asker import Asker
from trivium.generate.asking.budget import Budget, Ledger
from trivium.generate.asking.journal import Journal
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.model.folder import save_model
from trivium.synthesize.diversity import Meanings
from trivium.synthesize.row import Row, asked
from trivium.synthesize.step import Room, Step, parse_steps
from trivium.synthesize.steps.traces import broken_form, foreign_share
from trivium.synthesize.steps.verify import majority

NUMBER = re.compile(r"\d+")
ALL = {
    "seed", "teacher", "rephrase", "question_from_answer", "answer", "verify", "judge", "evolve",
    "critique_revise", "columns", "traces", "pairs", "mix", "diversify", "decontaminate",
}  # fmt: skip


def run(folder: Path, answer: Any, steps: list[Any], **stage: Any) -> tuple[list[dict], list[dict], dict]:
    """Rows, dropped rows and the report of a stage whose teacher answers so."""
    with serving(FakeEndpoint(answer=answer)) as fake:
        made = synthesized(folder, endpoint={"url": fake.url, "model": "fake", **QUICK}, steps=steps, **stage)
    return (
        lines(made / "data" / "rows.jsonl"),
        lines(made / "dropped.jsonl"),
        read_json(made / "synthesis.json"),
    )


def written(folder: Path, rows: list[dict[str, Any]], name: str = "seeds.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def rules(dropped: list[dict]) -> dict[str, int]:
    return dict(Counter(row["reason"].partition(":")[0] for row in dropped))


def room_without_a_model(folder: Path) -> Room:
    return Room(Asker(Journal(folder / "a.jsonl", []), Ledger(Budget())), 1, print, folder, folder)


def through(folder: Path, rows: list[dict[str, Any]], step: Any) -> tuple[list[Row], Room]:
    """Rows through one step that asks no model."""
    room = room_without_a_model(folder)
    return parse_steps([step])[0].run([Row(str(n), dict(row)) for n, row in enumerate(rows)], room), room


def test_these_are_the_steps():
    assert set(Step.all()) == ALL


def test_how_an_answer_is_drawn_is_what_its_step_says():
    said = {"temperature": 0.3, "top_p": 0.8, "max_new_tokens": 7, "stop": ["END"]}
    (step,), schema = parse_steps([{"answer": said}]), {"type": "object"}
    assert step.sampling(5, schema) == Sampling(
        temperature=0.3, top_p=0.8, max_new_tokens=7, stop=("END",), seed=5, json_schema=schema
    )


@pytest.mark.parametrize(("count", "rows"), [(None, 6), (4, 4), (20, 20)])
def test_a_seed_makes_every_combination_once_or_as_many_as_are_wanted(tmp_path, count, rows):
    (seed,) = parse_steps([{"seed": {"topics": ["a", "b", "c"], "styles": ["d", "e"], "count": count}}])
    assert seed.answers(0) == (rows, 0.0, 0)
    assert len(seed.seeds(room_without_a_model(tmp_path))) == rows


def test_a_teacher_asks_over_every_combination_and_reads_json(tmp_path):
    schema = {"type": "object", "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
              "required": ["question", "answer"]}  # fmt: skip

    def teacher(prompt: str, seed: int) -> str:
        if "bells" in prompt:
            return "I would rather not."
        made = json.dumps({"question": f"Q {prompt}", "answer": "yes"})
        return f"Here:\n```json\n{made}\n```" if "doves" in prompt else made

    seeds = {"topics": ["doves", "bells", "towns"], "styles": ["plain", "formal"], "languages": ["English"]}
    rows, dropped, report = run(
        tmp_path, teacher,
        [{"seed": seeds}, {"teacher": {"template": "{{ topic }} / {{ style }}", "schema": schema}}],
    )  # fmt: skip
    assert {(row["topic"], row["style"], row["question"]) for row in rows} == {
        (topic, style, f"Q {topic} / {style}")
        for topic in ("doves", "towns")
        for style in ("plain", "formal")
    }
    assert rules(dropped) == {"no JSON of the schema": 2}
    assert {row["said"] for row in dropped} == {"I would rather not."}
    coverage = report["diversity"]["coverage"]
    assert (coverage["cells"], coverage["filled"]) == (6, 4)
    assert coverage["columns"] == ["topic", "style", "language"]
    assert all(row["provenance"][0]["wrote"] == ["answer", "question"] for row in rows)
    with pytest.raises(TriviumError, match=r"the template of .* asks for a column that it has not .*subject"):
        run(tmp_path / "b", teacher, [{"seed": ["doves"]}, {"teacher": "About {{ subject }}."}])


def test_combinations_that_come_round_again_are_asked_with_another_seed(tmp_path):
    steps = [
        {"seed": {"topics": ["rain", "snow"], "count": 6}},
        {"teacher": {"template": "Of {{ topic }}.", "to": "text"}},
    ]
    rows, _, _ = run(tmp_path, lambda prompt, seed: f"{prompt} {seed}", steps)
    assert len({row["text"] for row in rows}) == 6


def test_documents_are_cut_and_written_again_in_styles(tmp_path):
    data = written(tmp_path, [{"text": "\n".join(f"line {n} of the document" for n in range(8))}])
    rows, _, _ = run(
        tmp_path, lambda prompt, seed: f"again: {prompt.splitlines()[-1]} ({'wiki' in prompt})",
        [{"seed": {"characters": 60}},
         {"rephrase": {"styles": ["like a wiki", "like a child"], "per_row": 2}}],
        data=data,
    )  # fmt: skip
    assert len(rows) == 8
    assert Counter(row["style"] for row in rows) == {"like a wiki": 4, "like a child": 4}
    assert all(row["text"].endswith(f"({'wiki' in row['style']})") for row in rows)
    assert all(row["provenance"][0]["of"] in row["id"] for row in rows)


def test_back_translation_keeps_what_is_answered_again_in_the_band(tmp_path):
    """The share of new answers that agree with the source is in the band; one minus it is the difficulty."""
    data = written(
        tmp_path, [{"question": "hidden", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(12)]
    )

    def teacher(prompt: str, seed: int) -> str:
        if prompt.startswith("Below is an answer"):
            assert "hidden" not in prompt
            return f"What is one more than {re.findall(NUMBER, prompt)[0]}?"
        number = int(prompt.split()[-1].rstrip("?"))
        # 0 never right, 1 always, the others for some seeds.
        right = number == 1 or (number != 0 and (seed >> 3) % 2 == 0)
        return f"#### {number + 1 if right else 99}"

    rows, dropped, _ = run(
        tmp_path, teacher,
        [{"question_from_answer": {"per_row": 1}}, {"answer": {"samples": 8}},
         {"verify": {"by": "math", "band": [0.25, 0.75]}}],
        data=data,
    )  # fmt: skip
    kept = {int(row["messages"][0]["content"].split()[-1].rstrip("?")): row for row in rows}
    assert kept
    assert not {0, 1} & kept.keys()
    for number, row in kept.items():
        assert row["messages"][1]["content"] == f"#### {number + 1}"
        assert row["answer"].endswith(f"#### {number + 1}")
        assert 0.25 <= row["difficulty"] <= 0.75
        facts = row["provenance"][-1]
        assert row["difficulty"] == pytest.approx(1 - facts["right"] / facts["answers"])
    assert rules(dropped)["outside the band"] >= 2


def test_verify_keeps_the_right_and_says_of_every_other_why_not(tmp_path):
    prompts = {"prompt": "1 + 1?", "answer": "2"}
    candidates = [{"text": text} for text in ("#### 2", "#### 3", "2", "I think", "#### 2")]
    kept, room = through(
        tmp_path, [{**prompts, "candidates": candidates}], {"verify": {"by": "math", "keep": 3}}
    )
    assert [row.fields["completion"] for row in kept] == ["#### 2", "2"]
    assert room.dropped[0][2] == "wrong: 3 is not 2"
    assert len(room.dropped) == 2
    assert kept[0].fields["difficulty"] == pytest.approx(0.4)
    every, _ = through(
        tmp_path, [{**prompts, "candidates": candidates}], {"verify": {"by": "math", "every": True}}
    )
    assert [one["score"] for one in every[0].fields["candidates"]] == [1, 0, 1, 0, 1]
    [pair], _ = through(tmp_path, [every[0].fields], {"pairs": {"gap": 0.5}})
    assert (pair.fields["chosen"], pair.fields["rejected"]) == ("#### 2", "I think")
    none, room = through(tmp_path, [{**prompts, "candidates": [{"text": "a", "score": 1.0}]}], "pairs")
    assert none == []
    assert room.dropped[0][2].startswith("one answer:")


def test_most_of_several_answers_agree(tmp_path):
    assert majority(["so it is\n#### 4", "4", "\\boxed{4.0}", "#### 5", ""]) == ("4", {0, 1, 2})
    assert majority(["", "  "]) == ("", set())
    assert majority(["5", "4", "4", "5"]) == ("5", {0, 3})
    row = {"prompt": "?", "candidates": [{"text": text} for text in ("#### 7", "#### 7", "#### 8", "#### 9")]}
    [kept], room = through(tmp_path, [row], {"verify": "agreement"})
    assert (kept.fields["answer"], kept.fields["difficulty"]) == ("7", 0.5)
    assert rules([{"reason": why} for *_, why in room.dropped]) == {"wrong": 2}
    nothing, _ = through(tmp_path, [row], {"verify": {"by": "agreement", "band": [0.6, 1]}})
    assert nothing == []
    # Beside another scorer, what the others do not say loses a point.
    both = {"verify": {"by": ["math", "agreement"]}}
    kept = [through(tmp_path, [{**row, "answer": answer}], both)[0] for answer in ("7", "8")]
    assert [[one.fields["completion"] for one in rows] for rows in kept] == [["#### 7"], []]


DOUBLE = "```python\ndef double(n):\n    return 2 * n\n```"


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("assert double(3) == 6\nassert double(0) == 0", None),
        ("```python\nassert double(3) == 6\n```", None),
        ("double(3)", "tests: they assert nothing"),
        ("assert True", "tests: the tests never ask"),
        ("assert double", "tests: the tests never ask"),
        ("assert double(0) == 0", "tests: a program passes them whose functions only `return 0`"),
        ("assert double(3 ==", "tests: they are no Python"),
    ],
)
def test_tests_that_a_model_wrote_have_to_fail_an_empty_program(tmp_path, tests, why):
    row = Row("a", {"prompt": "Double it.", "tests": tests, "completion": DOUBLE})
    row.note("teacher", wrote=["tests"]).note("answer", samples=1)
    room = room_without_a_model(tmp_path)
    kept = parse_steps([{"verify": "code"}])[0].run([row], room)
    assert bool(kept) == (why is None), room.dropped
    if why is not None:
        assert room.dropped[0][2].startswith(why)


def sums(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(count)]


def solver(prompt: str, seed: int) -> str:
    """Right for some seeds; right answers are short for odd numbers and long for even ones."""
    first, second = (int(one) for one in re.findall(r"\d+", prompt)[:2])
    right = (seed >> 4) % 2 == 0
    talk = "Let me think about it for quite a while. " if right == (first % 2 == 0) else ""
    return f"{talk}The answer is {first + second + (0 if right else 5)}."


def judging(verdict: Any) -> Any:
    def answer(prompt: str, seed: int) -> str:
        if "Better: A" not in prompt:
            return solver(prompt, seed)
        request, first, second = re.search(
            r"The request:\n(.*?)\n\nAnswer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\nWhich", prompt, re.S
        ).groups()
        return f"I compared them.\nBetter: {'A' if verdict(request, first, second) else 'B'}"

    return answer


def says_right(request: str, text: str) -> bool:
    return re.findall(r"\d+", text)[-1] == str(sum(int(one) for one in re.findall(r"\d+", request)))


def by_truth(request: str, first: str, second: str) -> bool:
    return says_right(request, first) >= says_right(request, second)


JUDGES = {
    "knows": (by_truth, None),
    "likes what is long": (
        lambda request, first, second: len(first) >= len(second),
        "accuracy 0.* is below 0.7",
    ),
    "likes what comes first": (lambda request, first, second: True, r"position bias \+0.50 is beyond 0.25"),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_is_tried_on_what_a_program_knows_and_a_biased_one_refused(tmp_path, name, capsys):
    verdict, refused = JUDGES[name]
    steps = [
        {"answer": {"samples": 4}},
        {"judge": {"how": "pairwise", "calibrate": {"by": "math"}, "bounds": {"length_bias": 0.3}}},
    ]
    made = lambda: run(tmp_path, judging(verdict), steps, data=written(tmp_path, sums(40)))
    if refused is not None:
        with pytest.raises(TriviumError, match=f"The judge fake at .* is refused: .*{refused}"):
            made()
        said = capsys.readouterr().err
        assert re.search(r"judge fake .*right in .*%\), position bias [+-]\d", said.replace("\n", " "))
        return
    rows, _, report = made()
    facts = report["steps"][1]["facts"]
    assert facts["accuracy"]["value"] == 1
    assert facts["position_bias"] == facts["length_bias"] == 0
    # It chose the right one wherever there was one.
    some = [row for row in rows if says_right(row["messages"][0]["content"], row["messages"][1]["content"])]
    assert len(some) > 0.8 * len(rows)


def test_a_rubric_gives_numbers_and_pairs_from_outside_can_try_it(tmp_path):
    pairs = [{"prompt": f"say {n}", "chosen": "good text", "rejected": "bad"} for n in range(20)]
    data = written(
        tmp_path, [{"prompt": f"write {n}", "completion": "good" if n % 3 else "bad"} for n in range(12)]
    )
    how = {"least": 5, "calibrate": {"data": written(tmp_path, pairs, "pairs.jsonl")}}
    teacher = lambda prompt, seed: f"Well.\nScore: {9 if 'good' in prompt.split('The answer:')[1][:6] else 2}"
    rows, dropped, report = run(tmp_path, teacher, [{"judge": how}], data=data)
    assert {row["messages"][1]["content"] for row in rows} == {"good"}
    assert rules(dropped) == {"judged bad": 4}
    assert report["steps"][0]["facts"]["accuracy"]["value"] == 1
    with pytest.raises(TriviumError, match="0 pairs of a right and a wrong answer are too few"):
        run(tmp_path / "b", teacher, [{"judge": {"calibrate": {"by": "math"}}}], data=data)
    (judge,) = parse_steps([{"judge": {"calibrate": {"by": "maths"}}}])
    with pytest.raises(TriviumError, match="no scorer called 'maths'"):
        judge.check(tmp_path)


def test_a_reward_model_that_labels_for_a_judge_is_a_reference(tmp_path):
    by = {"model": "liking", "weight": 1.0}
    (judge,) = parse_steps([{"judge": {"calibrate": {"by": [by]}}}])
    assert judge.mentions() == [("calibrate.by.0.model", "liking", ("reward",))]


def test_what_a_step_cannot_do_without_is_said_before_it_asks(tmp_path):
    unanswered = written(tmp_path, [{"prompt": "Say something."}])
    requests: list[str] = []
    teacher = lambda prompt, seed: requests.append(prompt) or ""
    with pytest.raises(TriviumError, match="`critique_revise` reads the column `completion`"):
        run(tmp_path, teacher, ["critique_revise"], data=unanswered)
    assert not requests
    with pytest.raises(ValueError, match="`pattern` is no regular expression"):
        parse_steps([{"traces": {"pattern": "####("}}])


def test_an_answer_takes_the_place_of_candidates(tmp_path):
    steps = [{"answer": {"samples": 2}}, {"answer": {"temperature": 0.5}}, {"verify": {"by": "math"}}]
    data = written(tmp_path, [{"prompt": "What is 3 + 4?", "answer": "7"}])
    # Nothing but the last answer is right, and that is what is verified.
    texts = iter(["\\boxed{5}", "\\boxed{6}", "\\boxed{7}"])
    rows, _, _ = run(tmp_path, lambda prompt, seed: next(texts), steps, data=data)
    assert [row["messages"][-1]["content"] for row in rows] == ["\\boxed{7}"]


def test_prompts_evolve_and_answers_are_criticised(tmp_path):
    def teacher(prompt: str, seed: int) -> str:
        if prompt.startswith("Here is a task"):
            return f"{prompt.splitlines()[2]}, harder"
        if "A principle:" in prompt:
            return "It claims too much."
        if "What is wrong with it: It claims too much." in prompt:
            return "A modest answer." if "number 1" not in prompt else "A bold answer."
        return "A bold answer."

    rows, dropped, _ = run(
        tmp_path, teacher,
        [{"evolve": {"ways": ["harder"], "rounds": 2}}, "answer", {"critique_revise": ["Be modest."]}],
        data=str(write_rows(tmp_path, 4, answer="stale")),
    )  # fmt: skip
    prompts = {row["prompt"][-1]["content"] for row in rows}
    assert "question number 3, harder, harder" in prompts
    assert {row["chosen"][0]["content"] for row in rows} == {"A modest answer."}
    assert {row["rejected"][0]["content"] for row in rows} == {"A bold answer."}
    assert len(rows) == 6
    assert rules(dropped) == {"unchanged": 2}
    assert all("answer" not in row for row in rows if "harder" in row["prompt"][-1]["content"])
    assert rows[0]["provenance"][-1]["principle"] == "Be modest."


def test_traces_that_ramble_repeat_switch_or_break_off_are_counted(tmp_path):
    texts = {
        "First halve it, then add three, so the result is seven. #### 7": None,
        "": "too short", "go on " * 90: "too long", "we add one and then " * 9: "repeats",
        "Also: это ответ на вопрос, семь.": "language", "<think> so it goes": "form",
        "```python\nprint(7)": "form", "The result is seven.": "form", "Σ of all = 7 #### 7": None,
    }  # fmt: skip
    rows = [{"prompt": "What is half of eight plus three?", "completion": text} for text in texts]
    step = {"traces": {"most_words": 60, "pattern": "####|think|print"}}
    kept, room = through(tmp_path, rows, step)
    assert [row.fields["completion"] for row in kept] == [text for text, why in texts.items() if why is None]
    assert [why.partition(":")[0] for *_, why in room.dropped] == [why for why in texts.values() if why]
    several, room = through(
        tmp_path, [{"prompt": "What?", "candidates": [{"text": text} for text in texts]}], step
    )
    assert len(several[0].fields["candidates"]) == 2
    assert foreign_share("これは答えです", "何ですか") == 0
    assert broken_form("a \\[ b") is not None


def test_rows_of_examinations_are_left_out_and_others_mixed_in(tmp_path):
    exam = [{"question": f"How many doves sit on the old tower number {n} at noon in summer?", "answer": "4"}
            for n in range(3)]  # fmt: skip
    rows = [
        {"prompt": f"Tell me of the baker in street {n}, please, and of all his loaves."} for n in range(6)
    ]
    leaked = {"prompt": exam[1]["question"]}
    other = written(tmp_path, [{"prompt": f"other {n}"} for n in range(9)], "other.jsonl")
    found, dropped, _ = run(
        tmp_path, lambda prompt, seed: "Yes.",
        [{"decontaminate": written(tmp_path, exam, "exam.jsonl")}, {"mix": {"data": other, "share": 0.4}}],
        data=written(tmp_path, [*rows, leaked]),
    )  # fmt: skip
    assert sum(row["id"].startswith("mix:") for row in found) == 4
    assert len(found) == 10
    [one] = dropped
    assert one["prompt"] == leaked["prompt"]
    assert one["reason"].startswith("leak: 100 % of exam.jsonl:2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    save_model(tiny_model(), folder)
    tokenizer().save(folder)
    return folder


def test_near_duplicates_go_by_words_and_by_meaning(tmp_path, checkpoint):
    base = "The baker of the old town sells bread and cake to all the children on Sunday mornings"
    prompts = [
        base,
        f"{base}.",
        base.replace("cake", "milk"),
        "A ship left the harbour at dawn with nine sailors.",
    ]
    data = written(tmp_path, [{"prompt": prompt} for prompt in prompts])
    made = synthesized(tmp_path, data=data, steps=[{"diversify": 0.5}])
    assert [row["prompt"] for row in lines(made / "data" / "rows.jsonl")] == [prompts[0], prompts[3]]
    assert rules(lines(made / "dropped.jsonl")) == {"near-duplicate": 2}
    loose = synthesized(
        tmp_path, "loose", data=data, **{"from": str(checkpoint)},
        steps=[{"diversify": {"threshold": 1, "similarity": 0.95, "cluster": 0.5}}],
    )  # fmt: skip
    # With their own mean hidden states; two that differ in a full stop have the same words.
    dropped = lines(loose / "dropped.jsonl")
    assert {row["prompt"] for row in dropped} >= {prompts[1]}
    assert read_json(loose / "synthesis.json")["steps"][0]["facts"]["clusters"] >= 1


def test_coverage_is_refused_over_a_column_that_no_row_has(tmp_path):
    data = written(tmp_path, [{"prompt": "What is 2 + 2?"}])
    with pytest.raises(TriviumError, match=r"`coverage_by` names kind, .*they have prompt"):
        synthesized(tmp_path, data=data, steps=["diversify"], coverage_by=["kind"])


TOPICS = [f"topic {n}" for n in range(10)]


def narrow(prompt: str, seed: int) -> str:
    """Writes something new about most topics, and always the same about the first four."""
    number = int(re.findall(NUMBER, prompt)[0])
    return " ".join(f"w{number}x{(seed + 7 * n) % 997 if number > 3 else n}" for n in range(12))


def drawn(folder: Path, steer: Any) -> tuple[dict, Counter[str]]:
    """120 requests about a pool in which seven of eight rows have nothing new to say."""
    pool = [{"topic": TOPICS[n % 4 if n % 8 else 4 + (n // 8) % 6], "number": n} for n in range(480)]
    steps = [
        {"teacher": {"template": "Write about {{ topic }}. ({{ number }})", "to": "prompt"}},
        {"diversify": {"threshold": 0.7, "embed": "none", **({"steer": steer} if steer else {})}},
    ]
    with serving(FakeEndpoint(answer=narrow)) as fake:
        made = synthesized(
            folder, endpoint={"url": fake.url, "model": "fake", **QUICK}, data=written(folder, pool),
            per_round=12, budget={"requests": 120}, steps=steps,
        )  # fmt: skip
    report = read_json(made / "synthesis.json")
    return report, Counter(row["topic"] for row in lines(made / "data" / "rows.jsonl"))


def test_the_next_row_of_a_round_is_drawn_as_if_those_before_it_were_kept():
    """Of two cells with nothing in them, the second row is of the other cell in 2 of 3 cases."""
    (step,) = parse_steps([{"diversify": {"steer": {"by": ["topic"]}}}])
    apart = 0
    for seed in range(2000):
        (fresh,) = parse_steps([step.written()])
        pool = [Row(f"{topic}{n}", {"topic": topic}) for topic in "ab" for n in range(2)]
        apart += len({row.fields["topic"] for row in fresh.choose(pool, 2, random.Random(seed))}) - 1
    assert apart / 2000 == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(("gap", "made"), [(0, 1), (0.5, 1), (1, 0)])
def test_a_pair_is_made_of_scores_further_apart_than_the_gap(tmp_path, gap, made):
    several = [[1.0, 1.0], [1.0, None], [0.5, 1.5, 1.0]]
    rows = [
        {"prompt": "?", "candidates": [{"text": f"{place}", "score": one} for place, one in enumerate(some)]}
        for some in several
    ]
    found, room = through(tmp_path, rows, {"pairs": gap})
    assert [(row.fields["chosen"], row.fields["rejected"]) for row in found] == [("1", "0")] * made
    assert rules([{"reason": why} for *_, why in room.dropped]) == {"alike": 2 - made, "one answer": 1}


def test_meanings_are_compared_without_what_all_of_them_share():
    directions = np.eye(8)[:, :4]
    meanings = Meanings(0.97, 0.7)
    found = meanings.read(100 * np.ones(4) + directions)
    centred = directions - directions.mean(0)
    assert found == pytest.approx(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    meanings.add(found[0])
    nearest = meanings.nearest(found[1])
    assert nearest == pytest.approx(float(found[0] @ found[1]))
    assert nearest < 0.5


def test_a_conversation_is_asked_up_to_where_its_data_answered():
    said = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    assert asked(Row("1", {"messages": [*said, *said]})) == [*said, said[0]]


@pytest.mark.slow
def test_steering_draws_towards_what_is_missing_and_stops_when_nothing_is_new(tmp_path):
    """At the same number of requests, more rows of more topics than in the order of the data."""
    plain, unsteered = drawn(tmp_path / "plain", None)
    steered_report, steered = drawn(tmp_path / "steered", {"by": ["topic"], "stop_below": 0})
    assert plain["cost"]["requests"] == steered_report["cost"]["requests"] == 120
    assert sum(steered.values()) > 2 * sum(unsteered.values())
    assert len(steered) == 10
    assert steered_report["diversity"]["coverage"]["filled"] == 10
    # With all that is new used up, rounds bring little, and the stage stops before its budget does.
    pool = [{"topic": TOPICS[n % 4], "number": n} for n in range(200)]
    data = written(tmp_path, [{"prompt": narrow(one["topic"], 0), **one} for one in pool])
    step = {"diversify": {"threshold": 0.7, "embed": "none", "steer": {"by": ["topic"], "rounds": 2}}}
    made = synthesized(tmp_path, "stops", data=data, per_round=20, steps=[step])
    report = read_json(made / "synthesis.json")
    assert (report["rows"], report["rounds"], report["not_drawn"]) == (4, 3, 140)
    assert report["steps"][0]["facts"]["new_by_round"] == [0.2, 0, 0]
