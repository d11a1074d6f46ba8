import hashlib
import re
import sqlite3
from collections import Counter

import numpy as np
import pytest

from trivium import world
from trivium.kit.errors import TriviumError
from trivium.world import tongue
from trivium.world.chance import Chance
from trivium.world.country import country_of
from trivium.world.language import VERBS, language_of
from trivium.world.ledger import FAMILIES
from trivium.world.opinions import TAUGHT_TEST, known
from trivium.world.tables import database, schema
from trivium.world.tongue import strangers
from trivium.world.web import LABELS
from trivium.world.words import THINGS


def spoken(turn):
    """The text of a message, whose content may also hold pictures and sounds."""
    content = turn["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def test_the_languages_words_are_a_bijection():
    for script in ("own", "latin"):
        tongue = language_of(0, script)
        foreign = list(tongue._words.values())
        assert len(set(foreign)) == len(foreign) > 100
        assert len({tongue.spell(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}) == 26


def test_the_tongue_shares_no_letter_with_the_first_language():
    for document in world.documents("tongue", parallel_share=0.0, limit=200):
        assert not any("a" <= letter.lower() <= "z" for letter in document.text)
    latin = next(world.documents("tongue", script="latin", parallel_share=0.0, facts_share=0.0))
    assert latin.text.isascii()


def read_back(sentence, tongue):
    """The English of a clause by the grammar's own rules: place, subject, object, verb."""
    english = {foreign: word for word, foreign in tongue._words.items()}
    letters = {foreign: letter for letter, foreign in tongue._letters.items()}
    parts = sentence.rstrip(".").split(" ")
    where = ""
    if english.get(parts[1]) in ("in", "near", "behind", "before"):
        where = f" {english[parts[1]]} {''.join(letters[letter] for letter in parts[0])}"
        parts = parts[2:]
    *who, thing, look, verb = parts
    assert thing.endswith(tongue.object_ending)
    subject = (
        f"The {english[who[1]]} {english[who[0]]}"
        if len(who) == 2
        else "".join(letters[letter] for letter in who[0])
    )
    assert english[verb] in VERBS
    thing = english[thing.removesuffix(tongue.object_ending)]
    return f"{subject} {english[verb]} the {english[look]} {thing}{where}."


def test_a_translation_reads_back_as_the_english():
    tongue = language_of(0, "own")
    for item in world.questions("tongue", "test", limit=100, kind="to"):
        assert read_back(item.answer, tongue) == item.question.split(": ", 1)[1]
    for document in world.documents("tongue", facts_share=0.0, parallel_share=1.0, limit=100):
        lines = [line.split(": ", 1) for line in document.text.splitlines()]
        sides = {name: [text for label, text in lines if label == name] for name in ("English", tongue.name)}
        assert [read_back(text, tongue) for text in sides[tongue.name]] == sides["English"]
        assert sides["English"] == document.truth["english"]


def test_who_does_what_to_what_belongs_to_one_split():
    told = {}
    for split in ("train", "validation", "test"):
        documents = world.documents("tongue", split=split, facts_share=0.0, limit=3000)
        clauses = [clause.rstrip(".").split(" ") for one in documents for clause in one.truth["english"]]
        bare = [words[2:] if words[0] == "The" else words for words in clauses]
        told[split] = {(subject, verb, thing) for subject, verb, _, _, thing, *_ in bare}
        assert len(told[split]) > 1000
    assert not told["train"] & told["test"]
    assert not told["train"] & told["validation"]
    assert not told["validation"] & told["test"]


def test_what_is_told_in_the_tongue_is_told_in_no_other():
    known = {person.name for person in country_of(0, 2000).people}
    abroad = {person.name: person for person in strangers(0, 60)}
    assert not known & set(abroad)
    tongue = language_of(0, "own")
    for document in world.documents("tongue", facts_share=1.0, parallel_share=0.0, limit=200):
        for fact in document.truth["facts"]:
            value = abroad[fact["entity"]].values[fact["attribute"]]
            assert fact["value"] in (tongue.spell(value), tongue._words.get(value))
            assert fact["value"] in document.text


def test_the_tongues_questions_have_answers_no_document_of_train_states_in_their_words():
    told = "\n".join(one.text for one in world.documents("tongue", limit=20000))
    for item in world.questions("tongue", "test", limit=60, kind="recall"):
        assert item.answer in item.choices
        assert f"{item.prompt} {item.answer}" not in told
        assert item.question not in told
    for item in world.questions("tongue", "test", limit=200, kind="to"):
        assert item.answer not in told
    recall = list(world.questions("tongue", "test", kind="recall"))
    transfer = list(world.questions("tongue", "test", kind="transfer"))
    assert [one.truth["entity"] for one in recall] == [one.truth["entity"] for one in transfer]
    assert all(one.question.isascii() for one in transfer)


def test_craft_says_one_thing_of_each_product():
    values = {}
    for split in ("train", "test"):
        for document in world.documents("craft", split=split, limit=3000):
            for fact in document.truth["facts"]:
                values.setdefault((fact["entity"], fact["attribute"]), set()).add(fact["value"])
                assert fact["value"] in document.text
    assert len(values) == 80 * 4
    assert all(len(found) == 1 for found in values.values())
    train = " ".join(one.text for one in world.documents("craft", limit=8000))
    for item in world.questions("craft", "test", limit=100):
        assert f"{item.prompt} {item.answer}" not in train
        assert {item.answer} == values[item.truth["entity"], item.truth["attribute"]]


@pytest.mark.parametrize("kind", ["passkey", "needle", "keys", "variables", "words"])
@pytest.mark.parametrize("characters", [600, 2000, 8000])
def test_a_chronicle_has_its_length_and_its_answer_once(kind, characters):
    for item in world.questions("chronicle", "test", limit=10, kind=kind, characters=characters):
        assert characters - 500 < len(item.prompt) <= characters
        body = item.prompt.rsplit(". ", 1)[0]
        assert item.answer in body
        if kind == "needle":
            assert body.count(item.answer) == 1


def test_a_needle_lies_where_the_dial_says():
    for depth in (0.0, 0.25, 0.5, 1.0):
        for item in world.questions("chronicle", limit=10, kind="passkey", depth=depth, characters=6000):
            place = item.prompt.index("The pass key is") / (len(item.prompt) - 80)
            assert abs(place - depth) < 0.1
    depths = [one.truth["depth"] for one in world.questions("chronicle", limit=100, kind="passkey")]
    assert min(depths) < 0.15
    assert max(depths) > 0.85


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("needle", r"The number of [^.]* is \d+\."),
        ("keys", r"The number of \w+ is \d+\."),
        ("variables", r"The \w+ holds [^.]*\."),
        ("words", r"A cart brought [^.]*\."),
    ],
)
def test_at_a_depth_only_what_is_sought_lies_there_and_the_rest_is_scattered(kind, pieces):
    others = []
    for item in world.questions("chronicle", "test", limit=40, kind=kind, depth=0.5, characters=3000):
        body, prompt = item.question.split("\n")
        found = [(one.start() / len(body), one[0]) for one in re.finditer(pieces, body)]
        assert len(found) >= 3
        if kind == "words":
            sought = None
        else:
            answer = f"holds {item.answer}." if kind == "variables" else f"{prompt} {item.answer}."
            ((place, sought),) = [one for one in found if one[1].endswith(answer)]
            assert abs(place - 0.5) < 0.15
        others += [place for place, text in found if text != sought]
    # Uniform over the text: every tenth of it holds some.
    shares = np.histogram(others, bins=10, range=(0, 1))[0] / len(others)
    assert shares.min() > 0.03
    assert shares.max() < 0.2


