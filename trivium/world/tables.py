"""The country's ledgers: the tables, their rows, and the SQLite data base made of them."""

import sqlite3
from functools import lru_cache
from pathlib import Path

from trivium.world.chance import Chance
from trivium.world.country import country_of
from trivium.world.words import GOODS

COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "people": (
        ("name", "TEXT PRIMARY KEY"),
        ("birthplace", "TEXT"),
        ("home", "TEXT"),
        ("year", "INTEGER"),
        ("craft", "TEXT"),
        ("house", "TEXT"),
        ("animal", "TEXT"),
    ),
    "towns": (("name", "TEXT PRIMARY KEY"), ("region", "TEXT"), ("river", "TEXT"), ("good", "TEXT")),
    "sales": (
        ("seller", "TEXT REFERENCES people(name)"),
        ("good", "TEXT"),
        ("amount", "INTEGER"),
        ("price", "INTEGER"),
    ),
}
Rows = dict[str, tuple[tuple[str | int, ...], ...]]


def schema(form: str = "full") -> str:
    """The tables: as SQL that makes them, or `short`, as one line of names each."""
    if form == "short":
        return "\n".join(
            f"{table}({', '.join(name for name, _ in columns)})" for table, columns in COLUMNS.items()
        )
    made = []
    for table, columns in COLUMNS.items():
        lines = ",\n".join(f"  {name} {kind}" for name, kind in columns)
        made.append(f"CREATE TABLE {table} (\n{lines}\n);")
    return "\n".join(made)


@lru_cache(maxsize=8)
def rows(country: int, people: int) -> Rows:
    """Every row of every table."""
    land = country_of(country, people)
    persons = tuple(
        (
            person.name,
            *(
                int(person.values[column]) if column == "year" else person.values[column]
                for column, _ in COLUMNS["people"][1:]
            ),
        )
        for person in land.people
    )
    towns = tuple(
        (town.name, town.values["region"], town.values["river"], town.values["good"]) for town in land.towns
    )
    chance = Chance("sales", country)
    sales = tuple(
        (chance.pick(land.people).name, chance.pick(GOODS), chance.between(1, 40), chance.between(2, 90))
        for _ in range(2 * people)
    )
    return {"people": persons, "towns": towns, "sales": sales}


def database(country: int = 0, people: int = 240, path: Path | None = None) -> sqlite3.Connection:
    """The ledgers as a data base in memory, or in a new file."""
    connection = sqlite3.connect(":memory:" if path is None else str(path))
    connection.executescript(schema())
    for table, content in rows(country, people).items():
        marks = ", ".join("?" for _ in COLUMNS[table])
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", content)
    connection.commit()
    return connection


@lru_cache(maxsize=8)
def open_database(country: int, people: int) -> sqlite3.Connection:
    """One data base in memory for all who only read."""
    connection = database(country, people)
    connection.execute("PRAGMA query_only = ON")
    return connection
