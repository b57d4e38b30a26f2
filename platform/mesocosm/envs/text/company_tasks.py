"""Tasks in a company: each kind draws a task and the one state that solves it.

A state is a multiset of facts: folders, files with their contents, tables, rows, and the submitted
answer. A task's score is the share of the required changes of facts that were made. It is 0 if
anything else changed, because most changes cannot be undone.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mesocosm.envs.text.company import CITIES, SETTINGS, STATUSES, Company, text
from mesocosm.envs.text.database import Database, Table
from mesocosm.envs.text.shell import Shell

Facts = Counter[tuple[Any, ...]]

STATEMENTS = {
    "find": "Submit the extension of {name}. The staff lists are in /staff.",
    "aggregate": "Submit the {measure} of the {status} orders of customers in {city}.",
    "fix": "Set {key} to {value} in the file in /config that has it.",
    "update": "{name} has moved, a memo in /inbox tells where. Correct the table customers.",
    "migrate": "Insert the rows of {path} into the table {table}, then remove the file.",
    "clean": "Remove each log in /logs that has no line with {word}, and no other.",
    "report": "Write the number of {status} orders into {path}, in one line.",
}
"""The statement of each kind of task."""
PATTERNS = {
    kind: re.compile("Task: " + re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(statement)))
    for kind, statement in STATEMENTS.items()
}
MEASURES = {"total amount": "SUM", "largest amount": "MAX", "smallest amount": "MIN"}
"""The SQL function of each measure of the kind aggregate."""


@dataclass(frozen=True)
class Assignment:
    """A task as its statement tells it: its kind and what fills the statement's gaps."""

    kind: str
    gaps: dict[str, str]

    @property
    def statement(self) -> str:
        """The sentence that the first text has."""
        return STATEMENTS[self.kind].format(**self.gaps)


@dataclass(frozen=True)
class Task:
    """A company, an assignment in it, and the facts that must hold at the end."""

    company: Company
    assignment: Assignment
    answer: str
    """The text to submit; "" where it does not matter."""
    expected: Company
    """The company at the end."""

    def score(self, final: Facts) -> float:
        """The share of required changes that were made; 0 if anything else changed."""
        initial = facts(self.company)
        required = changes(initial, facts(self.expected, self.answer))
        made = changes(initial, final)
        if made - required:
            return 0.0
        return made.total() / required.total()


def parse_assignment(first_text: str) -> Assignment | None:
    """The assignment that a first text tells; None where it tells none."""
    for kind, pattern in PATTERNS.items():
        if match := pattern.search(first_text):
            return Assignment(kind, match.groupdict())
    return None


def facts(company: Company, answer: str = "") -> Facts:
    """The facts of a company and an answer."""
    database = Database(company.tables)
    try:
        return Shell(company.files).facts() + database.facts() + answer_fact(answer)
    finally:
        database.close()


def answer_fact(answer: str) -> Facts:
    """The fact that an answer was submitted; none for an empty answer."""
    return Counter([("answer", answer)] if answer else [])


def changes(before: Facts, after: Facts) -> Facts:
    """The facts that came and went, marked so."""
    came, went = after - before, before - after
    marked: Facts = Counter()
    for sign, part in (("+", came), ("-", went)):
        marked.update({(sign, *fact): count for fact, count in part.items()})
    return marked


def draw_task(company: Company, rng: random.Random, kind: str) -> Task:
    """Draw a task of a kind in a company, which gets the files that the task needs."""
    return DRAWS[kind](company, rng)


def _find(company: Company, rng: random.Random) -> Task:
    lists = [contents for path, contents in company.files.items() if path.startswith("/staff/")]
    name, extension, _ = rng.choice("".join(lists).splitlines()).split(", ")
    return _task(company, "find", {"name": name}, answer=extension.removeprefix("ext "))


def _aggregate(company: Company, rng: random.Random) -> Task:
    cities = {row["id"]: str(row["city"]) for row in company.rows("customers")}
    order = rng.choice(company.rows("orders"))
    city, status = cities[order["customer"]], str(order["status"])
    amounts = [
        int(row["amount"])
        for row in company.rows("orders")
        if cities[row["customer"]] == city and row["status"] == status
    ]
    measure = rng.choice(list(MEASURES))
    functions: dict[str, Callable[[list[int]], int]] = {"SUM": sum, "MAX": max, "MIN": min}
    value = functions[MEASURES[measure]](amounts)
    gaps = {"measure": measure, "status": status, "city": city}
    return _task(company, "aggregate", gaps, answer=str(value))