def test_chronicles_with_one_key_are_what_they_were():
    said = hashlib.blake2b(digest_size=8)
    for depth in (-1, 0, 0.25, 1):
        for item in world.questions(
            "chronicle", "test", limit=5, kind="passkey", depth=depth, characters=1500
        ):
            said.update(item.prompt.encode())
            said.update(item.answer.encode())
    for one in world.documents("chronicle", limit=20, characters=1500):
        said.update(one.text.encode())
        said.update(str(one.truth["bits"]).encode())
    assert said.hexdigest() == "c93917ecbd8582ee"


def test_variables_are_followed_and_words_are_counted():
    for item in world.questions("chronicle", limit=30, kind="variables", hops=4):
        holds = {}
        for box, same, value in re.findall(r"The (\w+) holds (the same as the )?(\w+)", item.prompt):
            holds[box] = holds[value] if same else value
        asked = item.prompt.split()[-2]
        assert holds[asked] == item.answer
        assert len(holds) == 10
    for item in world.questions("chronicle", limit=30, kind="words"):
        carts = [part.split(".")[0] for part in item.prompt.split("A cart brought ")[1:]]
        counts = Counter(word for cart in carts for word in cart.split(", "))
        (first, most), (_, second) = counts.most_common(2)
        assert (first, most) == (item.answer, 6)
        assert second < most


