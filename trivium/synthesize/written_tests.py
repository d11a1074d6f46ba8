"""Tests that a model wrote: not believed before they have failed a program that does nothing.

A suite without an assertion, or one that a program of empty functions passes, would call every answer right.
"""

import ast
from functools import lru_cache

from trivium.grade.code import TESTS_COLUMNS, CodeScorer, program_of, read_tests
from trivium.kit.errors import TriviumError
from trivium.synthesize.row import CANDIDATES, Row

_EMPTY = ("return None", "return 0", "return ''", "return []", "return True")


@lru_cache(1)
def _scorer() -> CodeScorer:
    return CodeScorer()


def trouble_of_tests(row: Row) -> str | None:
    """Why a row's tests prove nothing; None where they were not written by a model, or do."""
    name = next((name for name in TESTS_COLUMNS if name in row.fields), None)
    written = any("tests" in entry.get("wrote", ()) for entry in row.provenance)
    if name is None or not written:
        return None
    tests = row.fields[name]
    if isinstance(tests, str):
        tests = program_of(tests) or tests
        try:
            tree = ast.parse(tests)
        except (SyntaxError, ValueError, RecursionError) as error:
            return f"tests: they are no Python ({error})"
        if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            return "tests: they assert nothing"
        row.fields[name] = tests
    try:
        exam = read_tests(tests, row.fields.get("entry_point"), row.fields.get("prelude") or "")
    except TriviumError as error:
        return f"tests: {error}"
    candidates = row.fields.get(CANDIDATES) or [{"text": str(row.fields.get("completion", ""))}]
    functions = sorted({one for candidate in candidates for one in _functions(candidate["text"])})
    for body in _EMPTY:
        stub = "\n".join(f"def {one}(*arguments, **named):\n    {body}" for one in functions) or "pass"
        score = _scorer().run(stub, exam)
        if score.status == "gold_bad":
            return f"tests: {score.reason}"
        if score.value == 1.0:
            return f"tests: a program passes them whose functions only `{body}`"
    return None


def _functions(text: str) -> set[str]:
    """The functions that a program defines."""
    try:
        tree = ast.parse(program_of(text) or "")
    except (SyntaxError, ValueError, RecursionError):
        return set()
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
