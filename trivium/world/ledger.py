"""Questions over the country's tables with the SQL that answers them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, split_of
from trivium.world.country import Country, peopled
from trivium.world.document import Question, Split, WorldDocument
from trivium.world.tables import open_database, schema
from trivium.world.words import ANIMALS, CRAFTS, GOODS, sentences


@dataclass(frozen=True)
class Options:
    """Which families of questions, how the tables are told of (none, short or full), and the form."""

    country: int = 0
    people: int = 240
    family: str = "all"
    schema: str = "short"
    form: str = "chat"


@dataclass(frozen=True)
class Query:
    """A question with its SQL; `values` are what the split is decided by."""

    family: str
    question: str
    sql: str
    values: tuple[str, ...]
    ordered: bool = False


FAMILIES: dict[str, dict[str, Any]] = sentences("queries")
_PLURALS = {"fox": "foxes", "goose": "geese", "horse": "horses"}
_DRAWN: dict[str, Callable[[Chance, Country], str]] = {
    "person": lambda chance, land: chance.pick(land.people).name,
    "town": lambda chance, land: chance.pick(land.towns).name,
    "house": lambda chance, land: chance.pick(land.houses),
    "river": lambda chance, land: chance.pick(land.rivers),
    "year": lambda chance, land: chance.pick(land.years[10:]),
    "craft": lambda chance, land: chance.pick(CRAFTS),
    "animal": lambda chance, land: chance.pick(ANIMALS),
    "good": lambda chance, land: chance.pick(GOODS),
    "amount": lambda chance, land: str(chance.between(2, 39)),
}
"""How the words of a question are drawn."""


def _drawn(chance: Chance, land: Country, name: str) -> Query:
    """A question of a family."""
    family = FAMILIES[name]
    words = {word: _DRAWN[word](chance, land) for word in family["draw"]}
    forms = family["forms"]
    words |= chance.pick(forms) if len(forms) > 1 else forms[0]
    if "craft" in words:
        words["crafts"] = _PLURALS.get(words["craft"], f"{words['craft']}s")
    asked = words.pop("ask", None) or family["ask"]
    return Query(
        name, asked.format(**words), family["sql"].format(**words),
        tuple(words[word] for word in family["split"]), ordered=family.get("ordered", False),
    )  # fmt: skip


def _query(chance: Chance, split: Split, options: Options) -> tuple[Query, list[tuple[str | int, ...]]]:
    if options.family not in ("all", *FAMILIES):
        raise TriviumError(f"world:ledger has no family '{options.family}'; use all, {', '.join(FAMILIES)}.")
    if options.schema not in ("none", "short", "full"):
        raise TriviumError(f"world:ledger tells no schema '{options.schema}'; use none, short or full.")
    land, tables = peopled(options.country, options.people), open_database(options.country, options.people)
    family = chance.pick(tuple(FAMILIES)) if options.family == "all" else options.family
    while True:
        query = _drawn(chance, land, family)
        if split_of("ledger", *query.values) != split:
            continue
        found = tables.execute(query.sql).fetchall()
        # An empty answer would let a wrong query that finds nothing pass as right.
        if found and found[0][-1] not in (None, 0):
            return query, found


def prompt(question: str, form: str) -> str:
    """What is asked, with as much of the tables' form as wished."""
    return question if form == "none" else f"{schema(form)}\n{question}"


def write(index: int, split: Split, seed: int, options: Options) -> WorldDocument:
    """One question with its SQL, as a chat or as a prompt with its answer."""
    query, found = _query(Chance("ledger", split, seed, index), split, options)
    truth = _truth(query, found)
    asked = [{"role": "user", "content": prompt(query.question, options.schema)}]
    if options.form == "chat":
        messages = [*asked, {"role": "assistant", "content": query.sql}]
        return WorldDocument("", None, {"messages": messages}, truth)
    if options.form == "prompt":
        return WorldDocument("", None, {"prompt": asked, "answer": query.sql}, truth)
    if options.form == "document":
        return WorldDocument("", f"Question: {asked[0]['content']}\nAnswer: {query.sql}", truth=truth)
    if options.form == "question":
        return WorldDocument("", None, {"question": query.question, "sql": query.sql}, truth)
    raise TriviumError(f"world:ledger has no form '{options.form}'; use chat, prompt, document or question.")


def ask(index: int, split: Split, seed: int, options: Options) -> Question:
    """One question whose SQL is executed and compared."""
    query, found = _query(Chance("ask ledger", split, seed, index), split, options)
    whole = prompt(query.question, options.schema)
    return Question(
        id="",
        prompt=f"Question: {whole}\nAnswer:",
        question=whole,
        answer=query.sql,
        truth=_truth(query, found),
    )


def _truth(query: Query, found: list[tuple[str | int, ...]]) -> dict[str, Any]:
    rows = [list(row) for row in found]
    return {"family": query.family, "sql": query.sql, "rows": rows, "ordered": query.ordered}
