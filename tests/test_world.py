import lzma
import os
import subprocess
import sys

import pytest

from trivium import world
from trivium.grade.steps import labels_of_steps
from trivium.kit.errors import TriviumError
from trivium.world.country import country_of
from trivium.world.craft import workshop
from trivium.world.sums import _operands

DIGEST = """
import hashlib
from trivium import world
digest = hashlib.sha256()
for name in world.sources():
    for split in ("train", "validation", "test"):
        for document in world.documents(name, split=split, seed=3, limit=30):
            digest.update(repr(document).encode())
        try:
            items = list(world.questions(name, split, limit=20, shots=1))
        except Exception:
            items = []
        digest.update(repr(items).encode())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_every_process_writes_the_same_world():
    digests = set()
    for hash_seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("name", sorted(world.sources()))
def test_a_document_depends_on_its_number_alone(name):
    whole = list(world.documents(name, seed=5, limit=40))
    assert list(world.documents(name, seed=5, limit=10, start=30)) == whole[30:]
    assert [document.id for document in whole[:2]] == [f"world:{name}#0", f"world:{name}#1"]
    assert list(world.documents(name, seed=6, limit=40)) != whole
    assert len({repr((one.text, one.fields)) for one in whole}) > 20


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["prose", "facts", "sums"])
def test_no_compressor_beats_the_entropy(name):
    # The names and rules are worth something to a model that has learnt them, not to one document: so many of
    # them are packed at once, and still the packed size may not fall below the generator's bits.
    documents = list(world.documents(name, limit=4000))
    bits = sum(document.truth["bits"] for document in documents)
    packed = len(lzma.compress("\n".join(one.text for one in documents).encode(), preset=9)) * 8
    assert bits < packed < 6 * bits
    assert world.entropy(name, sample=4000)["bits_per_document"] == pytest.approx(bits / 4000)


def test_the_same_text_always_costs_the_same_bits():
    costs = {}
    for document in world.documents("prose", limit=30000):
        costs.setdefault(document.text, set()).add(round(document.truth["bits"], 9))
    assert len(costs) < 30000, "the sample holds no text twice: it tests nothing"
    assert all(len(found) == 1 for found in costs.values())


def test_prose_agrees_with_its_hero():
    for document in world.documents("prose", limit=500):
        if document.text.startswith(("Once", "Long ago")):
            hero = document.truth["pairs"][0][0]
            assert (" her " in document.text or " She " in document.text) <= hero.endswith("a")


def test_no_two_splits_tell_of_a_hero_with_the_same_thing():
    pairs = {
        split: {
            tuple(pair)
            for one in world.documents("prose", split=split, limit=3000)
            for pair in one.truth["pairs"]
        }
        for split in ("train", "validation", "test")
    }
    assert len(pairs["train"]) > 500
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["validation"]
    assert not pairs["validation"] & pairs["test"]


def test_no_document_speaks_twice_of_the_same_one():
    for document in world.documents("facts", limit=2000, zipf=1.2):
        named = [fact["entity"] for fact in document.truth["facts"]]
        assert len(named) == len(set(named))


def test_facts_are_what_the_country_says_and_stated_in_no_two_splits_alike():
    land = {entity.name: entity for entity in (*country_of(0, 240).people, *country_of(0, 240).towns)}
    sentences = {}
    for split in ("train", "validation", "test"):
        documents = list(world.documents("facts", split=split, limit=4000))
        for document in documents:
            for fact in document.truth["facts"]:
                assert land[fact["entity"]].values[fact["attribute"]] == fact["value"]
                assert fact["entity"] in document.text
        parts = {part for one in documents for part in one.text.replace("? ", "?").split(". ")}
        sentences[split] = {part.rstrip(".") for part in parts}
    for one, two in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not {part.rstrip(".") for part in sentences[one]} & {
            part.rstrip(".") for part in sentences[two]
        }


def test_the_frequent_are_spoken_of_more():
    def share(zipf):
        told = [
            fact["rank"]
            for one in world.documents("facts", limit=2000, zipf=zipf)
            for fact in one.truth["facts"]
        ]
        return sum(rank < 20 for rank in told) / len(told)

    assert share(0.0) < share(0.7) < share(1.5)


def test_fact_questions_hold_out_people_of_every_frequency():
    train = list(world.questions("facts", "train"))
    test = list(world.questions("facts", "test"))
    assert not {one.truth["entity"] for one in train} & {one.truth["entity"] for one in test}
    assert min(one.truth["rank"] for one in test) < 5
    for item in test:
        assert item.answer in item.choices
        assert len(set(item.choices)) == 4
    told = " ".join(one.text for one in world.documents("facts", limit=20000))
    for item in test[:100]:
        assert f"{item.prompt} {item.answer}" not in told, "the prompt's phrasing is kept for the test"
        assert item.question not in told


def test_every_step_of_every_sum_is_right():
    for split in ("train", "test"):
        for document in world.documents("sums", split=split, limit=2000, steps_high=6, largest=90):
            body = document.text.split("Answer: ")[1].splitlines()
            assert body[-1] == f"#### {document.truth['answer']}"
            assert len(body) - 1 == len(document.truth["steps"])
            for line in body[:-1]:
                left, right = line.split(" = ")
                assert eval(left) == int(right)
            assert int(body[-2].split(" = ")[1]) == document.truth["answer"]


def test_every_second_number_that_stays_in_range_is_asked_in_one_split_or_in_all():
    """From 2 to 20 in a sum that stays between 1 and the largest; two long numbers belong to one split."""
    splits = ("train", "validation", "test")
    for largest in (10, 57, 99):
        for total in range(2, largest + 1):
            for sign, result in (("+", total.__add__), ("-", total.__sub__), ("*", total.__mul__)):
                found = [_operands(total, sign, largest, split) for split in splits]
                most = 3 if sign == "*" else 20
                wanted = [other for other in range(2, most + 1) if 1 <= result(other) <= largest]
                assert sorted({other for one in found for other in one}) == wanted
                for other in wanted:
                    times = sum(other in one for one in found)
                    assert times == (1 if min(total, other) > 9 and sign != "*" else len(splits))


def test_no_number_sequence_and_no_pair_of_long_numbers_crosses_the_splits():
    def numbers(split):
        return [tuple(one.truth["steps"]) for one in world.documents("sums", split=split, limit=8000)]

    train, test = numbers("train"), numbers("test")
    assert not set(train) & set(test)
    pairs = [
        {
            tuple(sorted(s.split(" = ")[0].split()))
            for steps in side
            for s in steps
            if min(map(int, s.split()[::2][:2])) > 9
        }
        for side in (train, test)
    ]
    assert len(pairs[1]) > 5
    assert not pairs[0] & pairs[1]


def test_the_unseen_family_is_never_trained_on():
    assert all(one.truth["family"] != "lake" for one in world.documents("sums", limit=500))
    families = {one.truth["family"] for one in world.documents("sums", split="test", limit=500)}
    assert "lake" in families
    assert len(families) == 7
    with pytest.raises(TriviumError, match="kept for the test"):
        next(world.documents("sums", family="unseen"))


def test_sums_come_as_chats_and_as_prompts():
    chat = next(world.documents("sums", form="chat", ending="The answer is"))
    assert chat.fields["messages"][1]["content"].endswith(f"The answer is {chat.truth['answer']}.")
    prompt = next(world.documents("sums", form="prompt"))
    assert prompt.fields["answer"] == str(prompt.truth["answer"])
    assert prompt.fields["prompt"][-1]["role"] == "user"


def test_sums_come_step_by_step_with_labels_that_a_checker_gives_as_well():
    options = {"form": "steps", "steps_low": 4, "steps_high": 6, "largest": 10}
    found = list(world.documents("sums", limit=400, **options))
    for one in found:
        claimed = labels_of_steps(one.fields["completions"], one.truth["steps"])
        assert one.fields["labels"] == [label == 1 for label in claimed]
    wrong = sum(not all(one.fields["labels"]) for one in found)
    assert 120 < wrong < 240
    first = {one.fields["labels"].index(False) for one in found if not all(one.fields["labels"])}
    assert {0, 1, 2, 3, 4, 5} <= first
    right = world.documents("sums", limit=50, wrong=0, **options)
    assert all(all(one.fields["labels"]) for one in right)
    wrong = world.documents("sums", limit=50, wrong=1, ending="The answer is", **options)
    assert all(one.fields["completions"][-1].startswith("The answer is ") for one in wrong)
    spoiled = world.documents("sums", limit=1000, wrong=1, form="steps")
    assert not any(all(one.fields["labels"]) for one in spoiled)


def test_dials_are_checked_by_name_and_read_from_text():
    assert next(world.documents("facts", people="100")) == next(world.documents("facts", people=100))
    with pytest.raises(TriviumError, match="did you mean 'people'"):
        world.documents("facts", peeple=3)
    with pytest.raises(TriviumError, match="did you mean 'facts'"):
        world.documents("fact")
    with pytest.raises(TriviumError, match="takes a value like"):
        world.documents("facts", people="many")
    with pytest.raises(TriviumError, match="asks no questions"):
        world.questions("prose", "test")
    with pytest.raises(TriviumError, match="no split"):
        world.documents("facts", split="dev")


def test_shots_come_from_train():
    item = next(world.questions("facts", "test", shots=3))
    assert item.prompt.count("Question:") == 4
    assert item.prompt.endswith(f"Question: {item.question}\nAnswer:")


def test_products_are_nouns_and_no_names() -> None:
    products = workshop(country=0, products=40).products
    assert all(one.name.islower() for one in products)
