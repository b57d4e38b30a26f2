"""Finished cells in storage, whichever sweep trained them. Imports no Ray.

    ROOT/cells/results/ID.json            a record of each finished cell, created in one write
    ROOT/cells/bases/ID.safetensors       a base that several cells share

A sweep's table has a row for each of its cells' records.
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

from mesocosm import __version__
from mesocosm.config import fingerprint
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import ArtifactError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.grid import SCHEMA, Cell
from mesocosm.store.artifacts import Storage
from mesocosm.train import prepare
from mesocosm.versions import VERSIONS

RESULTS, BASES = "cells/results", "cells/bases"
COLUMNS = ["params", "data", "loss", "unique", "flops", "seed", "lr", "trunk", "family", "size"]
COLUMNS += ["total_params", "epochs", "steps"]
"""Columns of the table before the losses by part, `seconds` and `cell`. With images `tokenizer`
follows them.
"""


@dataclass(frozen=True)
class CellRecord:
    """A finished cell, as its file holds it."""

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
    """Nats a transition on the validation split, over all parts; of texts, bits per byte."""
    parts: dict[str, float]
    """Nats a transition by part; they sum to `loss`, unless that is bits per byte."""
    seconds: float
    """Time to train and validate the part that the cell does not share with the previous cell of
    its trunk.
    """
    ran: int
    """Steps in that time."""
    world: str | None
    """The artifact of a cell that was a pretrain job."""
    what: dict[str, Any]
    """The cell's `identity`."""
    code: str = __version__
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer whose codes `loss` measures; None without images."""
        return self.what.get("tokenizer")

    @staticmethod
    def of(
        cell: Cell,
        metrics: Mapping[str, float],
        *,
        seconds: float,
        ran: int,
        world: str | None = None,
    ) -> CellRecord:
        """A record of `metrics`, of which `valid/<part>` and `valid/loss` are read; in place of
        the latter `valid/bits_per_byte`, where texts have it: it compares tokenizers.
        """
        prefix = "valid/"
        parts = {k.removeprefix(prefix): x for k, x in metrics.items() if k.startswith(prefix)}
        nats = parts.pop("loss")
        facts = {name: getattr(cell, name) for name in COLUMNS if name not in ("loss", "family")}
        return CellRecord(
            cell=cell.id,
            family=cell.identity["family"],
            loss=parts.pop("bits_per_byte", nats),
            parts=parts,
            seconds=seconds,
            ran=ran,
            world=world,
            what=cell.identity,
            **facts,
        )


def save_record(storage: Storage, record: CellRecord, *, force: bool = False) -> CellRecord:
    """Store the record. Returns the one that another sweep stored first, unless `force`."""
    path, data = f"{RESULTS}/{record.cell}.json", json.dumps(asdict(record), indent=1).encode()
    if force:
        storage.write(path, data)
    elif not storage.create(path, data):
        return read_record(storage, record.cell)
    return record


def finished(storage: Storage) -> set[str]:
    """The ids of all finished cells."""
    return {name.removesuffix(".json") for name in storage.list(RESULTS)}


def read_record(storage: Storage, id: str) -> CellRecord:
    """The record of a finished cell. Raises ArtifactError where it is damaged."""
    path = f"{RESULTS}/{id}.json"
    try:
        return CellRecord(**json.loads(storage.read(path) or b""))
    except (ValueError, TypeError) as error:
        message = f"{path!r} in storage.root {storage.root!r} is damaged ({error})"
        raise ArtifactError(f"{message}; remove it, and its cell is trained again") from error


def fit_base(
    storage: Storage, dataset: Dataset, codec: Codec, model: ModelConfig, seed: int
) -> tuple[Base, float]:
    """The base of `model` on the training split, fitted or read from storage, and the seconds that
    fitting took.
    """
    keys = ("members", "base", "base_hidden", "base_steps", "head_steps")
    settings = {key: getattr(model, key) for key in keys}
    facts = (settings, dataset.ids, codec.id, dataset.count("train"), seed)
    path = f"{BASES}/{fingerprint('base', *facts, VERSIONS['pretrain'], SCHEMA)}.safetensors"
    began = time.perf_counter()
    if (base := prepare.read_base(storage, path, codec.spec, model)) is not None:
        return base, 0.0
    base = prepare.fit_base(storage, path, dataset, codec, model, seed)
    return base, time.perf_counter() - began


def write_table(records: Iterable[CellRecord], path: Path) -> None:
    """Write `table.csv`: a row for each cell, by size, then data, then the rest."""
    ordered = sorted(records, key=lambda r: (r.params, r.data, r.unique, r.seed, r.cell))
    parts = list(dict.fromkeys(name for record in ordered for name in record.parts))
    of_images = any(record.tokenizer is not None for record in ordered)
    facts = [*COLUMNS, "tokenizer"] if of_images else COLUMNS
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*facts, *parts, "seconds", "cell"])
        writer.writeheader()
        for record in ordered:
            row = {name: getattr(record, name) for name in facts} | record.parts
            writer.writerow(row | {"seconds": round(record.seconds, 3), "cell": record.cell})
