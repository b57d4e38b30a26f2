"""Training checkpoints: DeepSpeed's shards, every rank's random state, and a plain record of where
training stood.

    checkpoint_*/ds/ds/...           DeepSpeed's own files, a shard a rank
                /rank-00000.pt       the rank's random state
                /rank-00000.json     sha256 of the files this rank wrote
                /progress.json       step, world size, ZeRO stage, best loss (rank 0)
                /model.safetensors   only at the end, instead of DeepSpeed's files: the float32 weights

Every rank saves into its own folder and reports it; Ray merges them in storage, under this
project's runs prefix. They are pickles, loaded only from there, after their checksums.
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

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.store.artifacts import Storage
from mesocosm.store.files import sha256

TAG = "ds"
UNIVERSAL = "universal"
PROGRESS = "progress.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
MODEL = "model.safetensors"


@dataclass
class Progress:
    """Where training stood after `step`. The loader's position is `step`; the schedule is a
    function of it.
    """

    step: int = 0
    steps: int = 0
    world_size: int = 1
    zero_stage: int = 0
    precision: str = "fp32"
    best: float | None = None
    """`Watch`'s memory: the least loss."""
    high: int = 0
    seconds: float = 0.0
    """Spent training, over all attempts."""
    validations: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    """Throughput, at the end."""

    @property
    def done(self) -> bool:
        return self.step >= self.steps


def folder_of(id: str) -> str:
    """Where the training of world `id` keeps its state, under the root: always the same, so that
    running again resumes.
    """
    return f"runs/checkpoints/{id}"


def latest(storage: Storage, id: str) -> tuple[str, Progress] | None:
    """The last whole checkpoint (its path under the root) and its progress, as Ray Train's own
    record names it. Raises UsageError where that record is damaged: Ray writes it in place, so a
    crash may tear it, and resumes from nothing else.
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
        return None if progress is None else (path, Progress(**json.loads(progress)))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"training cannot go on: {name!r} in storage.root {storage.root!r} is damaged; use"
            " --force to begin anew"
        ) from error


def read_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / PROGRESS).read_text()))


def refuse_other_stage(progress: Progress, zero_stage: int) -> None:
    """Raises UsageError where DeepSpeed cannot read the checkpoint into the engine that the config
    asks for.
    """
    if progress.done:
        return
    if progress.zero_stage != zero_stage:
        raise UsageError(
            f"train.zero_stage={zero_stage} cannot resume from step {progress.step}, which was"
            f" saved at stage {progress.zero_stage}; use train.zero_stage={progress.zero_stage}, or"
            " --force to begin anew"
        )


def save_running(engine: Any, progress: Progress, rank: int) -> Path:
    """This rank's part of a checkpoint, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="mesocosm-checkpoint-"))
    (folder / "ds").mkdir()
    engine.save_checkpoint(str(folder / "ds"), tag=TAG)
    state = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(state, folder / f"rank-{rank:05d}.pt")
    return _seal(folder, progress, rank)


def save_final(weights: dict[str, torch.Tensor] | None, progress: Progress, rank: int) -> Path:
    """The end's checkpoint: rank 0 has the weights, the others None."""
    from safetensors.torch import save_file

    folder = Path(tempfile.mkdtemp(prefix="mesocosm-checkpoint-"))
    if weights is not None:
        save_file(weights, folder / MODEL)
    return _seal(folder, progress, rank)


def _seal(folder: Path, progress: Progress, rank: int) -> Path:
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)))
    sums = {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _record(rank)).write_text(json.dumps(sums))
    return folder


def _record(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def verify(folder: Path) -> None:
    """Raises MesocosmError where a rank's record is missing, or a file is missing or differs from
    its checksum.
    """

    def damaged(name: str) -> MesocosmError:
        return MesocosmError(
            f"checkpoint {folder.name!r}: file {name!r} is missing or damaged (checksum differs);"
            " run again with --force to begin anew"
        )

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
    """Bring `engine` to where the DeepSpeed checkpoint `folder`/`tag` stood."""
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise MesocosmError(
            f"checkpoint {str(folder)!r} holds no DeepSpeed state; run again with --force to begin"
            " anew"
        )


def load_random(folder: Path, rank: int) -> None:
    """This rank's random state, where the checkpoint has one (another world size has other ranks)."""
    path = folder / f"rank-{rank:05d}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        torch.set_rng_state(state["cpu"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def needs_universal(progress: Progress, world_size: int) -> bool:
    """Stage 0 has no shards; ZeRO's are cut for one world size."""
    return progress.zero_stage > 0 and progress.world_size != world_size


def to_universal(folder: Path, target: Path) -> None:
    """Convert the DeepSpeed shards of a checkpoint to DeepSpeed's universal format,
    `target`/UNIVERSAL, which any world size of the same stage reads.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    options = {
        "num_extract_workers": 1,
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,
    }
    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / "ds" / TAG), output_folder=str(target / UNIVERSAL), **options
        )
    )
    (target / "latest_universal").write_text(UNIVERSAL)
