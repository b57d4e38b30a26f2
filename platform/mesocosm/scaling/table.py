"""The table of a fit: one row a trained cell. Errors name the file, line, column, value and fix."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.errors import UsageError, nearest
from mesocosm.scaling.forms import Array, Cells, Ints, Mask

REQUIRED = ("params", "data", "loss")
DISTINGUISHING = ("lr", "seed", "trunk", "unique")
"""Columns by which rows of equal params and data may differ."""
SAME = 0.02
"""Sizes, or data, that are relatively closer are equal: seeds differ by a batch."""
EPSILON = 1e-9
"""Relative rounding of counts in a text file."""
_INT64 = "write floats: a count beyond int64 turns negative"
NUMBERS = {
    "params": _INT64,
    "data": _INT64,
    "loss": "leave a run that failed out of the table",
    "unique": "write its data where nothing is repeated",
    "flops": _INT64,
    "weight": "leave out a row that must not count",
    "lr": "write the rate that the run was trained with",
}
"""Columns of numbers, and what to do about a value that is not one above 0."""
COLUMNS = (*NUMBERS, "seed", "trunk")

Notes = dict[str, str]
"""Warnings: code -> sentence."""


@dataclass(frozen=True)
class CellTable:
    """n rows to fit. Arrays are [n]."""

    name: str
    sha256: str
    rows: int
    """Rows of the file."""
    line: Ints
    params: Array
    data: Array
    loss: Array
    unique: Array | None
    flops: Array
    """The table's, or 6 N D."""
    flops_given: bool
    weight: Array
    series: Ints
    """Rows with one number differ in data only: one size and one trunk (or seed)."""
    group: Ints
    """The unit that is resampled together: a trunk, or the seeds of one cell."""
    by_trunk: bool
    notes: Notes

    def __len__(self) -> int:
        return len(self.line)

    @property
    def fresh(self) -> Mask:
        """Rows that repeat no data."""
        if self.unique is None:
            return np.ones(len(self), dtype=np.bool_)
        return self.data <= self.unique * (1 + EPSILON)

    @property
    def repeated(self) -> bool:
        """True if any row repeats its data."""
        return not self.fresh.all()

    def cells(self) -> Cells:
        data = np.log(self.data)
        unique = data if self.unique is None else np.minimum(data, np.log(self.unique))
        return Cells(np.log(self.params), data, unique)

    def take(self, at: NDArray[Any]) -> CellTable:
        """The rows at the indices, or where the mask is true."""
        names = ("line", "params", "data", "loss", "flops", "weight", "series", "group")
        rows = {name: getattr(self, name)[at] for name in names}
        return replace(self, unique=None if self.unique is None else self.unique[at], **rows)

    @classmethod
    def read(cls, path: str | Path) -> CellTable:
        """Read a CSV file with a header.

        Raises:
            UsageError: the file cannot be read, or a row is wrong.
        """
        file = Path(path)
        try:
            raw = file.read_bytes()
            text = raw.decode("utf-8-sig")
        except OSError as error:
            message = f"table {str(path)!r} cannot be read: {error.strerror}"
            raise UsageError(f"{message}; give the path of a CSV file") from error
        except UnicodeDecodeError as error:
            fix = f"give a CSV file with the columns {', '.join(REQUIRED)}"
            raise UsageError(f"table {str(path)!r} is not text; {fix}") from error
        reader = csv.reader(text.splitlines())
        header = [name.strip() for name in next(reader, [])]
        _check_header(file.name, header)
        every: list[_Row] = []
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            where = f"{file.name}, line {reader.line_num}"
            if len(fields) != len(header):
                counts = f"{len(fields)} fields for {len(header)} columns"
                raise UsageError(f"{where}: {counts}; write one field for each column")
            every.append(_parsed(where, reader.line_num, dict(zip(header, fields, strict=True))))
        if not every:
            raise UsageError(f"{file.name} has no rows; write one for each trained cell")
        rows, notes = _best_rates(every) if "lr" in header else (every, {})
        rows = _without_repeats(file.name, rows, header, notes)
        if "flops" not in header:
            notes["flops_6nd"] = "The table has no column `flops`: compute is 6 x params x data."
        trunks = "trunk" in header
        series = [(r.params, r.trunk if trunks else r.seed, r.repeated_unique) for r in rows]

        def column(name: str) -> NDArray[Any]:
            return np.array([getattr(row, name) for row in rows])

        return cls(
            name=file.name,
            sha256=hashlib.sha256(raw).hexdigest(),
            rows=len(every),
            line=column("line"),
            params=column("params"),
            data=column("data"),
            loss=column("loss"),
            unique=column("unique") if "unique" in header else None,
            flops=column("flops"),
            flops_given="flops" in header,
            weight=column("weight"),
            series=_numbered(series),
            group=_numbered([row.trunk if trunks else row.cell for row in rows]),
            by_trunk=trunks,
            notes=notes,
        )


@dataclass
class _Row:
    line: int
    unread: dict[str, str]
    """The columns that a fit does not read."""
    params: float
    data: float
    loss: float
    unique: float
    flops: float
    weight: float = 1.0
    lr: float = 0.0
    seed: str = ""
    trunk: str = ""

    @property
    def cell(self) -> tuple[float, float, float]:
        return self.params, self.data, min(self.unique, self.data)

    @property
    def repeated_unique(self) -> float:
        """U of a row that repeats its data, else 0: a curve of repeats has one U."""
        return self.unique if self.data > self.unique * (1 + EPSILON) else 0.0


