"""The table of a fit: one row a trained cell. Whatever is wrong in it is a UsageError with file,
line, column, value and fix.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.errors import UsageError, nearest
from mesocosm.scaling.forms import Array, Cells
from mesocosm.scaling.law import Note

REQUIRED = ("params", "data", "loss")
NUMBERS = (*REQUIRED, "unique", "flops", "weight", "lr")
NAMES = ("seed", "trunk")
DISTINGUISHING = ("lr", "seed", "trunk", "unique")
"""Columns by which rows of equal params and data may differ."""
COLUMNS = (*NUMBERS, *NAMES)
SAME = 0.02
"""Sizes, or data, that are relatively nearer are one: another seed sees a batch more or less."""
_FIX = {
    "loss": "leave a run that failed out of the table",
    "flops": "a count beyond int64 turns negative: write floats",
    "params": "a count beyond int64 turns negative: write floats",
    "data": "a count beyond int64 turns negative: write floats",
    "unique": "write its data where nothing is repeated",
    "weight": "leave out a row that shall not count",
    "lr": "write the rate that the run was trained with",
}


@dataclass(frozen=True)
class Table:
    """n rows that may be fitted; arrays are [n]."""

    name: str
    sha256: str
    rows: int
    """In the file."""
    line: NDArray[np.int64]
    params: Array
    data: Array
    loss: Array
    unique: Array | None
    flops: Array
    """The table's, or 6 N D."""
    flops_given: bool
    weight: Array
    series: NDArray[np.int64]
    """Rows of one number differ in data only: one size and one trunk (or seed)."""
    group: NDArray[np.int64]
    """What is resampled together: a trunk, or the seeds of one cell."""
    by_trunk: bool
    notes: tuple[Note, ...]

    def __len__(self) -> int:
        return len(self.line)

    @property
    def repeated(self) -> bool:
        """Does any row see its data more than once."""
        return self.unique is not None and bool((self.data > self.unique * (1 + 1e-9)).any())

    def cells(self) -> Cells:
        data = np.log(self.data)
        return Cells(
            np.log(self.params),
            data,
            data if self.unique is None else np.minimum(data, np.log(self.unique)),
        )

    def take(self, at: NDArray[Any]) -> Table:
        kept = {
            name: getattr(self, name)[at]
            for name in ("line", "params", "data", "loss", "flops", "weight", "series", "group")
        }
        return replace(self, unique=None if self.unique is None else self.unique[at], **kept)

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """The rows of a CSV file with a header. Raises UsageError."""
        file = Path(path)
        try:
            raw = file.read_bytes()
            text = raw.decode("utf-8-sig")
        except OSError as error:
            raise UsageError(
                f"table {str(path)!r} cannot be read: {error.strerror}; give the path of a CSV file"
            ) from error
        except UnicodeDecodeError as error:
            raise UsageError(
                f"table {str(path)!r} is no text: give a CSV file with the columns"
                f" {', '.join(REQUIRED)}"
            ) from error
        reader = csv.reader(text.splitlines())
        header = [name.strip() for name in next(reader, [])]
        _check_header(file.name, header)
        rows: list[dict[str, Any]] = []
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise UsageError(
                    f"{file.name}, line {reader.line_num}: {len(fields)} fields for {len(header)}"
                    " columns; write one field a column"
                )
            row = dict(zip(header, fields, strict=True))
            unread = {column: row[column].strip() for column in header if column not in COLUMNS}
            rows.append(_parsed(file.name, reader.line_num, row) | {"unread": unread})
        if not rows:
            raise UsageError(
                f"{file.name} has no rows: write one a trained cell, with {', '.join(REQUIRED)}"
            )
        kept, notes = _best_rates(rows) if "lr" in header else (rows, [])
        kept, more = _once(file.name, kept, header)
        given = "flops" in header
        if not given:
            notes.append(
                Note(
                    code="flops_6nd",
                    sentence="The table has no column `flops`: compute is 6 x params x data.",
                )
            )
        trunks = "trunk" in header
        column = {
            name: np.array([row[name] for row in kept])
            for name in ("params", "data", "loss", "flops", "weight")
        }
        return cls(
            name=file.name,
            sha256=hashlib.sha256(raw).hexdigest(),
            rows=len(rows),
            line=np.array([row["line"] for row in kept]),
            unique=np.array([row["unique"] for row in kept]) if "unique" in header else None,
            flops_given=given,
            series=_numbered(
                [
                    (row["params"], row["trunk"] if trunks else row["seed"], _epoch_class(row))
                    for row in kept
                ]
            ),
            group=_numbered([row["trunk"] if trunks else _cell(row) for row in kept]),
            by_trunk=trunks,
            notes=(*notes, *more),
            **column,
        )


def _check_header(name: str, header: list[str]) -> None:
    for column in REQUIRED:
        if column not in header:
            if len(header) == 1 and ";" in header[0]:
                raise UsageError(
                    f"{name} separates its columns by semicolons ({header[0]}); write commas, and"
                    " points in numbers"
                )
            raise UsageError(
                f"{name} has no column {column!r} (it has"
                f" {', '.join(filter(None, header)) or 'none'}){nearest(column, header)}; name it"
                " in the first line"
            )
    for column in (*NUMBERS, *NAMES):
        if header.count(column) > 1:
            raise UsageError(f"{name} has {header.count(column)} columns {column!r}: keep one")


