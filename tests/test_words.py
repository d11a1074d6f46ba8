"""Help, errors, pages and docs use the field's words: a list of words of our own stays out of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click

from trivium.cli import cli
from trivium.evals.task import task, task_names

ROOT = Path(__file__).parent.parent
OURS = re.compile(
    r"\b(nobody|whoever|somebody|as ever|anew|(?:re)?spelt|mend(?:s|ed)?|gave way|giv(?:e|es|ing) way|"
    r"dials?|flattery|stands? on|asks on|tenants?|warden|heirs?|lenders?|"
    r"unseen|told|at work|likeness|the house|rooms|floors of|sums at once|horizon_tokens)\b",
    re.IGNORECASE,
)
ALLOWED = {
    # Earlier names, which keep working.
    "gave way", "mended by a true hint", "prefers flattery", "flattery", "experiments/flattery", "dial",
    # Keys of summaries and sources, which recipes and scripts read; what a seed is drawn from.
    "unseen", "told", "sums at once", "'; it has all, seen, unseen, ",
    "Six pitches, two thirds apart, so that they can be told by ear.",
}  # fmt: skip


def found_in(text: str) -> list[str]:
    return [match.group(0) for match in OURS.finditer(text)]


def strings_of(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module that are no docstrings: messages, labels, descriptions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.value)
        for owner in ast.walk(tree)
        if isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for node in owner.body[:1]
        if isinstance(node, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def test_no_message_uses_words_of_our_own():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {found_in(text)} in {text!r}"
        for path in sorted((ROOT / "trivium").rglob("*.py"))
        for line, text in strings_of(path)
        if text not in ALLOWED and found_in(text)
    ]
    assert not wrong, "\n".join(wrong)


def commands(group: click.Group, above: str = "trivium") -> Iterator[tuple[str, str]]:
    for name, command in group.commands.items():
        with click.Context(command, info_name=name) as context:
            yield f"{above} {name}", command.get_help(context)
        if isinstance(command, click.Group):
            yield from commands(command, f"{above} {name}")


def test_no_help_uses_words_of_our_own():
    helps = dict(commands(cli))
    assert len(helps) > 12
    assert {name: found_in(text) for name, text in helps.items() if found_in(text)} == {}


def test_no_task_is_described_in_words_of_our_own():
    described = {name: task(name).description for name in task_names()}
    assert all(described.values())
    assert {name: found_in(text) for name, text in described.items() if found_in(text)} == {}


def test_no_page_uses_words_of_our_own():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pages += [page for page in (ROOT / "docs").glob("*.md") if page.name not in ("log.md", "glossary.md")]
    pages += [
        page for page in (ROOT / "trivium").rglob("*") if page.suffix in (".jinja", ".html", ".js")
    ]  # fmt: skip
    pages.append(ROOT / "trivium" / "recipe" / "foreign.yaml")
    assert len(pages) > 15
    wrong = {}
    for page in pages:
        text = re.sub(r"Earlier names that still work:[^\n]*|`unseen`", "", page.read_text(encoding="utf-8"))
        if found_in(text):
            wrong[page.name] = found_in(text)
    assert wrong == {}
