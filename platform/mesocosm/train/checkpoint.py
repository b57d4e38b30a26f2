"""Training checkpoints: DeepSpeed's shards, every rank's random state, and the progress.

    checkpoint_*/ds/ds/...           DeepSpeed's files, a shard for each rank
                /rank-00000.pt       the rank's random state
                /rank-00000.json     sha256 of the files that this rank wrote
                /progress.json       step, world size, ZeRO stage, best loss (rank 0)
                /model.safetensors   float32 weights (rank 0): the best so far on held-out data; at
                                     the end those to keep, and DeepSpeed's files are gone

A checkpoint is whole when every rank's record is present and every file has its checksum
(`verify`). Every rank saves into a folder of its own and reports it; Ray merges them in storage,
under this project's runs prefix. They are pickles, loaded only from there, after the check.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.store.artifacts import Storage
from mesocosm.store.files import sha256
from mesocosm.train.schedule import Judgement

TAG = "ds"
UNIVERSAL = "universal"
PROGRESS = "progress.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
MODEL = "model.safetensors"
AGAIN = "use --force to start again"


@dataclass
class TrainingProgress:
    """The state of training after `step`. The loader's position and the schedule follow from it."""

    step: int = 0
    steps: int = 0
    world_size: int = 1
    zero_stage: int = 0
    precision: str = "fp32"
    best: float | None = None
    """State of `schedule.Watch`: the least loss, and the number of consecutive high losses."""
    high: int = 0
    chosen: Judgement | None = None
    """The evaluation of the best weights. None before the first evaluation, and without held-out
    data.
    """
    widening: float = 1.0  # the last judgement's factor of the densities' scales
    seconds: float = 0.0  # time spent training, over all attempts
    validations: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)  # throughput, at the end

    def __post_init__(self) -> None:
        if self.chosen is not None:  # JSON has lists for tuples
            self.chosen = Judgement(*self.chosen)

    @property
    def chosen_step(self) -> int:
        """The step after which the weights are those to keep."""
        return self.step if self.chosen is None else self.chosen.step

    @property
    def done(self) -> bool:
        return self.step >= self.steps


Weights = dict[str, torch.Tensor]
"""Parameters by name, float32 on the CPU."""
Checkpoint = tuple[str, TrainingProgress]
"""A checkpoint's path under the root, and its progress."""


def folder_of(id: str) -> str:
    """The folder of world `id`'s training state, under the root: always the same, so that the same
    command resumes.
    """
    return f"runs/checkpoints/{id}"


def latest(storage: Storage, id: str) -> Checkpoint | None:
    """The last whole checkpoint, by Ray Train's record.

    Raises:
        UsageError: The record is damaged. Ray writes it in place, so a crash may tear it, and
            resumes from nothing else.
    """
    name = f"{folder_of(id)}/{SNAPSHOT}"
    snapshot = storage.read(name)
    if snapshot is None:
        return None
    try:
        result = json.loads(snapshot)["latest_checkpoint_result"]
        if not result:
            return None
        path = f"{folder_of(id)}/{result['checkpoint_dir_name']}"
        name = f"{path}/{PROGRESS}"
        progress = storage.read(name)
        return None if progress is None else (path, TrainingProgress(**json.loads(progress)))
    except (ValueError, KeyError, TypeError) as error:
        text = f"cannot resume: {name!r} in storage.root {storage.root!r} is damaged"
        raise UsageError(f"{text}; {AGAIN}") from error


def read_progress(folder: Path) -> TrainingProgress:
    return TrainingProgress(**json.loads((folder / PROGRESS).read_text()))


def save_running(
    engine: Any, progress: TrainingProgress, rank: int, chosen: Weights | None = None
) -> Path:
    """Save this rank's part of a checkpoint in a new folder; `chosen` are the best weights so far,
    on rank 0.
    """
    folder = Path(tempfile.mkdtemp(prefix="mesocosm-checkpoint-"))
    (folder / "ds").mkdir()
    engine.save_checkpoint(str(folder / "ds"), tag=TAG)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, folder / f"rank-{rank:05d}.pt")
    if chosen is not None:
        save_file(chosen, folder / MODEL)
    return _seal(folder, progress, rank)


def save_final(weights: Weights | None, progress: TrainingProgress, rank: int) -> Path:
    """Save the last checkpoint in a new folder: rank 0 has the weights, the others None."""
    folder = Path(tempfile.mkdtemp(prefix="mesocosm-checkpoint-"))
    if weights is not None:
        save_file(weights, folder / MODEL)
    return _seal(folder, progress, rank)


def _seal(folder: Path, progress: TrainingProgress, rank: int) -> Path:
    """Write the progress (rank 0) and this rank's record of checksums."""
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = {str(path.relative_to(folder)): sha256(path) for path in files}
    (folder / _record(rank)).write_text(json.dumps(sums))
    return folder


def _record(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def verify(folder: Path) -> None:
    """Raise MesocosmError if a rank's record is missing, or a file is missing or differs from its
    checksum.
    """

    def damaged(name: str) -> MesocosmError:
        problem = f"file {name!r} is missing or damaged (checksum differs)"
        return MesocosmError(f"checkpoint {folder.name!r}: {problem}; {AGAIN}")

    name = PROGRESS
    try:
        for rank in range(read_progress(folder).world_size):
            name = _record(rank)
            sums = json.loads((folder / name).read_text())
            for file, expected in sums.items():
                if not (folder / file).exists() or sha256(folder / file) != expected:
                    raise damaged(file)
    except (OSError, ValueError, TypeError) as error:
        raise damaged(name) from error


def load_running(engine: Any, folder: Path, tag: str) -> None:
    """Load the DeepSpeed checkpoint `folder`/`tag` into `engine`."""
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise MesocosmError(f"checkpoint {str(folder)!r} has no DeepSpeed state; {AGAIN}")


def load_random(folder: Path, rank: int) -> None:
    """Restore this rank's random state."""
    state = torch.load(folder / f"rank-{rank:05d}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def to_universal(folder: Path, target: Path) -> None:
    """Convert the DeepSpeed shards of a checkpoint to `target`/UNIVERSAL, DeepSpeed's universal
    format, which any world size of the same stage reads.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    folders = {"input_folder": str(folder / "ds" / TAG), "output_folder": str(target / UNIVERSAL)}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    ds_to_universal.main(Namespace(**folders, **workers, **flags))
    (target / "latest_universal").write_text(UNIVERSAL)