def _parsed(name: str, line: int, fields: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {"line": line, "weight": 1.0, "seed": "", "trunk": ""}
    for column, text in (
        (column, fields[column].strip()) for column in (*NUMBERS, *NAMES) if column in fields
    ):
        if column in NAMES:
            if not text and column == "trunk":
                raise UsageError(
                    f"{name}, line {line}: {column} is empty; write one for every row, or leave the"
                    " column out"
                )
            row[column] = text
            continue
        try:
            value = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value <= 0:
            what = f"{column}={text}" if text else f"{column} is empty and"
            raise UsageError(
                f"{name}, line {line}: {what} must be a finite number above 0; {_FIX[column]}"
            )
        row[column] = value
    counted = 6.0 * row["params"] * row["data"]
    if not math.isfinite(counted):
        raise UsageError(
            f"{name}, line {line}: 6 x params={row['params']:g} x data={row['data']:g} is beyond a"
            " float; correct the two"
        )
    if (
        "flops" in row
        and counted >= 2.0**63
        and math.isclose(
            row["flops"], _wrapped(6 * int(row["params"]) * int(row["data"])), rel_tol=1e-6
        )
    ):
        raise UsageError(
            f"{name}, line {line}: flops={row['flops']:g} is 6 x params x data={counted:g} past the"
            " end of int64; count in floats"
        )
    return {"unique": row["data"], "flops": counted} | row


def _wrapped(count: int) -> int:
    """What int64 makes of a count."""
    return (count + 2**63) % 2**64 - 2**63


def _cell(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["params"], row["data"], min(row["unique"], row["data"])


def _epoch_class(row: dict[str, Any]) -> float:
    """Rows of fresh data go on from each other; repeats of U only from repeats of the same U."""
    return row["unique"] if row["data"] > row["unique"] * (1 + 1e-9) else 0.0


def _numbered(keys: list[Any]) -> NDArray[np.int64]:
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def _best_rates(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Note]]:
    """Each cell's rows of the learning rate with the least mean loss, and a note that says so."""
    rates: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        rates[_cell(row)][row["lr"]].append(row["loss"])
    best = {
        cell: min(tried, key=lambda rate: (sum(tried[rate]) / len(tried[rate]), rate))
        for cell, tried in rates.items()
    }
    kept = [row for row in rows if row["lr"] == best[_cell(row)]]
    several = {cell: tried for cell, tried in rates.items() if len(tried) > 1}
    if not several:
        return kept, []
    edge = sum(best[cell] in (min(tried), max(tried)) for cell, tried in several.items())
    said = (
        f"{len(several)} of {len(rates)} cells were trained with several learning rates: the best"
        " (least mean loss) of each was kept, "
    )
    said += f"{len(rows) - len(kept)} rows set aside"
    said += (
        f"; in {edge} of them it is the least or the largest that was tried, so a better one may"
        " lie beyond."
        if edge
        else "."
    )
    return kept, [Note(code="lr_best", sentence=said)]


def _once(
    name: str, rows: list[dict[str, Any]], header: list[str]
) -> tuple[list[dict[str, Any]], list[Note]]:
    """The rows without exact repeats.

    Raises:
        UsageError: one cell has two losses, and no column that is read distinguishes them.
    """
    seen: dict[Any, dict[str, Any]] = {}
    for row in rows:
        before = seen.setdefault((*_cell(row), row["seed"], row["trunk"]), row)
        if before["loss"] != row["loss"]:
            raise UsageError(f"{name}, {_conflict(before, row, header)}")
    kept = list(seen.values())
    if len(kept) == len(rows):
        return kept, []
    return kept, [
        Note(
            code="duplicate_rows",
            sentence=f"{len(rows) - len(kept)} rows repeat another exactly and count once.",
        )
    ]


def _conflict(before: dict[str, Any], row: dict[str, Any], header: list[str]) -> str:
    """Name two rows of one cell, and every column that could distinguish them."""
    cell = f"params={row['params']:g}, data={row['data']:g}"
    present = [column for column in DISTINGUISHING if column in header]
    equal = [f"{column}={_text(row[column])}" for column in present]
    absent = [column for column in DISTINGUISHING if column not in header]
    differing = [f"{column!r}" for column in row["unread"] if _differs(before, row, column)]
    where = f"lines {before['line']} and {row['line']}"
    losses = f"loss={before['loss']:g} and loss={row['loss']:g}"
    message = f"{where} give {losses} for one cell ({', '.join([cell, *equal])})"
    if differing:
        message += f" and differ in {_listed(differing)}, which fit does not read"
    fixes = ["keep one"]
    if present:
        fixes.append(f"correct {_listed(present, 'or')}")
    if absent:
        fixes.append(f"add a column {_listed(absent, 'or')} that distinguishes them")
    if differing:
        fixes.append(f"fit one table for each {_listed(differing)}")
    return f"{message}; {_listed(fixes, 'or')}"


def _differs(one: dict[str, Any], other: dict[str, Any], column: str) -> bool:
    return bool(one["unread"][column] != other["unread"][column])


def _text(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else value or "empty"


def _listed(words: list[str], last: str = "and") -> str:
    """Join words as in: a, b and c."""
    return f" {last} ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])


def levels(values: Array) -> NDArray[np.int64]:
    """Which of the distinct ones each is; those within `SAME` of the one below are one."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > SAME
    found = np.empty(len(values), dtype=np.int64)
    found[order] = np.cumsum(steps)
    return found
