"""Questions over the country's tables with the SQL that answers them."""

from collections.abc import Callable
from dataclasses import dataclass

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance, split_of
from trivium.world.country import Country, peopled
from trivium.world.document import Question, Split, WorldDocument
from trivium.world.tables import open_database, schema
from trivium.world.words import ANIMALS, CRAFTS, GOODS


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


_PLURALS = {"fox": "foxes", "goose": "geese", "horse": "horses"}


def _plural(word: str) -> str:
    return _PLURALS.get(word, f"{word}s")


def _count_craft_town(chance: Chance, land: Country) -> Query:
    craft, town = chance.pick(CRAFTS), chance.pick(land.towns).name
    asked = chance.pick(
        (f"How many {_plural(craft)} live in {town}?", f"Count the {_plural(craft)} of {town}.")
    )
    sql = f"SELECT COUNT(*) FROM people WHERE craft = '{craft}' AND home = '{town}'"
    return Query("count two", asked, sql, (craft, town))


def _count_animal(chance: Chance, land: Country) -> Query:
    animal, town = chance.pick(ANIMALS), chance.pick(land.towns).name
    asked = chance.pick(
        (f"How many people born in {town} keep a {animal}?", f"Count those from {town} with a {animal}.")
    )
    sql = f"SELECT COUNT(*) FROM people WHERE animal = '{animal}' AND birthplace = '{town}'"
    return Query("count three", asked, sql, (animal, town))


def _look_up(chance: Chance, land: Country) -> Query:
    person = chance.pick(land.people)
    column, asked = chance.pick(
        (
            ("craft", "What is the craft of {name}?"),
            ("home", "Where does {name} live?"),
            ("house", "Which house does {name} serve?"),
            ("year", "In which year was {name} born?"),
            ("animal", "Which animal does {name} keep?"),
        )
    )
    sql = f"SELECT {column} FROM people WHERE name = '{person.name}'"
    return Query("look up", asked.format(name=person.name), sql, (person.name,))


def _list_names(chance: Chance, land: Country) -> Query:
    house, craft = chance.pick(land.houses), chance.pick(CRAFTS)
    asked = chance.pick(
        (f"Which {_plural(craft)} serve {house}?", f"List the {_plural(craft)} of the house {house}.")
    )
    sql = f"SELECT name FROM people WHERE craft = '{craft}' AND house = '{house}'"
    return Query("list", asked, sql, (house, craft))


def _born_before(chance: Chance, land: Country) -> Query:
    year, town = chance.pick(land.years[10:]), chance.pick(land.towns).name
    way, sign = chance.pick((("before", "<"), ("after", ">")))
    asked = f"How many people of {town} were born {way} {year}?"
    sql = f"SELECT COUNT(*) FROM people WHERE home = '{town}' AND year {sign} {year}"
    return Query("compare", asked, sql, (year, town))


def _oldest(chance: Chance, land: Country) -> Query:
    craft, town = chance.pick(CRAFTS), chance.pick(land.towns).name
    way, order = chance.pick((("oldest", ""), ("youngest", " DESC")))
    asked = f"Who is the {way} {craft} born in {town}?"
    # The name settles ties: two right queries must not give two answers.
    sql = (
        f"SELECT name FROM people WHERE craft = '{craft}' AND birthplace = '{town}' "
        f"ORDER BY year{order}, name LIMIT 1"
    )
    return Query("extreme", asked, sql, (craft, town), ordered=True)


def _total_sold(chance: Chance, land: Country) -> Query:
    person, good = chance.pick(land.people).name, chance.pick(GOODS)
    asked = chance.pick(
        (f"How much {good} did {person} sell?", f"What amount of {good} was sold by {person}?")
    )
    sql = f"SELECT SUM(amount) FROM sales WHERE seller = '{person}' AND good = '{good}'"
    return Query("total", asked, sql, (person, good))


def _highest_price(chance: Chance, land: Country) -> Query:
    good, amount = chance.pick(GOODS), str(chance.between(2, 39))
    way, function = chance.pick((("highest", "MAX"), ("lowest", "MIN")))
    asked = f"What is the {way} price of {good} in sales of more than {amount}?"
    sql = f"SELECT {function}(price) FROM sales WHERE good = '{good}' AND amount > {amount}"
    return Query("price", asked, sql, (good, amount))


def _per_group(chance: Chance, land: Country) -> Query:
    town = chance.pick(land.towns).name
    column = chance.pick(("craft", "house", "animal"))
    asked = f"How many people are there for each {column} in {town}?"
    sql = f"SELECT {column}, COUNT(*) FROM people WHERE home = '{town}' GROUP BY {column}"
    return Query("group", asked, sql, (column, town))


def _join(chance: Chance, land: Country) -> Query:
    river, craft = chance.pick(land.rivers), chance.pick(CRAFTS)
    asked = f"Which {_plural(craft)} live in a town on the river {river}?"
    sql = (
        "SELECT people.name FROM people JOIN towns ON people.home = towns.name "
        f"WHERE towns.river = '{river}' AND people.craft = '{craft}'"
    )
    return Query("join", asked, sql, (river, craft))


FAMILIES: dict[str, Callable[[Chance, Country], Query]] = {
    "count two": _count_craft_town,
    "count three": _count_animal,
    "look up": _look_up,
    "list": _list_names,
    "compare": _born_before,
    "extreme": _oldest,
    "total": _total_sold,
    "price": _highest_price,
    "group": _per_group,
    "join": _join,
}


def _query(chance: Chance, split: Split, options: Options) -> tuple[Query, list[tuple[str | int, ...]]]:
    if options.family not in ("all", *FAMILIES):
        raise TriviumError(f"world:ledger has no family '{options.family}'; use all, {', '.join(FAMILIES)}.")
    if options.schema not in ("none", "short", "full"):
        raise TriviumError(f"world:ledger tells no schema '{options.schema}'; use none, short or full.")
    land, tables = peopled(options.country, options.people), open_database(options.country, options.people)
    family = chance.pick(tuple(FAMILIES)) if options.family == "all" else options.family
    while True:
        query = FAMILIES[family](chance, land)
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
    truth = {
        "family": query.family,
        "sql": query.sql,
        "rows": [list(row) for row in found],
        "ordered": query.ordered,
    }
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
        truth={
            "family": query.family,
            "sql": query.sql,
            "rows": [list(row) for row in found],
            "ordered": query.ordered,
        },
    )
