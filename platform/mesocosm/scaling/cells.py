"""What storage holds of cells, whichever sweep made them.

    ROOT/cells/results/<id>.json          one record a finished cell, created whole
    ROOT/cells/bases/<id>.safetensors     a base that several cells share

The table of a sweep is its cells' records, one row each. Imports no Ray.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from mesocosm import __version__
from mesocosm.config import fingerprint
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.errors import ArtifactError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.grid import SCHEMA, Cell
from mesocosm.store.artifacts import Storage
from mesocosm.train.prepare import transitions
from mesocosm.versions import VERSIONS

RESULTS, BASES = "cells/results", "cells/bases"
COLUMNS = (
    "params",
    "data",
    "loss",
    "unique",
    "flops",
    "seed",
    "lr",
    "trunk",
    "family",
    "size",
    "total_params",
    "epochs",
    "steps",
)
"""Of the table, before `loss` by part, `seconds` and `cell`."""


@dataclass(frozen=True)
class Record:
    """A finished cell."""

    cell: str
    trunk: str
    family: str
    size: str
    params: int
    total_params: int
    data: int
    unique: int
    epochs: float
    steps: int
    flops: int
    seed: int
    lr: float
    loss: float
    """Nats a transition on the validation split, all parts."""
    parts: dict[str, float]
    """The same by part; they sum to `loss`."""
    seconds: float
    """Of training and validating what it does not share with the cell before it on its trunk."""
    ran: int
    """Steps in that time."""
    world: str | None
    """The artifact, for a cell that was a pretrain job."""
    what: dict[str, Any]
    code: str = __version__
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    @staticmethod
    def of(
        cell: Cell,
        measured: Mapping[str, float],
        *,
        seconds: float,
        ran: int,
        world: str | None = None,
    ) -> Record:
        """`measured`: `valid/<part>` and `valid/loss`."""
        parts = {
            name.removeprefix("valid/"): value
            for name, value in measured.items()
            if name.startswith("valid/")
        }
        loss = parts.pop("loss")
        same = {
            name: getattr(cell, name)
            for name in (
                "trunk",
                "size",
                "params",
                "total_params",
                "data",
                "unique",
                "epochs",
                "steps",
                "flops",
                "seed",
                "lr",
            )
        }
        return Record(
            cell=cell.id,
            family=cell.what["family"],
            loss=loss,
            parts=parts,
            seconds=seconds,
            ran=ran,
            world=world,
            what=cell.what,
            **same,
        )

    @property
    def row(self) -> dict[str, Any]:
        """Of the table."""
        return (
            {name: getattr(self, name) for name in COLUMNS}
            | self.parts
            | {"seconds": round(self.seconds, 3), "cell": self.cell}
        )


def keep(storage: Storage, record: Record, *, force: bool = False) -> Record:
    """Store the record, or find that another sweep was faster; `force` replaces what is there."""
    path, data = f"{RESULTS}/{record.cell}.json", json.dumps(asdict(record), indent=1).encode()
    if force:
        storage.write(path, data)
    elif not storage.create(path, data):
        return read(storage, record.cell)
    return record


def finished(storage: Storage) -> set[str]:
    """The ids of all finished cells."""
    return {name.removesuffix(".json") for name in storage.list(RESULTS)}


def read(storage: Storage, id: str) -> Record:
    """A finished cell's record. Raises ArtifactError where it is damaged."""
    path = f"{RESULTS}/{id}.json"
    try:
        return Record(**json.loads(storage.read(path) or b""))
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path!r} in storage.root {storage.root!r} is damaged ({error}); remove it, and its"
            " cell is trained again"
        ) from error


def base(
    storage: Storage, dataset: Dataset, codec: Codec, model: ModelConfig, seed: int
) -> tuple[Base, float]:
    """The base of `model` on `dataset`'s training split, fitted or found, and the seconds that it
    took to fit.
    """
    settings = {
        name: getattr(model, name) for name in ("members", "base", "base_hidden", "base_steps")
    }
    facts = (settings, dataset.ids, codec.id, dataset.count("train"), seed)
    path = f"{BASES}/{fingerprint('base', *facts, VERSIONS['pretrain'], SCHEMA)}.safetensors"
    began = time.perf_counter()
    kept = storage.read(path)
    if kept is not None:
        made = Base(codec.spec, model)
        made.load_state_dict(load(kept))
        return made.eval(), 0.0
    made = Base.fit(codec.spec, model, transitions(dataset, codec), seed)
    storage.create(path, save(made.state_dict()))
    return made.eval(), time.perf_counter() - began


def write_table(records: Iterable[Record], path: Path) -> None:
    """`table.csv`: a row a cell, by size, then data, then the rest."""
    rows = [
        record.row
        for record in sorted(records, key=lambda r: (r.params, r.data, r.unique, r.seed, r.cell))
    ]
    parts = list(
        dict.fromkeys(
            name for row in rows for name in row if name not in (*COLUMNS, "seconds", "cell")
        )
    )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *parts, "seconds", "cell"])
        writer.writeheader()
        writer.writerows(rows)
