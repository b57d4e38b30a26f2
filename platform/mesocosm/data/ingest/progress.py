"""The progress of an import, on this machine: a killed import goes on from its last whole shard.

looked.json       the tally of the first pass
data/             the dataset so far
00000.npy, .json  after each whole shard: its episodes (`manifest.EPISODES`), and the state of
                  the joiner and the writer
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mesocosm.data.ingest.episodes import Joiner
from mesocosm.data.ingest.report import ImportTally
from mesocosm.data.ingest.schema import Schema
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.store.files import replace, sync, sync_tree, write_synced

TALLY = TypeAdapter(ImportTally)


class ImportProgress:
    """The progress of one import in `folder`, which is created."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self._saved_names = 0

    def tally(self) -> ImportTally | None:
        """The result of the first pass of an earlier process."""
        file = self.folder / "looked.json"
        return TALLY.validate_json(file.read_bytes()) if file.exists() else None

    def save_tally(self, tally: ImportTally) -> None:
        self._write("looked.json", TALLY.dump_json(tally))

    def restore(
        self, writer: DatasetWriter, names: Sequence[str], schema: Schema, drop: bool
    ) -> tuple[Joiner, int]:
        """Restore `writer` to the state after the last whole shard.

        Returns:
            (joiner in that state, transitions that are written).
        """
        seen: list[int | str] = []
        state: dict[str, Any] = {"next": (0, 0), "number": 0}
        for shard in itertools.count():
            file = self.folder / f"{shard:05d}.json"
            if not file.exists():
                break
            state = json.loads(file.read_bytes())
            seen += state["names"]
            writer.restore(np.load(file.with_suffix(".npy"), allow_pickle=False), state["writer"])
        joiner = Joiner(names, schema, drop, seen, state["number"])
        piece, row = state["next"]
        joiner.next = piece, row
        self._saved_names = len(seen)
        return joiner, writer.transitions

    def save_shard(self, writer: DatasetWriter, joiner: Joiner) -> None:
        """Save the state after the episode that completed a shard."""
        table, state = writer.state()
        name = state["shard"]["name"]
        for path in (self.data / "shards" / name, self.data / "episodes" / f"{name}.parquet"):
            sync_tree(path) if path.is_dir() else sync(path)
        names = list(itertools.islice(joiner.seen, self._saved_names, None))
        self._saved_names += len(names)
        with open(self.folder / f"{name}.npy", "wb") as file:
            np.save(file, table, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        state = {"next": joiner.next, "number": joiner.number, "names": names, "writer": state}
        self._write(f"{name}.json", json.dumps(state).encode())

    def _write(self, name: str, data: bytes) -> None:
        write_synced(str(self.folder / f"{name}.tmp"), data)
        replace(self.folder / f"{name}.tmp", self.folder / name)

    def link(self, folder: Path) -> None:
        """Hard-link the complete dataset into `folder`. It stays here until that is published."""
        shutil.copytree(self.data, folder, copy_function=os.link, dirs_exist_ok=True)

    def clear(self) -> None:
        for file in self.folder.glob("*.*"):
            file.unlink()
        shutil.rmtree(self.data)


@contextmanager
def resumable(scratch: Path, id: str, *, restart: bool) -> Iterator[ImportProgress]:
    """The progress of the import `id`, kept where the block fails and removed where it ends.

    The caller holds the dataset's lease, so no other process of this root uses the folder.

    Args:
        restart: Discard the progress of an earlier process.
    """
    folder = scratch / f"import-{id}"
    progress = ImportProgress(folder)
    if restart:
        progress.clear()
    yield progress
    shutil.rmtree(folder, ignore_errors=True)
