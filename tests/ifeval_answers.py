"""Answers for IFEval's instructions, composed of what models write and close to what is asked."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

SENTENCES = [
    "The river runs past the old mill.",
    "It was built in 1843, and it still grinds flour.",
    "Nobody knows why!",
    "Have you seen the well-known bridge?",
    "She doesn't like the rain, but she walks anyway.",
    "The town is small.",
    "Bread costs 2.50 there, which is cheap.",
    "They're proud of NASA and the BBC.",
    "However, the road is long.",
    "My friend's garden has a pond.",
    "WE LOVE IT.",
    "Dr. Smith said so.",
    "the market opens at nine.",
]
OTHERS = {
    "de": "Der Fluss ist nicht tief, und die alte Mühle steht seit vielen Jahren an der Straße in die Stadt.",
    "fr": "La rivière n'est pas profonde et le vieux moulin est sur la route de la ville depuis des années.",
    "es": "El río no es profundo y el viejo molino está en el camino de la ciudad desde hace muchos años.",
    "it": "Il fiume non è profondo e il vecchio mulino si trova sulla strada della città da molti anni.",
    "ru": "Река неглубокая, и старая мельница стоит у дороги в город уже много лет.",
    "en": "The river is not deep and the old mill has stood on the road to the town for many years.",
}


ODDITIES = ["[]", "***so***", "*", "，", "<<a> b>>", "Well-known mills, rivers:"]


def prose(chance: random.Random, most: int = 8) -> str:
    return " ".join(chance.choice(SENTENCES) for _ in range(chance.randint(1, most)))


def mixed(chance: random.Random) -> str:
    """Prose with a few of the forms that instructions ask for."""
    parts = []
    for _ in range(chance.randint(1, 5)):
        kind = chance.randrange(9)
        if kind == 0:
            points = [f"{chance.choice('*-')} {prose(chance, 1)}" for _ in range(chance.randint(1, 4))]
            parts.append("\n".join(points))
        elif kind == 1:
            parts.append(f"Write to [{chance.choice(['name', 'address', 'date'])}] today.")
        elif kind == 2:
            parts.append(
                f"This is *{chance.choice(['new', 'very old'])}* and **{chance.choice(['big', 'bold'])}**."
            )
        elif kind == 3:
            parts.append(f"<<{chance.choice(['The Mill', 'poem of joy', ' '])}>>")
        elif kind == 4:
            parts.append(f"{chance.choice(['P.S.', 'P.P.S', 'P. S.'])} {prose(chance, 1)}")
        elif kind == 5:
            parts.append(
                f"{chance.choice(['Section', 'SECTION'])} {chance.randint(1, 9)}\n{prose(chance, 2)}"
            )
        elif kind == 6:
            parts.append(f"{chance.choice(ODDITIES)} {prose(chance, 1)}")
        else:
            parts.append(prose(chance))
    return chance.choice(["\n\n", "\n\n", "\n***\n", "\n*** ***\n"]).join(parts)


def _relation(chance: random.Random) -> str:
    return chance.choice(["at least", "less than"])


def _near(chance: random.Random, count: int) -> int:
    return max(1, count + chance.randint(-1, 1))


def _paragraphs(chance: random.Random) -> tuple[str, dict[str, Any]]:
    parts = [prose(chance, 2) for _ in range(chance.randint(1, 4))]
    text, place = chance.choice(["\n\n", "\n\n\n"]).join(parts), chance.randint(1, len(parts))
    word = chance.choice([parts[place - 1].split()[0].strip(".,!?").lower(), "river"])
    return text, {"num_paragraphs": _near(chance, len(parts)), "nth_paragraph": place, "first_word": word}


def _words(chance: random.Random) -> tuple[str, dict[str, Any]]:
    text = prose(chance, 5)
    return text, {"num_words": _near(chance, len(text.split())), "relation": _relation(chance)}


def _two(chance: random.Random) -> tuple[str, dict[str, Any]]:
    parts = [prose(chance, 1) for _ in range(chance.randint(1, 3))]
    return chance.choice(["******", "***", "\n******\n"]).join([*parts, *chance.choice([[], [""]])]), {}


def _case(change: Callable[[str], str]) -> Callable[[random.Random], tuple[str, dict[str, Any]]]:
    return lambda chance: (chance.choice([change, str])(f"{prose(chance, 3)} {OTHERS['en']}"), {})


def _wrapped(chance: random.Random, *wraps: str) -> str:
    return chance.choice(wraps).replace("TEXT", prose(chance, 2))


MAKERS: dict[str, Callable[[random.Random], tuple[str, dict[str, Any]]]] = {
    "keywords:existence": lambda c: (
        mixed(c),
        {"keywords": c.sample(["river", "mill", "bridge", "well"], 2)},
    ),
    "keywords:forbidden_words": lambda c: (
        mixed(c),
        {"forbidden_words": c.sample(["river", "mill", "rain"], 2)},
    ),
    "keywords:frequency": lambda c: (
        mixed(c),
        {"keyword": c.choice(["the", "river", "is"]), "frequency": c.randint(1, 4), "relation": _relation(c)},
    ),
    "keywords:letter_frequency": lambda c: (
        prose(c, 3),
        {"letter": c.choice("aeqzT"), "let_frequency": c.randint(1, 12), "let_relation": _relation(c)},
    ),
    "language:response_language": lambda c: (
        " ".join([OTHERS[c.choice(list(OTHERS))]] * 2),
        {"language": c.choice(list(OTHERS))},
    ),
    "length_constraints:number_sentences": lambda c: (
        prose(c),
        {"num_sentences": c.randint(1, 8), "relation": _relation(c)},
    ),
    "length_constraints:number_paragraphs": lambda c: (mixed(c), {"num_paragraphs": c.randint(1, 4)}),
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _paragraphs,
    "detectable_content:number_placeholders": lambda c: (mixed(c), {"num_placeholders": c.randint(1, 2)}),
    "detectable_content:postscript": lambda c: (
        _wrapped(c, "TEXT\nP.S. TEXT", "TEXT\nP.P.S. TEXT", "TEXT\nP. S. TEXT", "TEXT P.S. TEXT", "TEXT"),
        {"postscript_marker": c.choice(["P.S.", "P.P.S"])},
    ),
    "detectable_format:number_bullet_lists": lambda c: (mixed(c), {"num_bullets": c.randint(1, 4)}),
    "detectable_format:constrained_response": lambda c: (
        _wrapped(
            c, "My answer is yes.", "TEXT My answer is maybe.", "my answer is no.", "My answer is no", "TEXT"
        ),
        {},
    ),
    "detectable_format:number_highlighted_sections": lambda c: (
        mixed(c),
        {"num_highlights": c.randint(1, 3)},
    ),
    "detectable_format:multiple_sections": lambda c: (
        _wrapped(
            c,
            "Section 1\nTEXT\nSection 2\nTEXT",
            "SECTION 1: TEXT\nSECTION 2: TEXT",
            "Section 1\nTEXT",
            "TEXT",
        ),
        {"section_spliter": c.choice(["Section", "SECTION"]), "num_sections": c.randint(1, 2)},
    ),
    "detectable_format:json_format": lambda c: (
        _wrapped(
            c,
            '{"a": "TEXT"}',
            '```json\n{"a": [1, 2]}\n```',
            "TEXT",
            "```\n[1]\n```",
            '{"a": 1,}',
            "```JSON\n3```",
        ),
        {},
    ),
    "detectable_format:title": lambda c: (mixed(c), {}),
    "combination:two_responses": _two,
    "combination:repeat_prompt": lambda c: (
        _wrapped(
            c,
            "Tell me of the mill. TEXT",
            "tell me of the Mill.\nTEXT",
            "Sure! Tell me of the mill. TEXT",
            "TEXT",
        ),
        {"prompt_to_repeat": "Tell me of the mill."},
    ),
    "startend:end_checker": lambda c: (
        _wrapped(
            c,
            "TEXT Any other questions?",
            '"TEXT any other questions?"',
            "TEXT Any other questions? Bye.",
            "TEXT",
        ),
        {"end_phrase": "Any other questions?"},
    ),
    "startend:quotation": lambda c: (_wrapped(c, '"TEXT"', ' "TEXT" ', '"TEXT', "“TEXT”", '"', "TEXT"), {}),
    "change_case:capital_word_frequency": lambda c: (
        prose(c),
        {"capital_frequency": c.randint(1, 5), "capital_relation": _relation(c)},
    ),
    "change_case:english_capital": _case(str.upper),
    "change_case:english_lowercase": _case(str.lower),
    "punctuation:no_comma": lambda c: (prose(c, 3), {}),
}


def answers(seed: int, each: int) -> list[tuple[str, dict[str, Any], str]]:
    """Instructions with their arguments and an answer, `each` of every kind."""
    cases = []
    for name, make in MAKERS.items():
        for number in range(each):
            text, arguments = make(random.Random(f"{seed}/{name}/{number}"))
            cases.append((name, arguments, text))
    return cases
