"""Checkpoints of an agent in training, under `runs/checkpoints/<agent id>`.

    progress.json           the last whole checkpoint: iteration, file, sha256, versions, metrics
    state-NNNNNN-*.pkl.z    the state from `learner_state.capture`
    snapshots/N/...         the policies saved so far, as the artifact will hold them

A state file is written before progress.json names it, so that a kill leaves the earlier checkpoint
whole. State files are compressed pickles, read only from here, after their checksum.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
import uuid
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import ray
import torch

from mesocosm import __version__
from mesocosm.errors import UsageError
from mesocosm.policies.policy import SNAPSHOTS
from mesocosm.store.artifacts import Storage

PROGRESS = "progress.json"
TIME_FRACTION = 0.05
"""Checkpoints take at most about this fraction of the training time"""
VERSIONS = {
    "ray": ray.__version__,
    "torch": torch.__version__,
    "numpy": numpy.__version__,
    "mesocosm": __version__,
}
"""Versions of the packages whose objects are pickled"""


@dataclass
class AgentProgress:
    """The content of progress.json."""

    iteration: int
    """Finished iterations"""
    file: str
    sha256: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last iteration; counts are over all iterations"""
    versions: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training, of which storage holds the last."""

    def __init__(self, storage: Storage, id: str):
        self.storage, self.id, self.folder = storage, id, f"runs/checkpoints/{id}"
        self._saved: str | None = None
        self._next_save = 0.0

    def latest(self) -> AgentProgress | None:
        """The last whole checkpoint, or None.

        Raises:
            UsageError: progress.json is damaged, or other package versions wrote the checkpoint.
        """
        data = self.storage.read(f"{self.folder}/{PROGRESS}")
        if data is None:
            return None
        try:
            progress = AgentProgress(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise self._damaged(PROGRESS) from error
        for name, version in VERSIONS.items():
            if progress.versions.get(name) != version:
                raise UsageError(
                    f"agents/{self.id}: its checkpoint needs {name} {progress.versions.get(name)}, "
                    f"got {name} {version}; install that version, or use --force to start over"
                )
        return progress

    def load(self, progress: AgentProgress) -> Any:
        """The saved state. Raises UsageError where it is missing or damaged."""
        data = self.storage.read(f"{self.folder}/{progress.file}")
        if data is None or hashlib.sha256(data).hexdigest() != progress.sha256:
            raise self._damaged(progress.file)
        self._saved = progress.file
        return pickle.loads(zlib.decompress(data))

    def due(self) -> bool:
        """True if another checkpoint keeps within TIME_FRACTION."""
        return time.monotonic() >= self._next_save

    def save(self, iteration: int, state: Any, metrics: dict[str, float]) -> None:
        """Write the state after `iteration` iterations, then remove the earlier one."""
        began = time.monotonic()
        # A replay buffer's trees are 80 MB of zeros when it is nearly empty.
        data = zlib.compress(pickle.dumps(state, protocol=5), level=1)
        file = f"state-{iteration:06d}-{uuid.uuid4().hex[:8]}.pkl.z"
        self.storage.write(f"{self.folder}/{file}", data)
        digest = hashlib.sha256(data).hexdigest()
        progress = AgentProgress(iteration, file, digest, metrics, VERSIONS)
        self.storage.write(f"{self.folder}/{PROGRESS}", json.dumps(asdict(progress)).encode())
        if self._saved is not None:
            self.storage.remove(f"{self.folder}/{self._saved}")
        self._saved = file
        now = time.monotonic()
        self._next_save = now + (now - began) / TIME_FRACTION

    def save_snapshot(self, folder: Path, iteration: int) -> None:
        """Write the files of the policy saved after `iteration` iterations."""
        for path in sorted(folder.iterdir()):
            name = f"{self.folder}/{SNAPSHOTS}/{iteration}/{path.name}"
            self.storage.write(name, path.read_bytes())

    def load_snapshots(self, into: Path, progress: AgentProgress) -> None:
        """Copy the policies up to the checkpoint to `into`/ITERATION/."""
        for name in self.storage.list(f"{self.folder}/{SNAPSHOTS}"):
            if int(name) > progress.iteration:
                continue
            (into / name).mkdir(parents=True)
            for file in self.storage.list(f"{self.folder}/{SNAPSHOTS}/{name}"):
                data = self.storage.read(f"{self.folder}/{SNAPSHOTS}/{name}/{file}")
                assert data is not None
                (into / name / file).write_bytes(data)

    def remove(self) -> None:
        """Remove everything: the artifact is finished, or training starts over."""
        self.storage.remove(self.folder)

    def _damaged(self, file: str) -> UsageError:
        return UsageError(
            f"agents/{self.id} cannot continue: {self.storage.url(self.folder, file)} is missing or"
            " damaged; use --force to start over"
        )