def _check_header(name: str, header: list[str]) -> None:
    if len(header) == 1 and ";" in header[0]:
        message = f"{name} separates its columns by semicolons ({header[0]})"
        raise UsageError(f"{message}; write commas, and points in numbers")
    for column in REQUIRED:
        if column not in header:
            names = ", ".join(filter(None, header)) or "none"
            hint = nearest(column, header)
            message = f"{name} has no column {column!r} (it has {names}){hint}"
            raise UsageError(f"{message}; name it in the first line")
    for column in COLUMNS:
        if (count := header.count(column)) > 1:
            raise UsageError(f"{name} has {count} columns {column!r}; keep one")


def _parsed(where: str, line: int, fields: dict[str, str]) -> _Row:
    texts = {column: text.strip() for column, text in fields.items()}
    values: dict[str, Any] = {name: texts[name] for name in ("seed", "trunk") if name in texts}
    if values.get("trunk") == "":
        raise UsageError(f"{where}: trunk is empty; write one in every row, or drop the column")
    for column, fix in NUMBERS.items():
        if column not in texts:
            continue
        text = texts[column]
        try:
            value = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value <= 0:
            shown = f"{column}={text}" if text else f"{column} is empty and"
            raise UsageError(f"{where}: {shown} must be a finite number above 0; {fix}")
        values[column] = value
    params, data = values["params"], values["data"]
    counted = 6.0 * params * data
    if not math.isfinite(counted):
        product = f"6 x params={params:g} x data={data:g}"
        raise UsageError(f"{where}: {product} is beyond a float; correct the two")
    overflowed = (6 * int(params) * int(data) + 2**63) % 2**64 - 2**63
    flops = values.get("flops", counted)
    if counted >= 2.0**63 and math.isclose(flops, overflowed, rel_tol=1e-6):
        message = f"flops={flops:g} is 6 x params x data={counted:g} past the end of int64"
        raise UsageError(f"{where}: {message}; count in floats")
    unread = {column: text for column, text in texts.items() if column not in COLUMNS}
    return _Row(line, unread, **({"unique": data, "flops": counted} | values))


def _numbered(keys: Sequence[Hashable]) -> Ints:
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def _best_rates(rows: list[_Row]) -> tuple[list[_Row], Notes]:
    """Each cell's rows with the learning rate of the least mean loss, and a note about them."""
    rates: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        rates[row.cell][row.lr].append(row.loss)
    best = {
        cell: min(losses, key=lambda rate: (sum(losses[rate]) / len(losses[rate]), rate))
        for cell, losses in rates.items()
    }
    chosen = [row for row in rows if row.lr == best[row.cell]]
    several = {cell: losses for cell, losses in rates.items() if len(losses) > 1}
    if not several:
        return chosen, {}
    edge = sum(best[cell] in (min(losses), max(losses)) for cell, losses in several.items())
    sentence = (
        f"{len(several)} of {len(rates)} cells have several learning rates: the best (least mean"
        f" loss) of each is fitted and {len(rows) - len(chosen)} rows are set aside."
    )
    if edge:
        sentence += f" In {edge} of them the best is the least or the largest rate: try beyond it."
    return chosen, {"lr_best": sentence}


def _without_repeats(name: str, rows: list[_Row], header: list[str], notes: Notes) -> list[_Row]:
    """The rows without exact repeats, which are noted.

    Raises:
        UsageError: one cell has two losses, and no column that is read distinguishes them.
    """
    seen: dict[Any, _Row] = {}
    for row in rows:
        before = seen.setdefault((*row.cell, row.seed, row.trunk), row)
        if before.loss != row.loss:
            raise UsageError(f"{name}, {_conflict(before, row, header)}")
    if repeats := len(rows) - len(seen):
        notes["duplicate_rows"] = f"{repeats} rows repeat another exactly and count once."
    return list(seen.values())


def _conflict(before: _Row, row: _Row, header: list[str]) -> str:
    """Name two rows of one cell, and every column that could distinguish them."""
    present = [column for column in DISTINGUISHING if column in header]
    absent = [column for column in DISTINGUISHING if column not in header]
    differing = [f"{k!r}" for k, text in row.unread.items() if before.unread[k] != text]
    values = [f"params={row.params:g}", f"data={row.data:g}"]
    for column in present:
        value = getattr(row, column)
        text = f"{value:g}" if isinstance(value, float) else value or "empty"
        values.append(f"{column}={text}")
    message = (
        f"lines {before.line} and {row.line} give loss={before.loss:g} and loss={row.loss:g} for"
        f" one cell ({', '.join(values)})"
    )
    fixes = ["keep one"]
    if present:
        fixes.append(f"correct {_joined(present, 'or')}")
    if absent:
        fixes.append(f"add a column {_joined(absent, 'or')} that distinguishes them")
    if differing:
        message += f" and differ in {_joined(differing)}, which fit does not read"
        fixes.append(f"fit one table for each {_joined(differing)}")
    return f"{message}; {_joined(fixes, 'or')}"


def _joined(words: list[str], last: str = "and") -> str:
    """Join words as in: a, b and c."""
    return f" {last} ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])


def levels(values: Array) -> Ints:
    """Number the distinct values. Those within `SAME` of the next lower one are equal."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > SAME
    numbers = np.empty(len(values), dtype=np.int64)
    numbers[order] = np.cumsum(steps)
    return numbers
