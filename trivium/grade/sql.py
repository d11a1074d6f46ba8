"""The scorer of SQL: run it on a data base that can only be read, and compare the rows it finds."""

import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trivium import world
from trivium.data.sources import world_call
from trivium.grade.fences import fenced_anywhere
from trivium.grade.maths.extract import after_thinking
from trivium.grade.maths.scorer import shorten
from trivium.grade.scorer import Score, column
from trivium.kit.errors import TriviumError
from trivium.world.tables import database as country_ledgers

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
# What could reach outside the tables, or make a row out of thin air for its size.
_FORBIDDEN_FUNCTIONS = {
    "load_extension",
    "readfile",
    "writefile",
    "edit",
    "zeroblob",
    "randomblob",
    "fts3_tokenizer",
}
# What a dump of a data base says besides its tables; others reach files or this whole process.
_PRAGMAS = (
    "foreign_keys", "defer_foreign_keys", "encoding", "page_size", "journal_mode", "synchronous",
    "user_version", "application_id", "legacy_alter_table", "case_sensitive_like", "recursive_triggers",
)  # fmt: skip
_SCRIPT_SECONDS = 10.0
_MAKES = re.compile(r"\b(?:create|insert)\b", re.I)
_HEADER = b"SQLite format 3\0"
_LONGEST_VALUE = 1 << 20
_MOST_TEXT = 16 << 20
_MOST_MEMORY = 256 << 20
_STEPS_BETWEEN_LOOKS = 1000
GOLD_COLUMNS = ("sql", "gold", "query", "answer", "solution")


class Late(Exception):
    """The query took too long or found too much."""


@dataclass(frozen=True)
class SqlScorer:
    """One where a query finds what the gold query finds, in its order where that asks for one."""

    name: str = "sql"
    database: str | None = None
    seconds: float = 2.0
    rows: int = 10_000

    def __post_init__(self) -> None:
        if isinstance(self.database, str) and self.database.startswith("world:"):
            ledger_of(self.database)

    def __call__(self, completion: str, **columns: Any) -> Score:
        place = columns.get("database") or self.database
        if not isinstance(place, str):
            raise TriviumError(
                "The scorer 'sql' needs a data base: a setting or column `database` with a file, a script of "
                "SQL, or world:ledger."
            )
        query = query_of(completion)
        if query is None:
            return Score(0.0, "there is no query in the text", "unparsed")
        with closing(open_read_only(place)) as connection:
            ordered = columns.get("ordered")
            wanted = columns.get("rows")
            if wanted is None:
                gold = str(column(columns, GOLD_COLUMNS, self.name))
                ordered = orders_rows(gold) if ordered is None else ordered
                try:
                    wanted = self.fetch(connection, gold)
                except (sqlite3.Error, sqlite3.Warning, Late, OverflowError, ValueError) as error:
                    return Score(None, f"the gold query fails: {error}", "gold_bad")
            elif not isinstance(wanted, list) or not all(isinstance(row, list | tuple) for row in wanted):
                raise TriviumError("The column `rows` of the scorer 'sql' is a list of rows, each a list.")
            try:
                found = self.fetch(connection, query)
            except Late as error:
                return Score(0.0, str(error), "overtime")
            except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError, MemoryError) as error:
                return Score(0.0, f"the query fails: {shorten(str(error))}", "wrong")
        if same_rows([tuple(row) for row in wanted], found, bool(ordered)):
            return Score(1.0, f"the query finds the {len(found)} right rows", "ok")
        return Score(0.0, f"the query finds {_some(found)}, where {_some(wanted)} is right", "wrong")

    def fetch(self, connection: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
        """The rows of one query within the limits."""
        deadline = time.monotonic() + self.seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_LOOKS)
        connection.set_authorizer(_authorize)
        try:
            return self.within_limits(connection.execute(query))
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise Late(f"the query took more than {self.seconds:g} seconds") from error
            raise
        finally:
            connection.set_authorizer(None)
            connection.set_progress_handler(None, 0)

    def within_limits(self, cursor: sqlite3.Cursor) -> list[tuple[Any, ...]]:
        """Every row of a result that is neither too many rows nor too much text."""
        found: list[tuple[Any, ...]] = []
        size = 0
        for row in cursor:
            found.append(row)
            size += sum(len(value) for value in row if isinstance(value, str | bytes))
            if len(found) > self.rows or size > _MOST_TEXT:
                raise Late(f"the query finds more than {self.rows} rows, or too much text")
        return found


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in _FORBIDDEN_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def ledger_of(place: str) -> tuple[int, int]:
    """The country, and how many people it has, whose ledgers `world:ledger?people=40` means."""
    name, options = world_call(place)
    if name != "ledger":
        raise TriviumError(f"{place} is no data base; of the world only world:ledger is one.")
    own = world.options(name, options)
    return own.country, own.people


