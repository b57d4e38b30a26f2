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
"""Columns of numbers, and the fix of a value that is not one above 0."""
COLUMNS = (*NUMBERS, "seed", "trunk", "tokenizer")

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
    tokenizer: str | None
    """The tokenizer whose codes the losses measure; None without a column `tokenizer`."""
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
            texts = {name: text.strip() for name, text in zip(header, fields, strict=True)}
            every.append(_parsed(where, reader.line_num, texts))
        if not every:
            raise UsageError(f"{file.name} has no rows; write one for each trained cell")
        tokenizer = _tokenizer(file.name, every) if "tokenizer" in header else None
        rows, notes = _best_rates(every) if "lr" in header else (every, {})
        rows = _without_repeats(file.name, rows, header, notes)
        if "flops" not in header:
            notes["flops_6nd"] = "The table has no column `flops`: compute is 6 x params x data."
        trunks = "trunk" in header
        names = ("line", "params", "data", "loss", "flops", "weight")
        return cls(
            name=file.name,
            sha256=hashlib.sha256(raw).hexdigest(),
            rows=len(every),
            **{name: np.array([getattr(row, name) for row in rows]) for name in names},
            unique=np.array([row.unique for row in rows]) if "unique" in header else None,
            flops_given="flops" in header,
            series=_numbered([row.series for row in rows]),
            group=_numbered([row.trunk if trunks else row.cell for row in rows]),
            by_trunk=trunks,
            tokenizer=tokenizer,
            notes=notes,
        )


@dataclass
class _Row:
    line: int
    texts: dict[str, str]
    """The fields by column."""
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
    def series(self) -> tuple[float, str, float]:
        """Size, trunk (or seed), and U where data repeat: a curve of repeats has one U."""
        repeats = self.data > self.unique * (1 + EPSILON)
        return self.params, self.trunk or self.seed, self.unique if repeats else 0.0


def _check_header(name: str, header: list[str]) -> None:
    if len(header) == 1 and ";" in header[0]:
        text = f"{name} separates its columns by semicolons ({header[0]})"
        raise UsageError(f"{text}; write commas, and points in numbers")
    for column in REQUIRED:
        if column not in header:
            names = ", ".join(filter(None, header)) or "none"
            text = f"{name} has no column {column!r} (it has {names}){nearest(column, header)}"
            raise UsageError(f"{text}; name it in the first line")
    for column in COLUMNS:
        if (count := header.count(column)) > 1:
            raise UsageError(f"{name} has {count} columns {column!r}; keep one")


def _parsed(where: str, line: int, texts: dict[str, str]) -> _Row:
    values: dict[str, Any] = {name: texts[name] for name in ("seed", "trunk") if name in texts}
    if values.get("trunk") == "":
        raise UsageError(f"{where}: trunk is empty; write one in every row, or drop the column")
    for column in (name for name in NUMBERS if name in texts):
        text = texts[column]
        try:
            value = math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value <= 0:
            shown = f"{column}={text}" if text else f"{column} is empty and"
            fix = NUMBERS[column]
            raise UsageError(f"{where}: {shown} must be a finite number above 0; {fix}")
        values[column] = value
    params, data = values["params"], values["data"]
    counted = 6.0 * params * data
    if not math.isfinite(counted):
        text = f"6 x params={params:g} x data={data:g}"
        raise UsageError(f"{where}: {text} is beyond a float; correct the two")
    overflowed = (6 * int(params) * int(data) + 2**63) % 2**64 - 2**63
    flops = values.get("flops", counted)
    if counted >= 2.0**63 and math.isclose(flops, overflowed, rel_tol=1e-6):
        text = f"flops={flops:g} is 6 x params x data={counted:g} past the end of int64"
        raise UsageError(f"{where}: {text}; count in floats")
    return _Row(line, texts, **({"unique": data, "flops": counted} | values))


def _tokenizer(name: str, rows: Sequence[_Row]) -> str | None:
    """The one tokenizer of all rows; None where all are empty. Raises UsageError where two rows
    differ: nats of different codes do not compare.
    """
    first = rows[0]
    value = first.texts["tokenizer"]
    for row in rows:
        if (other := row.texts["tokenizer"]) != value:
            raise UsageError(
                f"{name}, line {row.line}: tokenizer={other or 'empty'} must be"
                f" {value or 'empty'}, as in line {first.line}, because losses are"
                " comparable only under the same tokenizer; fit a table for each tokenizer"
            )
    return value or None


def _numbered(keys: Sequence[Hashable]) -> Ints:
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])


def _best_rates(rows: list[_Row]) -> tuple[list[_Row], Notes]:
    """Each cell's rows with the learning rate of the least mean loss, and a note about them."""
    losses: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        losses[row.cell][row.lr].append(row.loss)
    best = {c: min(rates, key=lambda x: (np.mean(rates[x]), x)) for c, rates in losses.items()}
    chosen = [row for row in rows if row.lr == best[row.cell]]
    several = {cell: rates for cell, rates in losses.items() if len(rates) > 1}
    if not several:
        return chosen, {}
    edge = sum(best[cell] in (min(rates), max(rates)) for cell, rates in several.items())
    text = (
        f"{len(several)} of {len(losses)} cells have several learning rates: the best (least mean"
        f" loss) of each is fitted and {len(rows) - len(chosen)} rows are set aside."
    )
    if edge:
        text += f" In {edge} of them the best is the least or the largest rate: try beyond it."
    return chosen, {"lr_best": text}


def _without_repeats(name: str, rows: list[_Row], header: list[str], notes: Notes) -> list[_Row]:
    """The rows without exact repeats, which are noted.

    Raises:
        UsageError: one cell has two losses, and no column that is read distinguishes them.
    """
    seen: dict[Any, _Row] = {}
    for row in rows:
        before = seen.setdefault((*row.cell, row.seed, row.trunk), row)
        if before.loss != row.loss:
            present = [column for column in DISTINGUISHING if column in header]
            absent = [column for column in DISTINGUISHING if column not in header]
            values = (f"{x}={row.texts[x] or 'empty'}" for x in ("params", "data", *present))
            unread = (x for x in header if x not in COLUMNS and before.texts[x] != row.texts[x])
            raise UsageError(
                f"{name}, lines {before.line} and {row.line} give loss={before.loss:g} and"
                f" loss={row.loss:g} for one cell ({', '.join(values)}); keep one, correct a column"
                f" ({', '.join(present) or 'params, data'}), add one that distinguishes them"
                f" ({', '.join(absent) or 'none is left'}), or fit a table for each value of a"
                f" column that fit does not read ({', '.join(unread) or 'none differs'})"
            )
    if repeats := len(rows) - len(seen):
        notes["duplicate_rows"] = f"{repeats} rows repeat another exactly and count once."
    return list(seen.values())


def levels(values: Array) -> Ints:
    """Number the distinct values. Those within `SAME` of the next lower one are equal."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > SAME
    numbers = np.empty(len(values), dtype=np.int64)
    numbers[order] = np.cumsum(steps)
    return numbers
