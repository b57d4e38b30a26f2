"""The texts of the company's shell, their fields, and the commands that make sense after them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mesocosm.envs.text.company_tasks import MEASURES, Assignment, parse_assignment
from mesocosm.envs.text.database import Database
from mesocosm.envs.text.shell import Shell

LONGEST_TEXT, LONGEST_COMMAND = 1_500, 300
"""Lengths in characters, of the spaces."""
OUTPUT, LINE, FOOTER = 400, 100, 200
"""The most characters of an output, of one of its lines, and of a line of the footer."""
NO_OUTPUT = "(no output)"
FOLDERS = {"find": "/staff", "fix": "/config", "update": "/inbox", "clean": "/logs"}
"""The folder whose files a kind of task is about."""

_FILE = re.compile(r"^(/[\w./-]+\.\w+)$", re.MULTILINE)
_READ = re.compile(r"(?:cat|head|wc|grep .*) (/\S+)$")
_FOLDER = re.compile(r"^Folder (/\S*): ?(.*)$", re.MULTILINE)
_TABLES = re.compile(r"^Tables: ?(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ShellView:
    """The fields of a text; "" or () where it does not say."""

    command: str
    output: str
    folder: str
    names: tuple[str, ...]
    """The names in the current folder; those of folders end in a slash."""
    tables: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The absolute paths of the files that the output or the footer lists."""
        here = [posixpath.join(self.folder, name) for name in self.names if name[-1:] != "/"]
        return tuple(dict.fromkeys([*_FILE.findall(self.output), *here]))

    @property
    def read(self) -> str:
        """The path of the file that the command read; "" for other commands."""
        match = _READ.match(self.command)
        return match[1] if match else ""


def first_text(company: str, assignment: Assignment, footer: str) -> str:
    """The observation of the reset."""
    return (
        f"You work in a shell at {company}. Commands: ls, cd, find, cat, head, wc, grep, echo, cp,"
        " mv, rm, mkdir, sed, sql, submit. Each has a price. Changes are final.\n"
        f"Task: {assignment.statement}\n{footer}"
    )


def later_text(command: str, output: str, footer: str) -> str:
    """The observation of a step."""
    echo = printable(" ".join(command.split()))[:LONGEST_COMMAND]
    return f"$ {echo}\n{capped(output) or NO_OUTPUT}\n{footer}"


def footer(shell: Shell, database: Database, spent: float) -> str:
    """The last lines of each text: the current folder, the tables, and sums.

    Args:
        shell: The files.
        database: The tables.
        spent: The sum of prices so far.
    """
    tables = database.schema().items()
    listed = " ".join(f"{name}({', '.join(columns)})" for name, columns in tables)
    lines = (
        f"Folder {shell.folder}: {' '.join(shell.names(shell.folder))}",
        f"Tables: {listed}",
        f"In all {len(shell.files)} files and {database.count()} rows. Spent: {spent:.2f}",
    )
    return "\n".join(printable(line)[:FOOTER].rstrip() for line in lines)


def capped(output: str) -> str:
    """The first lines of an output, in printable ASCII, and how many more there are."""
    lines = [printable(line)[:LINE] for line in output.splitlines()]
    shown, size = list[str](), 0
    for line in lines:
        size += len(line) + 1
        if size > OUTPUT:
            break
        shown.append(line)
    if len(shown) < len(lines):
        shown.append(f"... {len(lines) - len(shown)} more lines")
    return "\n".join(shown)


