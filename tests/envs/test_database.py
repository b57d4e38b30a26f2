"""The database of the company: SQL that works, SQL that is refused, and limits."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mesocosm.envs.text.database import PAGES, ROWS_SHOWN, Database, SqlError, Table


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[Database]:
    monkeypatch.chdir(str(tmp_path))
    people = Table({"id": "INTEGER", "name": "TEXT"}, [(1, "Ada"), (2, "Bo"), (3, None)])
    result = Database({"people": people, "pets": Table({"owner": "INTEGER"}, [(1,), (1,)])})
    yield result
    result.close()


@pytest.mark.parametrize(
    ("statement", "text", "writes"),
    [
        ("SELECT * FROM people", "id | name\n1 | Ada\n2 | Bo\n3 | NULL", False),
        ("select count(*) n, max(name) from people", "n | max(name)\n3 | Bo", False),
        ("SELECT name FROM people JOIN pets ON owner = id GROUP BY id", "name\nAda", False),
        ("SELECT 1 WHERE 0", "no rows", False),
        ("SELECT 0.1 + 0.2, round(avg(id), 1) FROM people", None, False),
        ("SELECT name FROM people WHERE name LIKE 'A%'", "name\nAda", False),
        ("SELECT group_concat(name) g FROM people", "g\nAda,Bo", False),
        ("INSERT INTO people VALUES (4, 'Cy'), (5, 'Di')", "2 rows changed", True),
        ("UPDATE people SET name = 'Al' WHERE id = 1", "1 row changed", True),
        ("UPDATE people SET name = 'Al' WHERE id = 9", "0 rows changed", True),
        ("UPDATE people SET name = 'Al' RETURNING id", "id\n1\n2\n3", True),
        ("DELETE FROM pets", "2 rows changed", True),
        ("DROP TABLE pets", "0 rows changed", True),
        ("CREATE TABLE q (x INTEGER)", "0 rows changed", True),
        ("CREATE TABLE q AS SELECT * FROM people", None, True),
    ],
)
def test_statements(database: Database, statement: str, text: str | None, writes: bool) -> None:
    before = database.facts()
    result = database.run(statement)
    assert text is None or result.text == text
    assert result.writes == writes
    if not writes:
        assert database.facts() == before


REFUSED = (
    "ATTACH ':memory:' AS x", "ATTACH '/etc/passwd' AS x", "DETACH main", "VACUUM",
    "VACUUM INTO 'copy.db'", "PRAGMA database_list", "PRAGMA writable_schema = 1",
    "SELECT * FROM pragma_database_list", "SELECT * FROM pragma_table_info('people')",
    "SELECT load_extension('x')", "SELECT readfile('/etc/passwd')", "SELECT writefile('f', 'x')",
    "SELECT fts3_tokenizer('simple')", "SELECT random()", "SELECT hex(randomblob(9))",
    "SELECT current_timestamp", "SELECT datetime('now')", "SELECT julianday()",
    "SELECT strftime('%s', 'now')", "SELECT sqlite_version()", "SELECT changes()",
    "SELECT zeroblob(1000000000)", "SELECT printf('%.*c', 100000000, 'x')", "SELECT 1; SELECT 2",
    "BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT s", "CREATE VIEW v AS SELECT 1",
    "CREATE TEMP TABLE q (x)", "CREATE INDEX i ON people (id)", "REINDEX", "ANALYZE",
    "CREATE TRIGGER t AFTER INSERT ON pets BEGIN DELETE FROM people; END",
    "CREATE VIRTUAL TABLE v USING fts5(a)", "CREATE VIRTUAL TABLE v USING csv(filename='/etc/a')",
    'CREATE TABLE "a""b" (x)', "CREATE TABLE sqlite_x (x)", "ALTER TABLE pets ADD COLUMN q",
    "CREATE TABLE q (x DEFAULT CURRENT_TIMESTAMP, y CHECK (random() > 0))",
    "UPDATE sqlite_master SET sql = 'x'", "DELETE FROM sqlite_master", "EXPLAIN SELECT 1",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    "SELECT * FROM json_each('[1]')", "SELECT * FROM dbstat", "SELECT * FROM generate_series(1, 9)",
    "SELECT '\0'", "", "  ", "-- a", "nonsense", "SELECT", "SELECT * FROM nobody",
    "SELECT nothing FROM people", "INSERT INTO people VALUES (1)", "SELECT " + "1," * 40 + "1",
    "SELECT '" + "x" * 2000 + "'", "SELECT " + "+".join("1" * 60),
)  # fmt: skip


@pytest.mark.parametrize("statement", REFUSED, ids=lambda s: repr(s[:40]))
def test_refused_statements_change_nothing(
    database: Database, statement: str, tmp_path: object
) -> None:
    before = database.facts()
    with pytest.raises(SqlError):
        database.run(statement)
    assert database.facts() == before
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]
    assert database.run("SELECT id FROM people WHERE id = 1").text == "id\n1"


def test_work_is_bounded(database: Database) -> None:
    database.run(f"INSERT INTO pets VALUES {', '.join(['(1)'] * 40)}")
    join = ", ".join(f"pets p{k}" for k in range(8))
    before, began = database.facts(), time.process_time()
    for statement in (
        f"SELECT COUNT(*) FROM {join} WHERE p0.owner + p1.owner + p7.owner > 100",
        f"INSERT INTO pets SELECT p0.owner FROM {join}",
        f"DELETE FROM people WHERE id IN (SELECT COUNT(*) FROM {join})",
    ):
        with pytest.raises(SqlError, match=r"takes too long|full"):
            database.run(statement)
    assert database.facts() == before
    assert time.process_time() - began < 2


def test_memory_is_bounded(database: Database) -> None:
    row = f"('{'x' * 900}')"
    database.run("CREATE TABLE q (x TEXT)")
    with pytest.raises(SqlError, match="full"):
        for _ in range(PAGES * 5):
            database.run(f"INSERT INTO q VALUES {row}")
    with pytest.raises(SqlError, match="too big"):
        database.run("SELECT group_concat(x) FROM q")


def test_a_long_result_is_cut(database: Database) -> None:
    database.run(f"INSERT INTO pets VALUES {', '.join(['(7)'] * 40)}")
    lines = database.run("SELECT * FROM pets").text.splitlines()
    assert len(lines) == ROWS_SHOWN + 2 and lines[-1] == "..."


def test_facts_count_equal_rows_and_new_tables(database: Database) -> None:
    assert database.facts()["row", "pets", 1] == 2
    assert database.count() == 5
    database.run("CREATE TABLE q (x TEXT)")
    assert database.facts()["table", "q", ("x",)] == 1
    database.run("DROP TABLE pets")
    assert not any("pets" in fact for fact in database.facts())
