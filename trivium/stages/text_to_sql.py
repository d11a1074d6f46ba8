"""Questions over a data base with their SQL, made into examples to learn from and questions to ask."""

import hashlib
import json
import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trivium.data.door import documents
from trivium.data.settings import Sources
from trivium.data.sources import Document, Source
from trivium.data.split import HELD_OUT
from trivium.grade.sql import Late, SqlScorer, ledger_of, open_read_only, orders_rows
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_text
from trivium.stages.parts.documents import refuse_separator, source_references
from trivium.stages.parts.stage import Product, Reference, Stage, Work

Told = Literal["none", "short", "full"]
NAMED = 20


@dataclass(frozen=True)
class Asked:
    """One question with the query that answers it."""

    id: str
    question: str
    sql: str


class TextToSql(Stage):
    """Run every query once, tell each question of the tables, and hold a part of the queries out."""

    kind: Literal["text_to_sql"]
    """Turn questions over a database into examples."""
    formerly_kind: ClassVar[tuple[str, ...]] = ("questions",)
    version: ClassVar[int] = 1
    computes: ClassVar[bool] = False
    produces: ClassVar[Product] = "data"

    database: str
    """A SQLite file, a script that makes one, or `world:ledger`."""
    data: Sources
    """Rows with the columns `question` and `sql`; `columns` maps other names to these."""
    tables: Told = "short"
    """How the tables are described before a question: not, as lines of names, or as their SQL."""
    held_out: Annotated[float, Field(ge=0, lt=1)] | Source = 0.2
    """The share of the different queries that is only asked, or where such questions lie."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What a query that fails, or finds nothing, does."""

    @field_validator("database")
    @classmethod
    def _known_ledger(cls, database: str) -> str:
        try:
            if database.startswith("world:"):
                ledger_of(database)
        except TriviumError as error:
            raise ValueError(str(error)) from None
        return database

    def references(self) -> list[Reference]:
        found = [Reference("database", self.database, ("source",)), *source_references("data", self.data)]
        for source in self.data:
            refuse_separator("data", source)
        if isinstance(self.held_out, Source):
            refuse_separator("held_out", self.held_out)
            found.append(Reference("held_out.path", self.held_out.path, ("data", "source"), self.held_out))
        return found

    def run(self, work: Work) -> dict[str, Any]:
        """Check, split and write; a query that is held out is never learned, however it is asked."""
        place = str(work.path(self.database))
        bad: list[str] = []
        with closing(open_read_only(place)) as connection:
            told = "" if self.tables == "none" else schema_of(connection, self.tables) + "\n"
            asked = self._checked(work, connection, self.data, bad)
            if isinstance(self.held_out, Source):
                test = self._checked(work, connection, [self.held_out], bad)
                never = {same_query(one.sql) for one in test}
            else:
                never = drawn([one.sql for one in asked], self.held_out, work.seed)
                test = [one for one in asked if same_query(one.sql) in never]
        train = [one for one in asked if same_query(one.sql) not in never]
        if not train:
            names = ", ".join(source.path for source in self.data)
            raise TriviumError(
                f"{work.stage}: no question of {names} is left to learn from; "
                "add questions to `data` or lower `held_out`."
            )
        with whole_folder(work.output("data")) as folder:
            write_text(folder / "train.jsonl", _lines([_learned(one, told) for one in train]))
        if test:
            with whole_folder(work.folder / HELD_OUT) as folder:
                write_text(folder / "test.jsonl", _lines([_posed(one, told, place) for one in test]))
        work.say(f"{len(train):,} questions to learn from, {len(test):,} held out, {len(bad):,} left out")
        for line in bad[:NAMED]:
            work.say(line)
        return {"train": len(train), "held_out": len(test), "left_out": len(bad), "named": bad[:NAMED]}

    def _checked(
        self, work: Work, connection: sqlite3.Connection, sources: list[Source], bad: list[str]
    ) -> list[Asked]:
        """Every question whose query runs and finds something."""
        found = []
        for document in documents(work, sources):
            one = _asked(document)
            why = _trouble(connection, one.sql)
            if why is None:
                found.append(one)
            elif self.on_bad == "stop":
                raise TriviumError(f"{one.id}: {why}; fix it or set `on_bad: skip`.")
            else:
                bad.append(f"{one.id}: {why}")
        return found


def _asked(document: Document) -> Asked:
    texts = [document.fields.get(name) for name in ("question", "sql")]
    for name, text in zip(("question", "sql"), texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise TriviumError(
                f"{document.id} has no `{name}`, only {', '.join(document.fields)}; map it with `columns`."
            )
    return Asked(document.id, str(texts[0]).strip(), str(texts[1]).strip())


def _trouble(connection: sqlite3.Connection, sql: str) -> str | None:
    try:
        found = SqlScorer().fetch(connection, sql)
    except (sqlite3.Error, sqlite3.Warning, Late, OverflowError) as error:
        return f"its query fails: {error}"
    # An answer of nothing would let a wrong query that finds nothing pass as right.
    return None if found and found != [(None,)] else "its query finds nothing"


def schema_of(connection: sqlite3.Connection, form: Told) -> str:
    """The tables of a data base: as the SQL that makes them, or `short`, as one line of names each."""
    made = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' "
        "ORDER BY rowid"
    ).fetchall()
    if form == "full":
        return "\n".join(f"{sql};" for _, sql in made)
    lines = []
    for name, _ in made:
        columns = connection.execute("SELECT name FROM pragma_table_info(?)", (name,)).fetchall()
        lines.append(f"{name}({', '.join(column for (column,) in columns)})")
    return "\n".join(lines)


def same_query(sql: str) -> str:
    """What two spellings of one query share."""
    return " ".join(sql.rstrip("; \n").split()).casefold()


def drawn(queries: Sequence[str], share: float, seed: int) -> set[str]:
    """A share of the different queries, the same whatever order they come in."""
    different = {same_query(query) for query in queries}

    def place(query: str) -> str:
        return hashlib.blake2b(f"{seed} {query}".encode(), digest_size=16).hexdigest()

    return set(sorted(different, key=place)[: math.ceil(share * len(different))])


def _learned(one: Asked, told: str) -> dict[str, Any]:
    asked = {"role": "user", "content": told + one.question}
    return {"messages": [asked, {"role": "assistant", "content": one.sql}]}


def _posed(one: Asked, told: str, place: str) -> dict[str, Any]:
    return {
        "id": one.id, "messages": [{"role": "user", "content": told + one.question}], "answer": one.sql,
        "ordered": orders_rows(one.sql), "database": place if place.startswith("world:") else _whole(place),
    }  # fmt: skip


def _whole(place: str) -> str:
    return str(Path(place).absolute())


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
