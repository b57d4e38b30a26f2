"""The operations by the name that a config gives them, and the whole list of them at work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mesocosm.config import structured, to_dict
from mesocosm.data.curation import broken, choose
from mesocosm.data.curation.scan import Scan
from mesocosm.data.curation.table import Step, Table
from mesocosm.errors import UsageError, nearest


class Operation(Protocol):
    """A dataclass, whose fields are its parameters."""

    def check(self) -> None:
        """Raise UsageError on the first value that cannot be meant."""

    def run(self, step: Step) -> None:
        """Drop, cut, put back or hold out. Raises UsageError where the data has not what a
        parameter names.
        """


OPERATIONS: dict[str, type[Any]] = {
    "exact_duplicates": broken.ExactDuplicates,
    "near_duplicates": broken.NearDuplicates,
    "stuck": broken.Stuck,
    "saturated": broken.Saturated,
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
        """All of them, defaults too."""
        return to_dict(self.operation) if dataclasses.fields(self.operation) else {}  # type: ignore[arg-type]


def parse(said: Sequence[Mapping[str, Any]]) -> list[Named]:
    """Raises UsageError naming the operation's place in the list, the key and the nearest that
    there is.
    """
    found = []
    for number, each in enumerate(said, 1):
        where = f"operations[{number - 1}]"
        params = {str(key): value for key, value in each.items()}
        name = params.pop("op", None)
        if name is None:
            raise UsageError(f"{where} names no operation; give op, one of {', '.join(OPERATIONS)}")
        if name not in OPERATIONS:
            fix = nearest(str(name), OPERATIONS) or f"; there are {', '.join(OPERATIONS)}"
            raise UsageError(f"{where}: unknown operation {name!r}{fix}")
        operation: Operation = structured(OPERATIONS[name], params, f"{where} ({name})")
        with _said_of(where, name):
            operation.check()
        found.append(Named(name, operation))
    return found


def work(
    table: Table, scan: Scan, operations: Sequence[Named], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All of them in order; each one's part of the report. Raises UsageError where one leaves
    nothing to train on.
    """
    report = []
    for number, named in enumerate(operations, 1):
        step = Step(table, scan, number, named.name)
        with _said_of(f"operations[{number - 1}]", named.name):
            named.operation.run(step)
            entry = step.close(named.params())
            if not entry["splits"]["train"]["episodes"]:
                before = f"{entry['in']['episodes']} episodes went in"
                raise UsageError(
                    f"nothing to train on is left ({before}); loosen it, or hold out less"
                )
        report.append(entry)
        say(sentence(entry))
    return report


def sentence(entry: Mapping[str, Any]) -> str:
    dropped, back, kept = entry["dropped"], entry["put_back"], entry["kept"]
    said = [f"dropped {dropped['episodes']} episodes, {dropped['transitions']} transitions"]
    if entry["cut"]:
        said.append(f"{entry['cut']} episodes cut short")
    if back["episodes"]:
        said.append(f"{back['episodes']} episodes put back")
    if moved := [
        f"{size['episodes']} moved to {name}"
        for name, size in entry["moved_to"].items()
        if size["episodes"]
    ]:
        said.append(", ".join(moved))
    return (
        f"{entry['operation']}. {entry['op']}: {'; '.join(said)}; {kept['episodes']} episodes,"
        f" {kept['transitions']} transitions are left"
    )


class _said_of:
    """Puts the operation before what it says is wrong."""

    def __init__(self, where: str, name: str):
        self._where, self._name = where, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UsageError):
            raise UsageError(f"{self._where} ({self._name}): {error}") from error
