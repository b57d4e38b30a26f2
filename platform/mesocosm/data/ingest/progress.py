"""How far an import has come, kept on this machine, so that one that was killed goes on with the
shard that it was at.

looked.json       what the first pass found, once it is through
data/             the dataset so far
00000.npy, .json  of each shard that is whole on disk: its episodes (`manifest.EPISODES`), and what the joiner and the writer knew after it
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

from mesocosm.data.format.writer import DatasetWriter
from mesocosm.data.ingest.assemble import Joiner, Tally
from mesocosm.data.ingest.rows import Layout
from mesocosm.store.files import replace, sync, sync_tree, write_synced

TALLY = TypeAdapter(Tally)


class Progress:
    """In `folder`, which is made."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        self._names = 0

    def looked(self) -> Tally | None:
        """What the first pass of an earlier process found."""
        file = self.folder / "looked.json"
        return TALLY.validate_json(file.read_bytes()) if file.exists() else None

    def keep_looked(self, tally: Tally) -> None:
        self._write("looked.json", TALLY.dump_json(tally))

    def restore(
        self, writer: DatasetWriter, names: Sequence[str], layout: Layout, drop: bool
    ) -> tuple[Joiner, int]:
        """The joiner as it was after the last whole shard, and how many transitions there are.
        `writer` is as it was, too.
        """
        known: list[int | str] = []
        last: dict[str, Any] = {}
        for shard in itertools.count():
            file = self.folder / f"{shard:05d}.json"
            if not file.exists():
                break
            last = json.loads(file.read_bytes())
            known += last["names"]
            writer.restore(np.load(file.with_suffix(".npy"), allow_pickle=False), last["writer"])
        joiner = Joiner(names, layout, drop, known, last.get("number", 0))
        joiner.next = (last["next"][0], last["next"][1]) if last else joiner.next
        self._names = len(known)
        return joiner, writer.transitions

    def keep(self, writer: DatasetWriter, joiner: Joiner) -> None:
        """After an episode that filled a shard: nothing is held but what is written here."""
        table, state = writer.state()
        name = state["shard"]["name"]
        for what in (f"shards/{name}", f"episodes/{name}.parquet"):
            path = self.data / what
            sync_tree(path) if path.is_dir() else sync(path)
        names = list(itertools.islice(joiner.seen, self._names, None))
        self._names += len(names)
        with open(self.folder / f"{name}.npy", "wb") as file:
            np.save(file, table, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        self._write(
            f"{name}.json",
            json.dumps(
                {"next": joiner.next, "number": joiner.number, "names": names, "writer": state}
            ).encode(),
        )

    def _write(self, name: str, data: bytes) -> None:
        write_synced(str(self.folder / f"{name}.tmp"), data)
        replace(self.folder / f"{name}.tmp", self.folder / name)

    def give(self, folder: Path) -> None:
        """The dataset, now whole, into `folder`; it stays here too, until `folder` has come to
        where it belongs.
        """
        shutil.copytree(self.data, folder, copy_function=os.link, dirs_exist_ok=True)

    def forget(self) -> None:
        """Everything that was kept."""
        for file in self.folder.glob("*.*"):
            file.unlink()
        shutil.rmtree(self.data)


@contextmanager
def progress(scratch: Path, id: str, *, anew: bool) -> Iterator[Progress]:
    """What an earlier import of `id` left in `scratch`, unless `anew`; kept where the block fails,
    removed where it ends.

    For the holder of the dataset's lease: no other process of this root is at work in the folder.
    """
    folder = scratch / f"import-{id}"
    kept = Progress(folder)
    if anew:
        kept.forget()
    yield kept
    shutil.rmtree(folder, ignore_errors=True)
