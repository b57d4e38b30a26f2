"""What a user says of pretraining. Keys that do not change the result (`WITHOUT`) are no part of
the world's id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mesocosm.config import JobConfig, identity
from mesocosm.errors import UsageError, nearest
from mesocosm.model.config import ModelConfig

PRECISIONS = ("auto", "fp32", "bf16")
DEFAULT_STEPS = 1000
WITHOUT = (
    "accumulate",
    "zero_stage",
    "activation_checkpointing",
    "workers",
    "gpus_per_worker",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "validate_every",
    "peak_flops",
)


@dataclass
class DataConfig:
    datasets: list[str] = field(default_factory=list)
    """Dataset ids (or unique prefixes); several are opened as one."""
    unique: int | None = None
    """Train on so many transitions only: whole episodes in an order that `seed` draws, the last one
    cut short; null: on all.
    """
    weights: list[float] | None = None
    """Each dataset's share of every batch, in the order of `datasets`, whatever its size; null:
    what it has of their transitions.
    """
    block: int | None = None
    """Shuffle the shards, then the windows within so many of them: only these, and as many that are
    fetched meanwhile, must be on a machine. null: shuffle all windows.
    """
    cache_gib: float | None = None
    """Of a remote root's shards a machine keeps at most so many GiB, for all its jobs that say so;
    null: all.
    """

    def validate(self) -> None:
        if self.weights is not None:
            if len(self.weights) != len(self.datasets):
                raise UsageError(
                    f"data.weights={self.weights} are {len(self.weights)} for {len(self.datasets)}"
                    " datasets; give one for each"
                )
            if not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
                raise UsageError(
                    f"data.weights={self.weights} must be numbers greater than 0; leave out of"
                    " data.datasets what is not to be seen"
                )
        if self.block is not None and self.block < 1:
            raise UsageError(f"data.block={self.block} must be at least 1, or null")
        if self.cache_gib is not None and not (
            math.isfinite(self.cache_gib) and self.cache_gib > 0
        ):
            raise UsageError(
                f"data.cache_gib={self.cache_gib} must be a number greater than 0, or null"
            )


@dataclass
class TrainConfig:
    steps: int | None = None
    """Optimiser steps; 1000 where neither this nor `epochs` is set."""
    epochs: float | None = None
    """Passes over the training transitions, instead of `steps`."""
    batch: int = 32
    """Windows a step, over all workers."""
    events: int = 64
    """Single transitions a step beside the windows, terminals oversampled to a third, for the
    termination network; over all workers.
    """
    lr: float = 6e-3
    """At the ladder's base width; see model/mup.py."""
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.4
    """Share of the steps in which it falls to 0; it is constant between."""
    clip: float = 1.0
    """Of the gradient's global norm."""
    corrupt_history: float = 0.0
    """Standard deviation of the noise on the observations that a step is predicted from, in units
    of the base's one-step error; what follows stays true, so the change leads from the noisy to the
    true and teaches correction. A world that has seen inputs as wrong as its own samples drifts
    less over long horizons.
    """
    precision: str = "auto"
    """`fp32`, `bf16` (with float32 masters: ZeRO stage 1 at least), or `auto`: fp32 on CPU, bf16 on
    CUDA.
    """
    workers: int = 1
    gpus_per_worker: float | None = None
    """None: one where the cluster has one for every worker, otherwise none."""
    accumulate: int = 1
    """Micro-batches a step."""
    zero_stage: int = 0
    activation_checkpointing: bool = False
    checkpoint_every: int = 500
    """Steps."""
    keep_checkpoints: int = 2
    max_failures: int = 3
    """How often dead workers are started again, from the last checkpoint."""
    validate_every: int = 250
    """Steps; the end is always validated."""
    validate_windows: int = 2048
    """At most so many windows of the validation split, evenly taken."""
    peak_flops: float | None = None
    """FLOP/s of one worker's device, for MFU; None measures a large matrix product once."""


@dataclass
class PretrainConfig(JobConfig):
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        """Raises UsageError naming the key, its value and the fix. Looks at nothing but the config."""
        self.model.validate()
        t = self.train
        if not self.data.datasets:
            raise UsageError(
                "data.datasets=[] names no dataset; give ids, as in data.datasets=[ab12]"
            )
        self.data.validate()
        if t.steps is not None and t.epochs is not None:
            raise UsageError(
                f"train.steps={t.steps} and train.epochs={t.epochs} are both set; leave one unset"
                " (null)"
            )
        least = {
            "steps": 1,
            "batch": 1,
            "events": 0,
            "workers": 1,
            "accumulate": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "max_failures": 0,
            "validate_every": 1,
            "validate_windows": 1,
        }
        for key, low in least.items():
            value = getattr(t, key)
            if value is not None and value < low:
                raise UsageError(f"train.{key}={value} must be at least {low}")
        if 0 < t.events < 3:
            raise UsageError(
                f"train.events={t.events} cannot be a third terminals; use at least 3, or 0 for"
                " none"
            )
        for key in ("lr", "clip", "epochs", "peak_flops"):
            value = getattr(t, key)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"train.{key}={value} must be a number greater than 0")
        for key in ("weight_decay", "corrupt_history", "warmup", "decay", "gpus_per_worker"):
            value = getattr(t, key)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"train.{key}={value} must be a number not less than 0")
        if t.warmup + t.decay > 1:
            raise UsageError(
                f"train.warmup={t.warmup} and train.decay={t.decay} are shares of the steps and sum"
                " to more than 1; lower one"
            )
        if t.zero_stage not in (0, 1, 2, 3):
            raise UsageError(f"train.zero_stage={t.zero_stage} must be 0, 1, 2 or 3")
        if t.precision not in PRECISIONS:
            raise UsageError(
                f"train.precision={t.precision!r} is unknown, use one of"
                f" {', '.join(PRECISIONS)}{nearest(t.precision, PRECISIONS)}"
            )
        share = t.workers * t.accumulate
        for key in ("batch", "events"):
            value = getattr(t, key)
            if value % share:
                raise UsageError(
                    f"train.{key}={value} cannot be divided among train.workers={t.workers} x"
                    f" train.accumulate={t.accumulate}; use a multiple of {share}"
                )


def what(config: PretrainConfig, precision: str) -> dict[str, Any]:
    """The part of `config` that says which world is made, with the precision that `auto` came to."""
    said = identity(config)
    said["train"] = {key: value for key, value in said["train"].items() if key not in WITHOUT} | {
        "precision": precision
    }
    return said
