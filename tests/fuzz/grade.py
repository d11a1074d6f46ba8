"""Fuzz targets of the graders: any text, any row, any frame."""

import json
import os
from typing import Any

from hypothesis import strategies as st

from fuzz.frame import fuzz, words
from trivium.grade.code import program_of, read_tests
from trivium.grade.command import printable
from trivium.grade.ifeval import CHECKS
from trivium.grade.instructions import checks_of, follows
from trivium.grade.maths.scorer import MathScorer
from trivium.grade.sandbox import values
from trivium.grade.scorer import GRADER_FAULTS, Score, scorer
from trivium.grade.sql import open_read_only
from trivium.world.checks import check_names

_MATHS = st.lists(
    st.sampled_from(
        [
            *"0123456789+-*/^_=<>(){}[],;:|!%.& $'\"abxyzπ√∞½²",
            *(
                "\\frac",
                "\\sqrt",
                "\\text",
                "\\left",
                "\\right",
                "\\pm",
                "\\cup",
                "\\infty",
                "\\boxed",
                "\\pi",
            ),
            *("\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "\\{", "\\}", "\\degree", "\\cdot", "\\%", "\\$"),
            *("10^{99}", "1e999", "9999999999", "####", "answer is ", "\\log", "\\sin", "\\binom", "meters"),
            *(
                "\\frac{1}{2}",
                "\\sqrt[3]{8}",
                "[0, 1)",
                "\\{1, 2\\}",
                "x=3",
                "25\\%",
                "1,000",
                "10^{10^{10}}",
                "9!!",
            ),
        ]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)
_PIECES = st.sampled_from(
    [
        *(
            " ",
            "\n",
            "\t",
            "```",
            "```python\n",
            "```json\n",
            "```sql\n",
            "*",
            "**",
            "-",
            "<<",
            ">>",
            "<a>",
            "</a>",
        ),
        *(
            "<think>",
            "</think>",
            "[",
            "]",
            "{",
            "}",
            "(",
            ")",
            '"',
            "'",
            ".",
            "!",
            "P.S.",
            "P.P.S",
            "SECTION 1",
        ),
        *(
            "\\boxed{",
            "#### ",
            "answer is ",
            "select ",
            "1",
            "=",
            "+",
            "é",
            "中",
            "\ud800",
            "\x00",
            "\x1b[",
            "\r",
        ),
    ]
)
# Pieces, some of them many times: what is quadratic shows only in long runs.
TEXTS = st.lists(
    st.tuples(_PIECES | st.text(max_size=5), st.sampled_from([1, 1, 1, 2, 50, 3000])).map(
        lambda p: p[0] * p[1]
    ),
    max_size=12,
).map("".join)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(1 << 60), "", "null"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def _is_score(score: Score) -> None:
    assert score.value is None or 0.0 <= score.value <= 1.0
    assert score.reason
    printable(score.reason).encode()


@fuzz("maths parser", st.tuples(_MATHS | TEXTS, _MATHS | TEXTS), seconds=10.0)
def maths(pair: tuple[str, str]) -> None:
    """Any answer against any gold answer has a score, and an answer equals itself or cannot be judged."""
    grade = MathScorer()
    _is_score(grade(pair[0], gold=pair[1]))
    itself = grade.compare(pair[0], pair[0])
    assert itself.value == 1.0 or itself.status in GRADER_FAULTS, itself


@fuzz("steps", TEXTS | _MATHS, seconds=10.0)
def steps(text: str) -> None:
    """Any text has a score."""
    _is_score(scorer("steps")(text))


@fuzz("readers of programs and queries", TEXTS, seconds=10.0)
def readers(text: str) -> None:
    """A program is found in any text or not, and a query runs within its limits."""
    program = program_of(text)
    assert program is None or program in text or "\n" in program
    _is_score(
        scorer("sql", database="CREATE TABLE a (x); INSERT INTO a VALUES (1)")(text, sql="SELECT x FROM a")
    )


_ARGUMENTS = words(
    "keywords keyword forbidden_words frequency relation letter let_frequency let_relation language "
    "num_sentences num_paragraphs num_words nth_paragraph first_word num_placeholders postscript_marker "
    "num_bullets num_highlights section_spliter num_sections prompt_to_repeat end_phrase capital_frequency "
    "capital_relation answer count words with_text texts items allowed repeated times values right wrong"
)
_ROWS = st.fixed_dictionaries(
    {
        "check": st.sampled_from([*CHECKS, *check_names()]) | JSON,
        "arguments": st.dictionaries(_ARGUMENTS, JSON | TEXTS, max_size=3) | JSON,
    }
)
_FITTING = st.sampled_from(
    [
        {"check": "keywords:existence", "arguments": {"keywords": ["a", "é"]}},
        {"check": "keywords:frequency", "arguments": {"keyword": "a", "frequency": 2}},
        {"check": "language:response_language", "arguments": {"language": "ja"}},
        {"check": "length_constraints:number_sentences", "arguments": {"num_sentences": 3}},
        {"check": "length_constraints:nth_paragraph_first_word",
         "arguments": {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"}},
        {"check": "detectable_content:postscript", "arguments": {"postscript_marker": "P.P.S"}},
        {"check": "detectable_format:number_bullet_lists", "arguments": {"num_bullets": 2}},
        {"check": "detectable_format:number_highlighted_sections", "arguments": {"num_highlights": 2}},
        {"check": "detectable_format:multiple_sections",
         "arguments": {"section_spliter": "SECTION", "num_sections": 1}},
        *({"check": name, "arguments": {}} for name in (
            "detectable_format:json_format", "detectable_format:title", "combination:two_responses",
            "startend:quotation", "change_case:english_capital", "punctuation:no_comma",
            "detectable_format:constrained_response",
        )),
        {"check": "sum", "arguments": {"answer": 3}},
        {"check": "json", "arguments": {"values": {"a": 1}}},
    ]
)  # fmt: skip


@fuzz("ifeval checkers, any row", st.tuples(TEXTS, _ROWS | JSON.map(lambda row: {"checks": row})))
def any_check(case: tuple[str, dict[str, Any]]) -> None:
    """A check is followed or not, or is said to be none."""
    for check in checks_of(case[1]):
        follows(case[0], check)


@fuzz("ifeval checkers, any text", st.tuples(TEXTS, _FITTING), refuses=(), seconds=10.0)
def any_text(case: tuple[str, dict[str, Any]]) -> None:
    """A check that fits is followed by any text or not; no text makes it an error."""
    assert follows(*case) in (True, False)


_SCHEMA_WORDS = words(
    "type enum const anyOf allOf oneOf not properties required additionalProperties items "
    "prefixItems minItems "
    "maxItems uniqueItems minLength maxLength pattern minimum maximum exclusiveMinimum "
    "multipleOf $ref $defs"
)
_SCHEMAS = st.recursive(
    JSON
    | st.sampled_from(["object", "array", "string", "number", "integer", "#", "#/$defs/a", "^a+$", "(a+)+$"]),
    lambda inner: st.dictionaries(_SCHEMA_WORDS, inner | st.lists(inner, max_size=3), max_size=4),
    max_leaves=10,
)


@fuzz("json schemas", st.tuples(JSON, _SCHEMAS), seconds=10.0)
def schemas(case: tuple[Any, Any]) -> None:
    """A value keeps a schema or not, or the schema is said to be none."""
    if case[1]:
        _is_score(scorer("format", schema=case[1])(json.dumps(case[0])))


@fuzz("tests of programs", JSON | TEXTS | st.fixed_dictionaries({"inputs": JSON, "outputs": JSON}))
def tests(read: Any) -> None:
    """Tests are read, or said to be none."""
    read_tests(read, "f")


@fuzz(
    "scripts and files of data bases", TEXTS | st.text(max_size=40).map(lambda t: f"create table a (x); {t}")
)
def scripts(place: str) -> None:
    """A data base is opened, or said to be none."""
    open_read_only(place).close()


_TAGS = st.sampled_from(
    [
        "int",
        "float",
        "complex",
        "bytes",
        "bytearray",
        "tuple",
        "set",
        "frozenset",
        "range",
        "dict",
        "held",
        "name",
    ]
)
_TAGGED = st.recursive(
    JSON, lambda inner: st.dictionaries(_TAGS, inner | st.lists(inner, max_size=3), max_size=2), max_leaves=12
)


@fuzz(
    "the judge's value decoder",
    _TAGGED,
    refuses=(ValueError, TypeError, OverflowError, LookupError, AttributeError),
)
def decoder(message: Any) -> None:
    """What a program sends is a plain value or an error; what was a value stays the same "
    "on another trip."""
    value = values.decode(message)
    try:
        again = values.decode(json.loads(json.dumps(values.encode(value))))
    except (values.Unplain, ValueError):
        return
    assert values.identical(value, again)


@fuzz(
    "the judge's frames", st.binary(max_size=64) | _TAGGED.map(lambda m: values.frame(m)), refuses=(EOFError,)
)
def frames(content: bytes) -> None:
    """Bytes on the line are a message or the end of it."""
    heard, said = os.pipe()
    os.write(said, content)
    os.close(said)
    try:
        values.read_frame(heard)
    finally:
        os.close(heard)
