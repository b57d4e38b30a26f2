"""The progress of an import, on this machine: a killed import continues from its last whole shard.

looked.json   the tally of the first pass
data/         the dataset so far
00000.json    after each whole shard: its episodes, and the state of the joiner and the writer
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from mesocosm.data.ingest.episodes import Joiner
from mesocosm.data.ingest.report import ImportTally
from mesocosm.datasets.manifest import EPISODES
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.store.files import sync, sync_tree, write_whole

TALLY = TypeAdapter(ImportTally)


class ImportProgress:
    """The progress of one import in `folder`, which is created."""

    def __init__(self, folder: Path):
        self.folder, self.data, self._tally = folder, folder / "data", folder / "looked.json"
        if any(folder.glob("*.npy")):  # an earlier version's, which stored episodes apart
            shutil.rmtree(folder)
        self.data.mkdir(parents=True, exist_ok=True)
        self._saved_names = 0

    def tally(self) -> ImportTally | None:
        """The result of the first pass of an earlier process."""
        return TALLY.validate_json(self._tally.read_bytes()) if self._tally.exists() else None

    def save_tally(self, tally: ImportTally) -> None:
        write_whole(self._tally, TALLY.dump_json(tally))

    def restore(self, writer: DatasetWriter, joiner: Joiner) -> None:
        """Restore the state after the last whole shard."""
        for file in sorted(self.folder.glob("[0-9]*.json")):
            state = json.loads(file.read_bytes())
            joiner.seen.update(dict.fromkeys(state["names"]))
            joiner.number, joiner.next = state["number"], tuple(state["next"])
            episodes = np.array([tuple(row) for row in state["episodes"]], EPISODES)
            writer.restore(episodes, state["writer"])
        self._saved_names = len(joiner.seen)

    def save_shard(self, writer: DatasetWriter, joiner: Joiner) -> None:
        """Save the state after the episode that completed a shard."""
        episodes, writer_state = writer.state()
        name = writer_state["shard"]["name"]
        sync_tree(self.data / "shards" / name)
        sync(self.data / "episodes" / f"{name}.parquet")
        state = {
            "next": joiner.next,
            "number": joiner.number,
            "names": list(itertools.islice(joiner.seen, self._saved_names, None)),
            "episodes": episodes.tolist(),
            "writer": writer_state,
        }
        self._saved_names = len(joiner.seen)
        write_whole(self.folder / f"{name}.json", json.dumps(state).encode())

    def link(self, folder: Path) -> None:
        """Hard-link the complete dataset into `folder`. It stays here until that is published."""
        shutil.copytree(self.data, folder, copy_function=os.link, dirs_exist_ok=True)

    def clear(self) -> None:
        for file in self.folder.glob("*.*"):
            file.unlink()
        shutil.rmtree(self.data)
