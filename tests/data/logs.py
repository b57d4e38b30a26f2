"""Logs to import, and what becomes of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs.import_logs import JOB, ImportConfig
from mesocosm.store.artifacts import Artifact

Rows = list[dict[str, Any]]
SCALARS = ("action", "reward", "terminated", "truncated")


def logs(episodes: int = 3, length: int = 4) -> Rows:
    """Episodes that terminate, each with a last row that is an observation alone."""
    rows = []
    for k, t in itertools.product(range(episodes), range(length + 1)):
        values = (t % 2, 1.0, t == length - 1, False) if t < length else [None] * 4
        row = {"episode": k, "step": t, "observation": [float(t), 0.5]}
        rows.append(row | dict(zip(SCALARS, values, strict=True)))
    return rows


def moves(rows: Rows) -> Rows:
    """One row a transition, with `next_observation` in place of the last rows."""
    return [
        row | {"next_observation": after["observation"]}
        for row, after in itertools.pairwise(rows)
        if row["action"] is not None
    ]


def steps(lengths: Sequence[int] = (4, 3, 5), **changes: Any) -> Rows:
    """Episodes that terminate, one row a transition. Every next observation is different."""
    return [
        {
            "episode": k,
            "step": t,
            "observation": [t / 2, k / 8],
            "action": t % 2,
            "reward": 1.0,
            "terminated": t == length - 1,
            "truncated": False,
            "next_observation": [(t + 1) / 2, k / 8],
            **changes,
        }
        for k, length in enumerate(lengths)
        for t in range(length)
    ]


def each(rows: Rows, **changes: Any) -> Rows:
    """Change every row. A value may be a function of the row."""
    return [row | {k: v(row) if callable(v) else v for k, v in changes.items()} for row in rows]


def changed(rows: Rows, number: int, **changes: Any) -> Rows:
    """Change one row."""
    return [row | changes if i == number else row for i, row in enumerate(rows)]


def without(rows: Rows, *names: str) -> Rows:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def exported(dataset: Dataset) -> Rows:
    return pq.read_table(dataset.paths[0] / "episodes").to_pylist()


def parquet(path: Path, rows: Rows, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configured(
    *paths: Path | str, env: str = "", bounds: str = "drop", **keys: Any
) -> ImportConfig:
    config = ImportConfig(paths=[str(path) for path in paths], **{"workers": 0, **keys})
    config.reality.env, config.reality.bounds = env, bounds
    return config


def planned(*paths: Path | str, **keys: Any) -> dict[str, Any]:
    return JOB.plan(configured(*paths, **keys))


def refused(message: str, *paths: Path | str, **keys: Any) -> None:
    """Check that an import is refused, in one line."""
    with pytest.raises(UsageError, match=message) as error:
        planned(*paths, **keys)
    assert "\n" not in str(error.value)


def warns(plan: dict[str, Any], *words: str) -> bool:
    return any(all(word in text for word in words) for text in plan.get("warnings", []))


def report(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "import.json").read_text())


def columns(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The rows of the table of columns, by column."""
    return {row["column"]: row for row in report["columns"]}


def same(a: Dataset, b: Dataset) -> None:
    """Check that two datasets have equal episodes."""
    assert len(a.table) == len(b.table)
    for one, other in zip(a.iter_episodes(), b.iter_episodes(), strict=True):
        for name in ("index", "behaviour", "outcome", "success"):
            assert getattr(one, name) == getattr(other, name)
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def checksums(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "COMMIT.json").read_text())["files"]
