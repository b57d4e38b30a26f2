"""The world versions of a process, each found in storage and loaded once. A client is pinned to the
version with which it began, and may begin again with another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from mesocosm.errors import UsageError
from mesocosm.model.any_world import AnyWorld, load_any
from mesocosm.store.artifacts import Storage


def find_world(storage: Storage, ref: str) -> tuple[str, Path]:
    """Return (id, folder) of a world: an artifact id, a unique prefix of one, or a folder.

    Raises:
        UsageError: There is no such world.
    """
    if not ref:
        raise UsageError("world must be an artifact id or a folder with a world.json, got ''")
    folder = Path(ref)
    if (folder / "world.json").is_file():
        return str(folder.absolute()), folder
    if folder.is_absolute():
        raise UsageError(f"world {ref!r} is a folder without a world.json; give a world's folder")
    artifact = storage.artifact("worlds", ref)
    return artifact.id, artifact.path


class Worlds:
    """Loaded world versions by id, the `keep` most recently used.

    Safe to call from several threads. Worlds load one at a time. A request for a loaded
    world never waits for one that loads.
    """

    def __init__(self, root: str, default: str = "", keep: int = 3, device: str = "cpu"):
        self.storage, self.default = Storage(root), default
        self.keep, self.device = keep, device
        self._loaded: OrderedDict[str, AnyWorld] = OrderedDict()
        self._ids: dict[str, str] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def get(self, ref: str) -> tuple[str, AnyWorld]:
        """Return (id, world); an empty `ref` is the default. A loaded id needs no storage."""
        ref = ref or self.default
        loaded = self._lookup(ref)
        if loaded is not None:
            return loaded
        with self._loading:
            return self._lookup(ref) or self._load(ref)

    def _lookup(self, ref: str) -> tuple[str, AnyWorld] | None:
        with self._lock:
            id = self._ids.get(ref, ref)
            if id not in self._loaded:
                return None
            self._loaded.move_to_end(id)
            return id, self._loaded[id]

    def _load(self, ref: str) -> tuple[str, AnyWorld]:
        id, folder = find_world(self.storage, ref)
        loaded = self._lookup(id)
        world = load_any(folder, self.device) if loaded is None else loaded[1]
        with self._lock:
            self._ids[ref] = id
            self._loaded[id] = world
            while len(self._loaded) > self.keep:
                self._loaded.popitem(last=False)
        return id, world
