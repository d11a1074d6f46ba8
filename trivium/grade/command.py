"""`trivium grade`: try a scorer from the shell."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trivium.grade.scorer import Score, scorer
from trivium.kit.errors import TriviumError

_json = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
_answer = click.option("--answer", help="The text to score.")
_file = click.option(
    "--file", "path", type=click.Path(path_type=Path), help="A file with it; - for the input."
)
_partial = click.option("--partial", is_flag=True, help="Give the share that passes, not all or nothing.")


@click.group()
def grade() -> None:
    """Score a text: mathematics, steps, code, SQL, format, instructions."""


@grade.command("math")
@_answer
@_file
@click.option("--gold", required=True, help="The right answer.")
@click.option("--tolerance", default=0.0, show_default=True, help="Relative error allowed in numbers.")
@_json
def grade_math(answer: str | None, path: Path | None, gold: str, tolerance: float, as_json: bool) -> None:
    """Compare an answer, or the one that a text gives, with the gold answer."""
    show(scorer("math", tolerance=tolerance)(text_from(answer, path), gold=gold), as_json)


@grade.command("steps")
@_answer
@_file
@_json
def grade_steps(answer: str | None, path: Path | None, as_json: bool) -> None:
    """Work out every line of a worked solution again."""
    show(scorer("steps")(text_from(answer, path)), as_json)


@grade.command("code")
@click.option("--program", type=click.Path(path_type=Path), required=True, help="The program.")
@click.option("--tests", type=click.Path(path_type=Path), required=True, help="Its tests: Python or JSON.")
@click.option("--entry-point", help="The function that check(candidate) is given.")
@click.option("--seconds", default=10.0, show_default=True, help="The time a program may take.")
@_partial
@click.option("--unsafe-sandbox", is_flag=True, help="Run even where the kernel cannot wall the program in.")
@_json
def grade_code(
    program: Path,
    tests: Path,
    entry_point: str | None,
    seconds: float,
    partial: bool,
    unsafe_sandbox: bool,
    as_json: bool,
) -> None:
    """Run a program against tests in the sandbox."""
    made = scorer("code", partial=partial, seconds=seconds, unsafe_sandbox=unsafe_sandbox)
    # A file is a program from its first line to its last, whatever stands in its strings.
    run: Callable[..., Score] = made.run  # type: ignore[attr-defined]
    from trivium.grade.code import read_tests

    show(run(text_from(None, program), read_tests(text_from(None, tests), entry_point)), as_json)


@grade.command("sql")
@_answer
@_file
@click.option("--gold", required=True, help="The right query.")
@click.option("--database", required=True, help="An SQLite file, a script of SQL, or world:ledger.")
@_json
def grade_sql(answer: str | None, path: Path | None, gold: str, database: str, as_json: bool) -> None:
    """Run a query that can only read, and compare what it finds."""
    show(scorer("sql", database=database)(text_from(answer, path), sql=gold), as_json)


@grade.command("format")
@_answer
@_file
@click.option("--pattern", help="A regular expression for the whole text.")
@click.option("--schema", type=click.Path(path_type=Path), help="A file with a JSON schema.")
@click.option("--tag", "tags", multiple=True, help="A tag that stands once; several in their order.")
@_json
def grade_format(
    answer: str | None,
    path: Path | None,
    pattern: str | None,
    schema: Path | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look at the form of a text alone."""
    read = None if schema is None else text_from(None, schema)
    show(scorer("format", pattern=pattern, schema=read, tags=tags)(text_from(answer, path)), as_json)


@grade.command("instructions")
@_answer
@_file
@click.option("--checks", required=True, help='JSON such as {"check": "words", "arguments": {"count": 3}}.')
@_partial
@click.option("--loose", is_flag=True, help="As IFEval's loose accuracy.")
@_json
def grade_instructions(
    answer: str | None, path: Path | None, checks: str, partial: bool, loose: bool, as_json: bool
) -> None:
    """Check whether instructions are followed."""
    try:
        read: Any = json.loads(checks)
    except (ValueError, RecursionError) as error:
        raise TriviumError(f"The checks are not JSON: {error}.") from error
    show(scorer("instructions", partial=partial, loose=loose)(text_from(answer, path), checks=read), as_json)


def text_from(text: str | None, path: Path | None) -> str:
    """The text given in words, or in a file (`-` for the standard input)."""
    if text is not None:
        return text
    if path is None:
        raise TriviumError("Give the text to score with --answer, or a file that holds it with --file.")
    if str(path) == "-":
        path = Path("/dev/stdin")
    try:
        content = sys.stdin.buffer.read() if str(path) == "/dev/stdin" else path.read_bytes()
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise TriviumError(f"The file {path} cannot be read: {error}.") from error


def show(score: Score, as_json: bool) -> None:
    """Print a Score as a line for a person or as JSON for a program."""
    if as_json:
        click.echo(json.dumps({"score": score.value, "reason": score.reason, "status": score.status}))
        return
    value = "not applicable" if score.value is None else f"{score.value:g}"
    click.echo(f"{value}  {score.status}: {printable(score.reason)}")


def printable(text: str) -> str:
    """A text from a stranger as a terminal may show it: no escape sequences, no lone surrogates."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )
