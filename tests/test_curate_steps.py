"""Each step of curation by itself, against plain Python, brute force or arithmetic."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from curating import batch_of, curated, reasons, write_lines

from trivium.curate.characters import Characters
from trivium.curate.engines import Workers
from trivium.curate.minhash import band_keys, find_clusters, probability, signatures
from trivium.curate.repetition import repeated_grams, top_gram
from trivium.curate.step import parse_steps
from trivium.curate.steps.decontaminate import Index
from trivium.kit.errors import TriviumError

WORDS = [f"word{number}" for number in range(40)]
PROSE = (
    "The old house stood at the end of the road, and nobody had lived in it for years. People of the village "
    "said that they have seen lights there. It was to be sold with the garden that surrounds it! Would you "
    "buy such a house? I asked my friends, and most of them laughed. In the end the house went to a young "
    "couple."
)
ODD = ["", " ", "Don't stop — naïve café", "中文字 and 12.5", "a\n\nb", "…", "''quoted''", "é́", "x" * 3000]


def test_words_are_those_of_a_plain_expression() -> None:
    texts = [PROSE, *ODD, "snake_case __init__ (a+b)*c == d; e"]
    found = Characters(texts).words
    pattern = re.compile(r"[\u2e80-\u30ff\u3400-\u9fff]|(?:(?:(?![\u2e80-\u9fff])[^\W_])|\u0301)+"
                         r"(?:['’](?:[^\W_])+)*|(?:[^\w\s]|_)+")  # fmt: skip
    joined = "".join(texts)
    words = [joined[start:end] for start, end in zip(found.starts, found.ends)]
    assert words == [word for text in texts for word in pattern.findall(text)]
    assert len(set(found.hashes.tolist())) == len(set(words))


def test_folded_words_are_alike_where_people_read_the_same() -> None:
    texts = ("Café, CRÈME brûlée: 12!", "cafe creme  brulee 12", "cafe creme brulee 13")
    one, other, third = (Characters([text]).folded_words(False).hashes.tolist() for text in texts)
    assert one == other != third
    assert (
        Characters(["in 2024"]).folded_words(True).hashes.tolist()
        == Characters(["In 1999"]).folded_words(True).hashes.tolist()
    )


@pytest.mark.parametrize("size", [2, 3, 5])
def test_repetition_is_that_of_counters(size: int) -> None:
    chance = random.Random(size)
    texts = [" ".join(chance.choices(WORDS[:count], k=120)) for count in (2, 4, 10, 40)] + ["a b", ""]
    words = Characters(texts).words
    top, again = top_gram(words, size), repeated_grams(words, [2, size])[size]
    for text, found, repeated in zip(texts, top, again):
        split = text.split()
        grams = [" ".join(split[place : place + size]) for place in range(len(split) - size + 1)]
        common = Counter(grams).most_common(1)
        assert found == (len(common[0][0]) * common[0][1] if common else 0)
        seen, place, total = set(), 0, 0
        while place < len(grams):
            if grams[place] in seen:
                total += len(grams[place].replace(" ", ""))
                place += size
            else:
                seen.add(grams[place])
                place += 1
        assert repeated == total


GOPHER = {
    "few words": "Only a few words, and that is that.",
    "long words": " ".join(["incomprehensibilities"] * 60 + ["the of and"] * 10),
    "short words": "a b c d e f g h i j " * 8,
    "hash signs": PROSE + " #" * 30,
    "ellipses": PROSE + " wait ..." * 12,
    "bullet lines": "\n".join("- " + part for part in PROSE.split(", ") * 3),
    "ellipsis lines": "\n".join(
        f"{part} and so it goes on and on without an end …" for part in PROSE.split(". ")
    ),
    "symbols": PROSE + " 1234 5678" * 30,
    "stop words": " ".join(f"{one}{number}x" for number, one in enumerate(["tree", "house", "river"] * 30)),
    "repeated lines": "\n".join(PROSE.split(", ") * 2 + PROSE.split(", ")),
    "repeated paragraphs": "\n\n".join([PROSE, PROSE]),
    "top 2-gram": PROSE + " wonderful opportunity" * 9,
    "repeated 10-grams": PROSE + " " + " ".join(PROSE.split()[:22]),
}


@pytest.mark.parametrize("rule", GOPHER)
def test_gopher_names_the_rule(rule: str) -> None:
    assert reasons({"filters": "gopher"}, [GOPHER[rule], PROSE]) == [
        {"repeated 10-grams": "repeated 5-grams"}.get(rule, rule), None,
    ]  # fmt: skip
    known = {"few words": "words", "short words": "word_length", "long words": "word_length",
             "hash signs": "hashes", "symbols": "alphabetic_words", "top 2-gram": "top_grams",
             "repeated 10-grams": "repeated_grams"}  # fmt: skip
    off = {known.get(rule, rule.replace(" ", "_")): None}
    if rule not in ("repeated lines", "repeated paragraphs"):
        assert reasons({"filters": {"preset": "gopher", "rules": off}}, [GOPHER[rule]])[0] != rule


GERMAN = (
    "Die alte Mühle steht am Fluss, und jeden Morgen dreht der Müller das große Rad mit den Händen weiter. "
    "Bauern bringen ihm Korn aus den Dörfern, die hinter dem Hügel liegen, und warten im Schatten der Bäume. "
    "Abends sitzt er vor seinem Haus, erzählt den Kindern lange Geschichten und schaut auf das stille Wasser."
)
JAPANESE = (
    "古い水車は川のそばにあり、毎朝、粉屋は大きな輪を回します。農家の人々は丘の向こうの村から穀物を運び、"
    "木の陰で待っています。夕方になると、彼は家の前に座り、子供たちに長い話を聞かせ、静かな水を眺めます。"
)


def test_gopher_measures_other_languages_than_english_by_what_holds_for_them(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GERMAN, JAPANESE, PROSE])
    known = [{"language": {"keep": ["de", "ja", "en"]}}]
    kept, _ = curated(tmp_path / "by", [path], [*known, {"filters": "gopher"}])
    assert [row["text"] for row in kept] == [GERMAN, JAPANESE, PROSE]
    of_all = {"filters": {"preset": "gopher", "rules": {"by_language": False}}}
    for number, steps in enumerate(([{"filters": "gopher"}], [*known, of_all])):
        kept, dropped = curated(tmp_path / str(number), [path], steps)
        assert [row["text"] for row in kept] == [PROSE]
        assert [row["reason"].partition(":")[0] for row in dropped] == ["stop words", "short words"]


MANUAL = (
    "インストールを始める前に、インストールの手引きを読んでください。インストールにはおよそ一時間かかります。"
    "インストールの途中で電源を切らないでください。インストールが終わると、機械は自動的に再起動します。"
    "もう一度インストールを行うときは、古いインストールを消してから、インストールの画面に戻ります。"
)


def test_runs_and_lines_of_signs_are_no_runs_and_lines_of_words(tmp_path: Path) -> None:
    lines = "\n".join(one + "。" for one in MANUAL.split("。") if one)
    path = write_lines(tmp_path / "a.jsonl", [MANUAL, lines, PROSE])
    gopher, fineweb = {"word_length": None, "stop_words": None}, {"short_line": 60}
    for preset, rule, rules in (("gopher", "top 3-gram", gopher), ("fineweb", "short lines", fineweb)):
        both = [{"language": ["ja", "en"]}, {"filters": {"preset": preset, "rules": rules}}]
        assert len(curated(tmp_path / preset, [path], both)[0]) == 3
        both[1] = {"filters": {"preset": preset, "rules": {**rules, "by_language": False}}}
        _, dropped = curated(tmp_path / f"{preset}-all", [path], both)
        assert rule in {row["reason"].partition(":")[0] for row in dropped}


def test_written_chinese_is_wanted_by_its_common_name(tmp_path: Path, monkeypatch) -> None:
    from trivium.curate.steps import language

    monkeypatch.setattr(language, "_identifier", lambda model: lambda text: ("yue", 0.87))
    path = write_lines(tmp_path / "a.jsonl", ["書寫中文。"])
    assert curated(tmp_path / "zh", [path], [{"language": ["zh"]}])[0][0]["language"] == "zh"
    assert curated(tmp_path / "both", [path], [{"language": ["zh", "yue"]}])[0][0]["language"] == "yue"
    with pytest.raises(TriviumError, match="language yue"):
        curated(tmp_path / "en", [path], [{"language": ["en"]}])


def test_c4_keeps_good_lines_and_says_what_ends_a_page(tmp_path: Path) -> None:
    good = [
        "This is a sentence of words.",
        "Is this one, too? It is.",
        "And here are more words!",
        "The last one ends.",
    ]
    page = [
        "Home | About",
        *good,
        "we use cookies on this page.",
        "Enable Javascript to see it.",
        "Two words.",
        "x" * 1200 + ".",
    ]
    path = write_lines(
        tmp_path / "a.jsonl",
        ["\n".join(page), "\n".join(good) + " {", "Lorem ipsum dolor sit amet.", good[0]],
    )
    kept, dropped = curated(tmp_path / "out", [path], [{"filters": "c4"}])
    assert [row["text"] for row in kept] == ["\n".join(good)]
    assert [row["reason"].partition(":")[0] for row in dropped] == [
        "few sentences",
        "lorem ipsum",
        "few sentences",
    ]
    braces = "\n".join([*good, "an open { brace in words."])
    assert reasons({"filters": "c4"}, [braces]) == ["braces"]


def test_fineweb_and_code_name_the_rule() -> None:
    lists = "\n".join(f"item number {number}" for number in range(30))
    shorts = "\n".join(f"item {number}." for number in range(30))
    twice = "This long line of the page stands here twice, as in a menu."
    again = "\n".join([PROSE, twice, PROSE[:90], "x y z " * 9 + ".", twice])
    assert reasons({"filters": "fineweb"}, [PROSE, lists, shorts, again]) == [
        None, "line endings", "short lines", "repeated characters",
    ]  # fmt: skip
    # Newlines are no characters of lines: 3 of 9, and not of 11.
    others_off = dict.fromkeys(("ending_lines", "short_lines", "newlines"))
    rule = {"filters": {"preset": "fineweb", "rules": {**others_off, "repeated_characters": 0.3}}}
    assert reasons(rule, ["ab.\nab.\ncd."]) == ["repeated characters"]
    code = "def add(one, other):\n    return one + other\n\n\nclass Sum:\n    def __init__(self):\n"
    code += "        self.total = 0\n"
    assert reasons(
        {"filters": "code"},
        [code, "# automatically generated\n" + code, code + "x" * 2000, "1,2,3;" * 40, "a = 1",
         code + 'key = "' + "QUJD" * 80 + '"\n'],
    ) == [None, "generated", "long lines", "long lines", "short file", "encoded data"]  # fmt: skip


@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (20, 5)])
def test_planted_pairs_are_found_as_often_as_theory_says(bands: int, rows: int) -> None:
    chance = np.random.default_rng(bands)
    pairs = 300
    for similarity in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        texts = []
        for number in range(pairs):
            # Shingles of one word: sets of 200 words that share just so many.
            shared = round(200 * similarity)
            own = (200 - shared) // 2
            words = [f"w{number}x{one}" for one in range(shared + 2 * own)]
            chance.shuffle(words)
            texts += [" ".join(words[: shared + own]), " ".join(words[:shared] + words[shared + own :])]
        signature, _ = signatures(Characters(texts).folded_words(False), 1, bands * rows)
        keys = band_keys(signature, bands, rows)
        found = (keys[:, 0::2] == keys[:, 1::2]).any(axis=0).mean()
        expected = probability(similarity, bands, rows)
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 0.01
        estimate = (signature[0::2] == signature[1::2]).mean()
        assert abs(estimate - similarity) < 0.012


def test_clusters_are_those_of_brute_force(tmp_path: Path) -> None:
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=60)) for _ in range(60)]
    for number in range(60):
        words = texts[number].split()
        for place in chance.sample(range(60), chance.choice((0, 1, 2, 8, 20))):
            words[place] = f"new{place}"
        texts.append(" ".join(words))
    order = list(range(120))
    chance.shuffle(order)
    path = write_lines(tmp_path / "a.jsonl", [texts[place] for place in order])
    step = {
        "method": "minhash",
        "threshold": 0.6,
        "bands": 100,
        "rows": 4,
        "shingle": 2,
        "digits": "as written",
    }
    kept, dropped = curated(tmp_path / "out", [path], [{"deduplicate": step}])

    def shingles(text: str) -> set[tuple[str, str]]:
        words = text.split()
        return set(pairwise(words))

    sets = [shingles(texts[place]) for place in order]
    values = {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a in range(120) for b in range(a)}
    gone = {int(row["id"].partition(":")[2]) - 1 for row in dropped}
    of = {int(row["id"].partition(":")[2]) - 1: int(row["reason"].rpartition(":")[2]) - 1 for row in dropped}
    # The estimate of 400 values is within 0.07 of the truth: pairs that near the threshold may go either way.
    for (one, other), value in values.items():
        if value > 0.67:
            assert one in gone or other in gone
    # A copy and what is kept in its place may be joined by others between them.
    alike = {one: {other for other in range(120) if values.get((max(one, other), min(one, other)), 0) > 0.53}
             for one in range(120)}  # fmt: skip
    for one, kept_one in of.items():
        reached, waiting = {one}, [one]
        while waiting:
            waiting += (new := alike[waiting.pop()] - reached)
            reached |= new
        assert kept_one in reached
    assert len(kept) == 120 - len(gone)


def test_a_stranger_between_two_copies_does_not_hide_them(tmp_path: Path) -> None:
    # All agree in the first of four bands and in no other; the first and the last are alike as a whole.
    signature = np.zeros((3, 8), dtype=np.uint32)
    signature[1, 2:], signature[2, 3::2] = 5, 9
    shard = tmp_path / "00000"
    shard.mkdir()
    arrays = {"signature": signature, "bands": band_keys(signature, 4, 2).T, "has_words": np.ones(3, bool)}
    for name, values in arrays.items():
        np.save(shard / f"{name}.npy", values)
    clusters, candidates = find_clusters([shard], 4, 0.6, Workers("local", 1))
    assert [one.tolist() for one in clusters.members()] == [[0, 2], [0, 0]]
    assert candidates == 3


def test_the_best_copy_is_kept_with_the_size_of_its_cluster(tmp_path: Path) -> None:
    long = " ".join(WORDS)
    rows = [{"text": long, "rating": 1}, {"text": f"{long} end", "rating": 3}, {"text": long, "rating": 2},
            {"text": "quite another text", "rating": 0}]  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", rows)
    near = {"method": "minhash", "threshold": 0.7}
    kept, _ = curated(tmp_path / "longest", [path], [{"deduplicate": near}])
    assert [row["id"][-1] for row in kept] == ["2", "4"]
    kept, _ = curated(
        tmp_path / "exact", [path], [{"deduplicate": {"method": "exact", "best": "rating", "weight": "log"}}]
    )
    assert [(row["id"][-1], row["copies"], row["weight"]) for row in kept] == [
        ("2", 1, 1),
        ("3", 2, 2),
        ("4", 1, 1),
    ]
    kept, _ = curated(
        tmp_path / "both",
        [path],
        [{"deduplicate": "exact"}, {"deduplicate": {**near, "best": "rating", "weight": "count"}}],
    )
    assert [(row["id"][-1], row["copies"], row["weight"]) for row in kept] == [("2", 3, 3), ("4", 1, 1)]


def test_copies_in_another_source_may_stay(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", ["the same text", "the same text"]) for name in "ab"]
    for method in ("exact", "minhash"):
        for within, left in (("all", 1), ("source", 2)):
            kept, _ = curated(
                tmp_path / method / within, paths, [{"deduplicate": {"method": method, "within": within}}]
            )
            assert len(kept) == left


def test_lines_and_passages_that_repeat_are_cut_once(tmp_path: Path) -> None:
    menu, passage = "Home | About us | Contact | Log in", " ".join(WORDS[:12])
    texts = [f"{menu}\nThis is text number {number} of them, all different." for number in range(6)]
    path = write_lines(tmp_path / "a.jsonl", [*texts, menu])
    kept, dropped = curated(tmp_path / "lines", [path], [{"deduplicate": {"method": "lines", "most": 3}}])
    assert [menu in row["text"] for row in kept] == [True] + [False] * 5
    assert [row["text"] for row in dropped] == [menu]
    texts = [f"first{number} some words here {passage} last{number} some other words" for number in range(3)]
    path = write_lines(tmp_path / "b.jsonl", texts)
    kept, _ = curated(tmp_path / "runs", [path], [{"deduplicate": {"method": "substrings", "words": 10}}])
    assert [passage in row["text"] for row in kept] == [True, False, False]
    assert [row["text"].split()[0] + row["text"].split()[-4] for row in kept] == [
        f"first{number}last{number}" for number in range(3)
    ]


EXAM = [
    {"question": "In which year was the bridge of Tarwick finished by its builders?", "answer": "1744"},
    {"question": "Who built it?", "answer": "Rono"},
    {"question": "What is the name of the river near Salgate?", "answer": "the long Kabon"},
    {"question": "What is the name of the river near Pulgate?", "answer": "Hokuk"},
    {"text": " ".join(f"validation{number}" for number in range(150))},
]
LEAKS = {
    "In which year was the bridge of Tarwick finished by its builders? 1744": True,
    "IN WHICH YEAR was the Bridge of Tarwick -- finished by its builders?! Answer: 1744.": True,
    f"In which year was the bridge of Tarwick finished by its builders? {PROSE} It was in 1744.": True,
    "In which year was the bridge of Tarwick finished by its builders? It is not known.": False,
    "Q: What is the name of the river near Salgate? A: It is the long Kabon, I think.": True,
    "Q: What is the name of the river near Pulgate? A: I do not know.": False,
    "Q: What is the name of the river near Holdale? A: Hokuk": False,
    "Who built it? Rono": False,
    PROSE + " " + " ".join(f"validation{number}" for number in range(48, 96)) + " " + PROSE: True,
    " ".join(f"validation{number}" for number in range(0, 150, 2)): False,
    PROSE: False,
}  # fmt: skip


def test_leaks_are_found_by_question_and_answer(tmp_path: Path) -> None:
    exam = write_lines(tmp_path / "exam.jsonl", EXAM)
    path = write_lines(tmp_path / "a.jsonl", list(LEAKS))
    kept, dropped = curated(tmp_path / "out", [path], [{"decontaminate": exam}])
    assert [row["text"] for row in dropped] == [text for text, leaks in LEAKS.items() if leaks]
    first = dropped[0]["reason"]
    assert "100 % of exam.jsonl:1 with its answer" in first
    assert "in which year was the bridge" in first.lower()
    near = [{"decontaminate": {"against": exam, "answer": "near"}}]
    kept, _ = curated(tmp_path / "near", [path], near)
    assert [PROSE in row["text"] and "1744" in row["text"] for row in kept].count(True) == 1
    kept, _ = curated(
        tmp_path / "ignored", [path], [{"decontaminate": {"against": exam, "answer": "ignored"}}]
    )
    assert not any("Tarwick" in row["text"] for row in kept)


def test_what_identifies_is_masked_and_what_does_not_stays() -> None:
    (step,) = parse_steps(["mask"])
    text = (
        "Write to jane.doe+x@mail.example.org or +49 (30) 1234-5678, host 8.8.8.8 (not 10.0.0.1, "
        "v1.2.3.4.5), key AKIAABCDEFGHIJKLMNOP and 2001:4860:4860::8888; "
        "at 10:30 on 2024-05-06 it cost 3.50, see a@b."
    )
    outcome = step.run(batch_of([text]))
    assert outcome.texts == [
        "Write to <email> or <phone>, host <ip> (not 10.0.0.1, v1.2.3.4.5), key <secret> and <ip>; "
        "at 10:30 on 2024-05-06 it cost 3.50, see a@b."
    ]
    assert outcome.notes == {"email": 1, "phone": 1, "ip": 2, "secret": 1}


def test_wrong_decoding_is_repaired() -> None:
    (step,) = parse_steps(["repair"])
    texts = ["cafÃ© dâ€™Italie", "e\u0301\r\n\r\n\r\n\r\nz\x00 \x07", "plain", "\u200b\ufeff "]
    outcome = step.run(batch_of(texts))
    assert outcome.texts is not None
    assert list(outcome.texts[:3]) == ["café d’Italie", "é\n\nz", "plain"]


def test_samples_are_shares_caps_and_equal_parts(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {number}", "rating": number % 10, "topic": "abb"[number % 3],
         "url": f"https://{'big' if number % 4 else 'small'}.example/{number}"}
        for number in range(60)
    ]  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", rows)

    def kept(**settings: object) -> list[int]:
        found, _ = curated(tmp_path / str(len(list(tmp_path.iterdir()))), [path], [{"sample": settings}])
        return [int(row["text"].split()[1]) for row in found]

    assert len(kept(share=0.25)) == 15
    assert kept(share=0.25) == kept(share=0.25) != kept(share=0.25, seed=1)
    assert all(number % 10 >= 8 for number in kept(documents=12, by="rating"))
    assert Counter(number % 4 > 0 for number in kept(domain_cap=9)) == {True: 9, False: 9}
    assert Counter("abb"[number % 3] for number in kept(documents=20, strata="topic")) == {"a": 10, "b": 10}


def test_a_gram_weighs_more_the_fewer_items_have_it() -> None:
    """log(1 + N / n), as shares of all grams of an item."""
    items = [[name, f"what makes {name}", ""] for name in ("rain", "snow", "wind")]
    index = Index(items, gram=2, least=2)
    for item in index.items:
        assert sorted(item.weights) == pytest.approx([math.log(2) / math.log(8), math.log(4) / math.log(8)])
