"""The operations by their names in a config, and the list of them at work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from mesocosm.config import structured, to_dict
from mesocosm.data.curation import choose, duplicates, sensors
from mesocosm.data.curation.scan import Scan
from mesocosm.data.curation.table import Step, Table
from mesocosm.errors import UsageError, nearest


class Operation(Protocol):
    """A dataclass, whose fields are its parameters."""

    def check(self) -> None:
        """Raise UsageError on the first parameter with a wrong value."""

    def run(self, step: Step) -> None:
        """Drop, cut, put back or hold out. Raises UsageError where the data lack what a parameter
        names.
        """


OPERATIONS: dict[str, type[Any]] = {
    "exact_duplicates": duplicates.ExactDuplicates,
    "near_duplicates": duplicates.NearDuplicates,
    "stuck": sensors.Stuck,
    "saturated": sensors.Saturated,
    "length": choose.Length,
    "return": choose.Return,
    "where": choose.Where,
    "balance": choose.Balance,
    "mix": choose.Mix,
    "failures": choose.Failures,
    "hold_out": choose.HoldOut,
}


@dataclass(frozen=True)
class Named:
    name: str
    operation: Operation

    def params(self) -> dict[str, Any]:
        """All parameters, defaults too."""
        return to_dict(self.operation) if dataclasses.fields(self.operation) else {}  # type: ignore[arg-type]


def parse(operations: Sequence[Mapping[str, Any]]) -> list[Named]:
    """The operations of a config.

    Raises:
        UsageError: a name, key or value is wrong; names the operation's place in the list.
    """
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
            operation.check()
        named.append(Named(name, operation))
    return named


def work(
    table: Table, scan: Scan, operations: Sequence[Named], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the operations in order.

    Returns:
        Each one's part of the report.

    Raises:
        UsageError: an operation leaves nothing to train on.
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
    dropped, back, kept = entry["dropped"], entry["put_back"], entry["kept"]
    parts = [f"dropped {dropped['episodes']} episodes, {dropped['transitions']} transitions"]
    if entry["cut"]:
        parts.append(f"{entry['cut']} episodes cut short")
    if back["episodes"]:
        parts.append(f"{back['episodes']} episodes put back")
    parts += [
        f"{size['episodes']} moved to {name}"
        for name, size in entry["moved_to"].items()
        if size["episodes"]
    ]
    return (
        f"{entry['operation']}. {entry['op']}: {'; '.join(parts)}; {kept['episodes']} episodes,"
        f" {kept['transitions']} transitions are left"
    )


@contextmanager
def _naming(number: int, name: str) -> Iterator[None]:
    """Put the operation before the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"operations[{number}] ({name}): {error}") from error
