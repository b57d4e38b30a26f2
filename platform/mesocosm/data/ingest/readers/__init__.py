"""The formats of logs, one module each, which registry.py lists:

    head(path) -> Table              the first rows, for their columns and types
    pieces(path) -> [(begin, end)]   parts that can be read separately, in order
    read(piece, columns) -> Tables   those columns of a piece's rows, in order, in batches
    about(path) -> About             optional: what the format adds to the documented schema

Formats of traces of language agents (`traces.TraceReader`) and `pictures` take options too:
head(path, options).
The tables have the documented schema. An episode that cannot be read is rows of its episode and
step, with a message in the column PROBLEM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium

PROBLEM = "mesocosm problem"
BATCH_ROWS = 1 << 14
BATCH_BYTES = 1 << 25


@dataclass(frozen=True)
class About:
    """The additions of a format to the documented schema."""

    columns: dict[str, str] = field(default_factory=dict)
    """Schema's name -> the format's own name."""
    filled: dict[str, str] = field(default_factory=dict)
    """Columns that the file lacks and the reader adds, with an explanation."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks on columns, by the schema's names."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Columns that are not read, by the format's names, and why."""
    done_only: bool = False
    """The logs do not say whether a time limit ended an episode."""
    marks_success: bool = False
    """True if `success` is a flag of each step rather than of the episode."""
    spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]] | None = None
    """(observation space, action space) that the logs state."""
    files: list[str] | None = None
    """The files of a source that is a folder."""


@dataclass(frozen=True)
class LogPiece:
    """A part of a source that can be read separately."""

    format: str
    source: int
    """Position of its file among all."""
    path: str
    begin: int
    end: int
    """Row groups, bytes or episodes, as the format counts."""
    number: int = 0
    """Position among all pieces."""
    skip: int = 0
    """Rows at its beginning that are not read."""
    traces: Any = None
    """`traces.TraceOptions`, with the names of columns."""
