"""The operations by their names in a config, and the list of them at work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mesocosm.config import structured, to_dict
from mesocosm.data.curation import choose, duplicates, sensors, texts
from mesocosm.data.curation.scan import Scan
from mesocosm.data.curation.table import EpisodeTable, Operation, Step
from mesocosm.errors import UsageError, nearest

OPERATIONS: dict[str, type[Any]] = {
    "exact_duplicates": duplicates.ExactDuplicates,
    "near_duplicates": duplicates.NearDuplicates,
    "stuck": sensors.Stuck,
    "saturated": sensors.Saturated,
    "text_length": texts.TextLength,
    "text_novelty": texts.TextNovelty,
    "length": choose.Length,
    "return": choose.Return,
    "where": choose.Where,
    "balance": choose.Balance,
    "mix": choose.Mix,
    "failures": choose.Failures,
    "hold_out": choose.HoldOut,
}


LIMITS = {
    "bins": (1, math.inf),
    "steps": (1, math.inf),
    "most": (1, math.inf),
    "transitions": (1, math.inf),
    "tolerance": (0, 1),
    "share": (0, 1),
}
"""Bounds of parameters by name: at least the first number, less than the second."""


@dataclass(frozen=True)
class Named:
    name: str
    operation: Operation

    def params(self) -> dict[str, Any]:
        """All parameters, defaults too."""
        return to_dict(self.operation) if dataclasses.fields(self.operation) else {}  # type: ignore[arg-type]


def parse(operations: Sequence[Mapping[str, Any]]) -> list[Named]:
    """The operations of a config. Raises UsageError on a wrong name, key or value."""
    named = []
    for number, each in enumerate(operations):
        place = f"operations[{number}]"
        params = {str(key): value for key, value in each.items()}
        name = params.pop("op", None)
        if name not in OPERATIONS:
            fix = nearest(str(name), OPERATIONS)
            raise UsageError(
                f"{place}: op must be one of {', '.join(OPERATIONS)}, got {name!r}{fix}"
            )
        operation: Operation = structured(OPERATIONS[name], params, f"{place} ({name})")
        with _naming(number, name):
            for key, (low, high) in LIMITS.items():
                value = getattr(operation, key, None)
                if value is not None and not low <= value < high:
                    raise UsageError(f"{key} must be in [{low}, {high}), got {value}")
            operation.check()
        named.append(Named(name, operation))
    return named


def work(
    table: EpisodeTable, scan: Scan, operations: Sequence[Named], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the operations in order, and return each one's part of the report.

    Raises:
        UsageError: An operation leaves nothing to train on.
    """
    report = []
    for number, named in enumerate(operations):
        step = Step(table, scan, number + 1, named.name)
        with _naming(number, named.name):
            named.operation.run(step)
            entry = step.close(named.params())
            if not entry["splits"]["train"]["episodes"]:
                raise UsageError(
                    f"nothing to train on is left of {entry['in']['episodes']} episodes; loosen it,"
                    " or hold out less"
                )
        report.append(entry)
        say(sentence(entry))
    return report


def sentence(entry: Mapping[str, Any]) -> str:
    dropped, back, after = entry["dropped"], entry["put_back"], entry["kept"]
    counts = {"episodes cut short": entry["cut"], "episodes put back": back["episodes"]}
    counts |= {f"moved to {name}": size["episodes"] for name, size in entry["moved_to"].items()}
    parts = [f"dropped {dropped['episodes']} episodes, {dropped['transitions']} transitions"]
    parts += [f"{count} {name}" for name, count in counts.items() if count]
    parts.append(f"{after['episodes']} episodes, {after['transitions']} transitions are left")
    return f"{entry['operation']}. {entry['op']}: {'; '.join(parts)}"


@contextmanager
def _naming(number: int, name: str) -> Iterator[None]:
    """Put the operation before the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"operations[{number}] ({name}): {error}") from error
