"""A real SQLite database in memory that runs one untrusted statement at a time.

A statement can neither reach files nor run for long: an authorizer allows reading and changing
tables with common functions and nothing else (no ATTACH, PRAGMA, transactions, extensions, virtual
tables, clocks or random numbers), and SQLite's own limits bound sizes, memory and work. There are
no transactions: each change is final.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROWS_SHOWN = 20
"""Rows of a result that are read; a text shows as many as fit."""
WORK, WORK_STEP = 200_000, 1_000
"""The most instructions of SQLite's virtual machine for a statement; how often it is checked."""
PAGES = 64
"""The largest database, in pages of 4096 bytes."""
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 32,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 40,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 8,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
"""Limits of the connection (https://sqlite.org/c3ref/c_limit_attached.html)."""
ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_DROP_TABLE,
}
"""The actions that the authorizer allows (https://sqlite.org/c3ref/c_alter_table.html)."""
STATEMENTS = ("SELECT", "INSERT", "UPDATE", "DELETE", "CREATE", "DROP")
"""The first words of statements that are run."""
FUNCTIONS = frozenset(
    (
        *(
            "abs",
            "avg",
            "coalesce",
            "count",
            "group_concat",
            "ifnull",
            "length",
            "like",
            "lower",
            "max",
        ),
        *(
            "min",
            "nullif",
            "replace",
            "round",
            "substr",
            "substring",
            "sum",
            "total",
            "trim",
            "typeof",
        ),
        *("upper"),
    )
)
"""The functions that the authorizer allows."""
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
"""The names of new tables."""


class SqlError(Exception):
    """A statement was refused or failed; nothing changed."""


@dataclass(frozen=True)
class SqlResult:
    """The result of one statement."""

    text: str
    writes: bool
    """True if the statement is not a query."""


@dataclass(frozen=True)
class Table:
    """The columns of a table, with their types, and its rows."""

    columns: Mapping[str, str]
    rows: Sequence[tuple[Any, ...]]


class Database:
    """Tables in memory. Any thread may use it, one at a time."""

    def __init__(self, tables: Mapping[str, Table]):
        self._connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, cached_statements=0
        )
        self._trusted = False
        """True while the database reads itself, without an authorizer."""
        for pragma in (f"max_page_count = {PAGES}", "temp_store = MEMORY"):
            self._connection.execute(f"PRAGMA {pragma}")
        for name, table in tables.items():
            columns = ", ".join(f"{column} {kind}" for column, kind in table.columns.items())
            self._connection.execute(f"CREATE TABLE {name} ({columns})")
            marks = ", ".join("?" * len(table.columns))
            self._connection.executemany(f"INSERT INTO {name} VALUES ({marks})", table.rows)
        for limit, value in LIMITS.items():
            self._connection.setlimit(limit, value)
        self._names = frozenset(self.schema())
        self._work = 0
        self._connection.set_authorizer(self._authorize)
        self._connection.set_progress_handler(self._working, WORK_STEP)

    def schema(self) -> dict[str, tuple[str, ...]]:
        """The columns of each table, in the order of creation."""
        names = self._all("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid")
        return {
            name: tuple(entry[0] for entry in self._cursor(f'SELECT * FROM "{name}"').description)
            for (name,) in names
        }

    def run(self, statement: str) -> SqlResult:
        """Run one statement.

        Raises:
            SqlError: It is refused, wrong, too much work or too large. Nothing changed.
        """
        words = statement.split(None, 1)
        if not words or words[0].upper() not in STATEMENTS:
            raise SqlError(f"a statement must begin with one of {', '.join(STATEMENTS)}")
        self._work = 0
        before = self._connection.total_changes
        try:
            cursor = self._connection.execute(statement)
            rows = cursor.fetchmany(ROWS_SHOWN + 1)
            cursor.close()
        except sqlite3.OperationalError as error:
            interrupted = self._work > WORK
            raise SqlError("the statement takes too long" if interrupted else str(error)) from error
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            raise SqlError(str(error)) from error
        changed = self._connection.total_changes - before
        if cursor.description is not None:
            names = [entry[0] for entry in cursor.description]
            return SqlResult(_shown(names, rows), changed > 0)
        self._names = frozenset(self.schema())
        return SqlResult(f"{changed} row{'' if changed == 1 else 's'} changed", True)

    def count(self) -> int:
        """The number of rows of all tables."""
        counts = [self._all(f'SELECT COUNT(*) FROM "{name}"') for name in self.schema()]
        return sum(rows[0][0] for rows in counts)

    def facts(self) -> Counter[tuple[Any, ...]]:
        """Everything that the database holds: its tables and their rows."""
        facts: Counter[tuple[Any, ...]] = Counter()
        for name, columns in self.schema().items():
            facts["table", name, columns] += 1
            facts.update(("row", name, *row) for row in self._all(f'SELECT * FROM "{name}"'))
        return facts

    def close(self) -> None:
        """Free the memory."""
        self._connection.close()

    def _cursor(self, statement: str) -> sqlite3.Cursor:
        self._trusted = True
        try:
            return self._connection.execute(statement)
        finally:
            self._trusted = False

    def _all(self, statement: str) -> list[tuple[Any, ...]]:
        return self._cursor(statement).fetchall()

    def _authorize(
        self, action: int, first: str | None, second: str | None, *source: str | None
    ) -> int:
        if self._trusted:
            return sqlite3.SQLITE_OK
        allowed = action in ACTIONS
        if action == sqlite3.SQLITE_FUNCTION:
            allowed = (second or "").lower() in FUNCTIONS
        elif action == sqlite3.SQLITE_READ:
            allowed = first == "sqlite_master" or first in self._names
        elif action == sqlite3.SQLITE_CREATE_TABLE:
            allowed = NAME.fullmatch(first or "") is not None
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    def _working(self) -> int:
        """Interrupt a statement after WORK instructions."""
        self._work += WORK_STEP
        return int(self._work > WORK and not self._trusted)


def _shown(columns: list[str], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return "no rows"
    lines = [" | ".join(map(_cell, values)) for values in (columns, *rows[:ROWS_SHOWN])]
    return "\n".join(lines + (["..."] if len(rows) > ROWS_SHOWN else []))


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    return f"{value:.10g}" if isinstance(value, float) else " ".join(str(value).split())
