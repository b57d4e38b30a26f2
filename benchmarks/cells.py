"""Cells of benchmarks: runs that are saved as they finish and not run again, within a wall time."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mesocosm import signals
from mesocosm.cluster import ray_session

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
)  # dmc.py, for the processes that collect


class Named(Protocol):
    """A cell."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --minutes, and --dry-run or --table-only."""
    parser.add_argument("--minutes", type=float, default=20.0, help="wall time, then interrupt")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--dry-run", action="store_true")
    shown.add_argument("--table-only", action="store_true")


def read_results(path: Path) -> dict[str, Any]:
    """The saved results by the cells' names."""
    return json.loads(path.read_text()) if path.exists() else {}


def save_result(path: Path, name: str, values: dict[str, Any]) -> None:
    """Save the result of a cell in the file of all cells, which other processes may also write."""
    path.parent.mkdir(exist_ok=True)
    by_name = dict(sorted({**read_results(path), name: values}.items()))
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(by_name, indent=1) + "\n")
    os.replace(part, path)


def run_cells(
    chosen: Sequence[C],
    run: Callable[[C], None],
    finished: Callable[[C], bool],
    minutes: float,
    title: Callable[[C], str] = lambda cell: cell.name,
) -> int:
    """Run the unfinished cells until all are finished (0) or the minutes have passed (1)."""
    end = time.monotonic() + minutes * 60
    try:
        for cell in chosen:
            if finished(cell):
                continue
            print(f"--- {title(cell)}", flush=True)
            try:
                with interrupted_after(max(1.0, end - time.monotonic())):
                    run(cell)
            except KeyboardInterrupt:
                print(f"{cell.name} is not finished; run the same command again to continue")
                return 1
    finally:
        ray_session.shutdown()
    return 0


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt, as Ctrl-C does, when the seconds have passed in the block."""
    # A thread: the alarm signal belongs to the guard of real steps.
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    with signals.end_like_interrupt():
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