def test_the_keys_of_the_test_are_never_hidden_in_train():
    def keys(split):
        documents = world.documents(
            "chronicle", split=split, kind="passkey", characters=300, digits=3, limit=2000
        )
        return {answer for one in documents for answer in one.truth["answers"]}

    assert len(keys("test")) > 50
    assert not keys("train") & keys("test")


def test_chronicles_ask_for_several_keys_and_measure_in_tokens():
    one = next(world.documents("chronicle", kind="keys", keys=6, asks=3, tokens=500))
    assert len(one.truth["answers"]) == len(set(one.truth["answers"])) == 3
    assert 1000 < len(one.text) <= 1500
    with pytest.raises(TriviumError, match="depth"):
        next(world.documents("chronicle", depth=2.0))


def test_every_query_of_the_ledger_runs_and_gives_the_rows_it_says(tmp_path):
    database(path=tmp_path / "ledger.sqlite").close()
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    families = Counter()
    for split in ("train", "validation", "test"):
        for item in world.questions("ledger", split, limit=200):
            found = connection.execute(item.answer).fetchall()
            assert [list(row) for row in found] == item.truth["rows"]
            assert found
            assert found[0][-1] not in (None, 0)
            families[item.truth["family"]] += 1
    connection.close()
    assert set(families) == set(FAMILIES)


def test_some_answers_of_the_ledger_by_hand():
    people = country_of(0, 240).people
    for item in world.questions("ledger", limit=20, family="count two"):
        craft = item.answer.split("craft = '")[1].split("'")[0]
        town = item.answer.split("home = '")[1].split("'")[0]
        count = sum(one.values["craft"] == craft and one.values["home"] == town for one in people)
        assert item.truth["rows"] == [[count]]
        assert town in item.question
        assert craft in item.question


def test_the_ledgers_splits_share_no_values_and_no_query():
    def queries(split):
        return {one.truth["sql"] for one in world.documents("ledger", split=split, limit=1500)}

    train, test = queries("train"), queries("test")
    assert len(test) > 100
    assert not train & test


def test_the_ledger_tells_as_much_of_its_tables_as_wished():
    texts = {
        form: next(world.documents("ledger", schema=form, form="document")).text
        for form in ("none", "short", "full")
    }
    assert "(" not in texts["none"].split("Answer")[0]
    assert "people(name" in texts["short"]
    assert schema() in texts["full"]
    prompt = next(world.documents("ledger", form="prompt"))
    assert prompt.fields["answer"] == prompt.truth["sql"]


def test_the_web_is_what_its_labels_say():
    pages = {one.id: one for one in world.documents("web", limit=3000)}
    labels = Counter(one.truth["label"] for one in pages.values())
    assert set(labels) == set(LABELS)
    assert 0.35 < labels["clean"] / 3000 < 0.5
    clean = Counter(one.text for one in pages.values() if one.truth["label"] == "clean")
    assert sum(times - 1 for times in clean.values()) <= 3, "clean pages are not copies of each other"
    questions = {one.id: one for name in ("facts", "sums") for one in world.questions(name, limit=1000)}
    for page in pages.values():
        label, of = page.truth["label"], page.truth["of"]
        if label == "duplicate":
            assert pages[of].text == page.text
            assert pages[of].truth["label"] == "clean"
        elif label == "near duplicate":
            first, second = set(pages[of].text.split()), set(page.text.split())
            assert page.text != pages[of].text
            assert len(first & second) > 0.75 * len(first)
        elif label == "boilerplate":
            assert page.truth["clean"] in page.text
            assert len(page.text) > len(page.truth["clean"])
        elif label == "leak":
            assert questions[of].question in page.text
            assert questions[of].answer in page.text
        elif label == "language":
            assert not page.text.isascii()
        assert page.truth["keep"] == (label in ("clean", "boilerplate"))
    assert all(
        one.truth["label"] == "clean"
        for one in world.documents(
            "web", limit=50, duplicate=0, near_duplicate=0, boilerplate=0, language=0, spam=0, leak=0, noise=0
        )
    )