def _is_file(place: str) -> bool:
    try:
        return Path(place).is_file()
    except OSError:
        # A script is longer than any path may be.
        return False


def _script_in(file: Path) -> str | None:
    """The SQL in a file that is no data base itself; None for a data base."""
    content = file.read_bytes()[: len(_HEADER)]
    if content in (b"", _HEADER):
        return None
    try:
        script = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        script = ""
    if not _MAKES.search(script):
        raise TriviumError(f"{file} is neither a SQLite data base nor a script of SQL that makes one.")
    return script


def open_read_only(place: str) -> sqlite3.Connection:
    """A data base that no query can change: a file, a script of SQL, or the country's ledgers."""
    if place.startswith("world:"):
        connection = country_ledgers(*ledger_of(place))
    elif not _is_file(place):
        if not _MAKES.search(place):
            raise TriviumError(f"The data base {place} does not exist.")
        connection = _made_by(place)
    elif (script := _script_in(Path(place))) is not None:
        connection = _made_by(script)
    else:
        # Immutable, so that no journal or lock file is ever written beside it.
        connection = sqlite3.connect(
            f"file:{quote(str(Path(place).absolute()))}?mode=ro&immutable=1", uri=True
        )
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute(f"PRAGMA hard_heap_limit = {_MOST_MEMORY}")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 20_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    return connection


def _made_by(script: str) -> sqlite3.Connection:
    """A data base in memory that a script fills, which can reach no file and has its time."""
    connection = sqlite3.connect(":memory:")
    connection.execute(f"PRAGMA hard_heap_limit = {_MOST_MEMORY}")
    deadline = time.monotonic() + _SCRIPT_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_LOOKS)
    connection.set_authorizer(_authorize_script)
    try:
        connection.executescript(script)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        connection.close()
        raise TriviumError(f"The script that makes the data base fails: {error}.") from error
    connection.set_authorizer(None)
    connection.set_progress_handler(None, 0)
    return connection


def _authorize_script(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() not in _PRAGMAS:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and second in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def query_of(completion: str) -> str | None:
    """The query in a completion: its last fenced block, or the text itself where it begins like a query."""
    spoken = after_thinking(completion)
    if spoken is None:
        return None
    blocks = [
        query for language, query in fenced_anywhere(spoken) if language.lower() in ("", "sql", "sqlite")
    ]
    query = (blocks[-1] if blocks else spoken).strip()
    if not blocks:
        query = re.sub(r"^(?:answer|sql|query)\s*:\s*", "", query, flags=re.I)
    if "\x00" in query:
        return None
    return query if re.match(r"(?:select|with|values)\b", query, re.I) else None


def orders_rows(query: str) -> bool:
    """Whether a query asks for its rows in an order, outside every bracket."""
    plain = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", "''", query)
    outside, depth = [], 0
    for part in re.split(r"([()])", plain):
        if part in ("(", ")"):
            depth = max(0, depth + (1 if part == "(" else -1))
            outside.append(" ")
        elif depth == 0:
            outside.append(part)
    return re.search(r"\border\s+by\b", "".join(outside), re.I) is not None


def same_rows(wanted: Sequence[tuple[Any, ...]], found: Sequence[tuple[Any, ...]], ordered: bool) -> bool:
    """Whether two results hold the same rows, as lists where the order counts and as bags elsewhere."""
    left, right = ([tuple(map(_plain, row)) for row in rows] for rows in (wanted, found))
    if not ordered:
        left, right = sorted(left, key=repr), sorted(right, key=repr)
    return left == right


def _plain(value: Any) -> Any:
    """A number in one spelling: 25 and 25.0 are one value, and the last bits of a float are noise."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        rounded = float(f"{value:.10g}") if isinstance(value, float) else value
        return (
            int(rounded)
            if rounded == rounded and abs(rounded) < 1 << 53 and rounded == int(rounded)
            else rounded
        )
    return value


def _some(rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "no rows"
    first = shorten(", ".join(map(str, rows[0])))
    return f"({first})" if len(rows) == 1 else f"{len(rows)} rows such as ({first})"