def printable(text: str) -> str:
    """The text with a question mark for each character that is not printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def parse_view(text: str) -> ShellView:
    """The fields of a text, also of one that breaks the format."""
    folder, tables = _FOLDER.search(text), _TABLES.search(text)
    command, output = "", ""
    if text.startswith("$ "):
        command, _, rest = text[2:].partition("\n")
        output = rest.partition("\nFolder ")[0]
    names = [] if tables is None else re.findall(r"(\w+)\(", tables[1])
    return ShellView(
        command=command,
        output="" if output == NO_OUTPUT else output,
        folder=folder[1] if folder else "",
        names=tuple(folder[2].split()) if folder else (),
        tables=tuple(names),
    )


def candidates(first_text: str, text: str) -> list[str]:
    """Commands that make sense after `text`, from texts alone.

    Few of them fail: a file or table that a text shows may be gone later.

    Args:
        first_text: The observation of the reset, which has the task.
        text: The latest observation; the first one itself at the start.
    """
    view, assignment = parse_view(text), parse_assignment(first_text)
    folders = [posixpath.join(view.folder, n[:-1]) for n in view.names if n.endswith("/")]
    commands = [f"find {folder}" for folder in folders]
    commands += [f"cd {folder}" for folder in folders]
    if view.folder != "/":
        commands.append("cd /")
    commands += [f"cat {path}" for path in view.files]
    commands += [f"sql SELECT * FROM {table}" for table in view.tables]
    if assignment is not None:
        commands += _specific(assignment, view)
    commands += [f"rm {path}" for path in (*view.files, *filter(None, [view.read]))]
    return list(dict.fromkeys([*commands, "submit done"]))


def _specific(assignment: Assignment, view: ShellView) -> list[str]:
    """The commands that the kind of task suggests; some of them are wrong."""
    gaps, kind = assignment.gaps, assignment.kind
    folder = FOLDERS.get(kind, "")
    files = [path for path in view.files if posixpath.dirname(path) == folder]
    if kind == "find":
        names = [f'grep "{gaps["name"]}" {path}' for path in files]
        return names + [f"submit {value}" for value in re.findall(r"ext (\d+)", view.output)]
    if kind == "aggregate":
        queries = [aggregate_query(gaps, function) for function in MEASURES.values()]
        return queries + [f"submit {value}" for value in number(view)]
    if kind == "fix":
        lines = re.findall(rf"^(\w*{re.escape(gaps['key'])}) = (\w+)$", view.output, re.MULTILINE)
        return [sed(key, old, gaps["value"], view.read) for key, old in lines if view.read]
    if kind == "update":
        name = gaps["name"]
        moves = re.findall(rf"^{re.escape(name)} moved from (\w+) to (\w+)\.", view.output, re.M)
        greps = [f'grep "{name}" {path}' for path in files]
        return greps + [relocate(name, city) for cities in moves for city in cities]
    if kind == "migrate":
        path, table = gaps["path"], gaps["table"]
        rows = csv_rows(view.output) if view.read == path else []
        return [f"cat {path}", *([insert(table, rows)] if rows else []), f"rm {path}"]
    if kind == "clean":
        return [f"grep {gaps['word']} {path}" for path in files]
    writes = [f"echo {value} > {gaps['path']}" for value in number(view)]
    return [count_query(gaps["status"]), *writes]


def aggregate_query(gaps: Mapping[str, str], function: str | None = None) -> str:
    """The query for the kind aggregate."""
    function = function or MEASURES[gaps["measure"]]
    return (
        f"sql SELECT {function}(amount) FROM orders JOIN customers ON customers.id ="
        f" orders.customer WHERE city = '{gaps['city']}' AND status = '{gaps['status']}'"
    )


def count_query(status: str) -> str:
    """The query for the kind report."""
    return f"sql SELECT COUNT(*) FROM orders WHERE status = '{status}'"


def relocate(name: str, city: str) -> str:
    """The statement that corrects a customer's city."""
    return f"sql UPDATE customers SET city = '{city}' WHERE name = '{name}'"


def sed(key: str, old: str, new: str, path: str) -> str:
    """The command that changes a setting."""
    return f"sed -i 's/{key} = {old}/{key} = {new}/' {path}"


def insert(table: str, rows: Sequence[Sequence[str]]) -> str:
    """The statement that inserts rows, given as texts."""
    literals = [", ".join(v if v.isdigit() else f"'{v}'" for v in row) for row in rows]
    return f"sql INSERT INTO {table} VALUES {', '.join(f'({row})' for row in literals)}"


def csv_rows(output: str) -> list[list[str]]:
    """The rows of a CSV file below its header."""
    lines = [line.split(",") for line in output.splitlines()]
    return [row for row in lines[1:] if len(row) == len(lines[0])]


def number(view: ShellView) -> list[str]:
    """The single number of a query's result, as a list of one; else empty."""
    lines = view.output.splitlines()
    single = view.command.startswith("sql ") and len(lines) == 2 and lines[1].isdigit()
    return lines[1:] if single else []