def _fix(company: Company, rng: random.Random) -> Task:
    key = rng.choice(list(SETTINGS))
    pattern = re.compile(rf"^{key} = (\w+)$", re.MULTILINE)
    path = next(path for path, contents in company.files.items() if pattern.search(contents))
    match = pattern.search(company.files[path])
    assert match is not None
    value = rng.choice([value for value in SETTINGS[key] if value != match[1]])
    fixed = pattern.sub(f"{key} = {value}", company.files[path])
    files = {**company.files, path: fixed}
    return _task(company, "fix", {"key": key, "value": value}, files=files)


def _update(company: Company, rng: random.Random) -> Task:
    customer = rng.choice(company.rows("customers"))
    city = rng.choice([city for city in CITIES if city != customer["city"]])
    memo = ["From: the front desk", f"{customer['name']} moved from {customer['city']} to {city}."]
    company = replace(company, files={**company.files, "/inbox/memo-3.txt": text(memo)})
    table = company.tables["customers"]
    rows = [(*row[:2], city) if row[0] == customer["id"] else row for row in table.rows]
    tables = {**company.tables, "customers": Table(table.columns, rows)}
    return _task(company, "update", {"name": str(customer["name"])}, tables=tables)


def _migrate(company: Company, rng: random.Random) -> Task:
    name = rng.choice(["orders", "products"])
    table = company.tables[name]
    first = int(table.rows[-1][0]) + 1
    rows: list[tuple[Any, ...]] = []
    for k in range(rng.randint(2, 3)):
        item = rng.choice(company.rows("products"))["item"]
        if name == "orders":
            customer = rng.choice(company.rows("customers"))["id"]
            rows.append((first + k, customer, item, 5 * rng.randint(2, 80), rng.choice(STATUSES)))
        else:
            rows.append((first + k, f"new {item}", rng.randint(3, 60)))
    path = f"/inbox/{name}.csv"
    lines = [",".join(table.columns), *(",".join(map(str, row)) for row in rows)]
    before = replace(company, files={**company.files, path: text(lines)})
    tables = {**company.tables, name: Table(table.columns, [*table.rows, *rows])}
    return _task(before, "migrate", {"path": path, "table": name}, company.files, tables)


def _clean(company: Company, rng: random.Random) -> Task:
    logs = [path for path in company.files if path.startswith("/logs/")]
    words = [
        word
        for word in ("ERROR", "WARN", "INFO")
        if 0 < sum(word in company.files[path] for path in logs) < len(logs)
    ]
    if words:
        word = rng.choice(words)
    else:  # every log is alike: give one of them an error
        word, path = "ERROR", rng.choice(logs)
        calm = {log: company.files[log].replace("ERROR", "WARN") for log in logs}
        files = {**company.files, **calm, path: company.files[path] + "23:10 ERROR disk full\n"}
        company = replace(company, files=files)
    remaining = {
        path: contents
        for path, contents in company.files.items()
        if path not in logs or word in contents
    }
    return _task(company, "clean", {"word": word}, remaining)


def _report(company: Company, rng: random.Random) -> Task:
    status = rng.choice(STATUSES)
    number = sum(row["status"] == status for row in company.rows("orders"))
    path = f"/reports/{status}.txt"
    files = {**company.files, path: text([str(number)])}
    return _task(company, "report", {"status": status, "path": path}, files)


def _task(
    company: Company,
    kind: str,
    gaps: dict[str, str],
    files: dict[str, str] | None = None,
    tables: dict[str, Table] | None = None,
    answer: str = "",
) -> Task:
    """A task whose end has these files, tables and this answer, and is as the start otherwise."""
    expected = Company(company.name, files or company.files, tables or company.tables)
    return Task(company, Assignment(kind, gaps), answer, expected)


DRAWS: dict[str, Callable[[Company, random.Random], Task]] = {
    "find": _find,
    "aggregate": _aggregate,
    "fix": _fix,
    "update": _update,
    "migrate": _migrate,
    "clean": _clean,
    "report": _report,
}
KINDS = tuple(DRAWS)
"""All kinds of task."""