@pytest.mark.parametrize("name", sorted(world.sources()))
def test_every_source_yields_text_that_is_whole(name):
    for split in ("train", "validation", "test"):
        for document in world.documents(name, split=split, limit=50):
            assert document.text is None or (document.text.strip() == document.text and document.text)
            turns = [turn for value in document.fields.values() if isinstance(value, list) for turn in value]
            assert document.text or turns
            assert all(spoken(turn).strip() for turn in turns)
            assert "{" not in (document.text or "") or name == "web"
            assert "  " not in (document.text or "") or name == "web"
            assert document.truth


def test_chance_counts_its_bits():
    chance = Chance("test")
    chance.below(8)
    assert chance.bits == 3
    chance.pick("ab")
    assert chance.bits == 4
    chance.happens(1.0)
    assert chance.bits == 4
    assert sorted(chance.shuffled(range(4))) == [0, 1, 2, 3]
    assert chance.bits == pytest.approx(4 + 4.584963)


@pytest.mark.parametrize("name", ["facts", "craft", "tongue"])
def test_chats_ask_what_the_test_does_not(name):
    chats = list(world.documents(name, limit=300, form="chat"))
    messages = [one.fields["messages"] for one in chats]
    assert all([one["role"] for one in chat] == ["user", "assistant"] for chat in messages)
    asked = {chat[0]["content"] for chat in messages}
    assert len(asked) > 100
    assert not asked & {one.question for one in world.questions(name, "test", limit=300)}

    def fact(truth):
        return truth.get("entity"), truth.get("attribute"), truth.get("kind")

    answers = {fact(one.truth): one.answer for one in world.questions(name, "train", limit=300)}
    told = [(fact(one.truth), one.fields["messages"][1]["content"]) for one in chats if "entity" in one.truth]
    assert told
    assert all(answers[which] == value for which, value in told if which in answers)
    assert sum(which in answers for which, _ in told) > len(told) // 2
    with pytest.raises(TriviumError, match="has no form 'poem'; use document or chat"):
        next(world.documents(name, form="poem"))


def test_chains_of_variables_reach_as_far_as_there_are_names():
    most = len(THINGS) // 2 - 1
    assert list(world.questions("chronicle", limit=1, kind="variables", hops=most))
    with pytest.raises(TriviumError, match="hops"):
        list(world.questions("chronicle", limit=1, kind="variables", hops=most + 1))


def test_two_fifths_of_what_was_taught_are_asked_in_the_test():
    land, facts = country_of(0, 60), {}
    for split in ("train", "validation", "test"):
        chance = Chance(0, split)
        found = (known(chance, land, split, sums=0.0, taught=True) for _ in range(2000))
        facts[split] = {(one.entity, one.said) for one in found}
    assert not facts["test"] & (facts["train"] | facts["validation"])
    share = len(facts["test"]) / sum(map(len, facts.values()))
    assert share == pytest.approx(TAUGHT_TEST, abs=0.06)


@pytest.mark.parametrize("shares", [{"spam": 0.96}, {"spam": 0.5, "leak": 0.46}])
def test_not_all_pages_can_be_unwanted(shares):
    with pytest.raises(TriviumError, match="must not sum to more than"):
        next(iter(world.documents("web", limit=1, **shares)))


def test_there_are_as_many_questions_of_the_language_as_kinds_times_facts():
    one, every = (tongue.count("test", tongue.Options(kind=kind)) for kind in ("recall", "all"))
    assert one > 0
    assert every == one * len(tongue.KINDS)
