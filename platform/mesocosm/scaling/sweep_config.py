"""What a user says of a sweep: a grid of sizes, data and seeds, and how its cells are trained.
Imports no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mesocosm.config import JobConfig, identity
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import nominal
from mesocosm.train.config import DataConfig, PretrainConfig, TrainConfig
from mesocosm.train.schedule import length, share

LARGEST = {"grid.data": 1e15, "grid.flops": 1e27}


@dataclass
class GridConfig:
    """The cells are sizes x (data or flops) x unique x seeds."""

    sizes: list[str] = field(default_factory=list)
    """Rungs of the model's ladder, as in [10k, 30k, 100k]."""
    data: list[int] = field(default_factory=list)
    """D: training transitions that a cell sees, repetitions counted. Either this or `flops`."""
    flops: list[float] = field(default_factory=list)
    """C: IsoFLOP budgets; each size sees as many transitions as its counted FLOPs allow."""
    unique: list[int] | None = None
    """U: different transitions that a cell trains on; null: all that the datasets have to train on.
    """
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class CellTraining:
    """How every cell is trained; its steps are the grid's."""

    batch: int = 32
    """Windows a step."""
    events: int = 64
    """As in pretraining."""
    lr: float = 6e-3
    """At the ladder's base width; see model/mup.py."""
    weight_decay: float = 0.01
    warmup: int = 20
    """Steps in which the learning rate rises from 0: the same for all cells, so that they share
    trunks, and a changed grid keeps its results.
    """
    decay: float = 0.3
    """Share of a cell's steps in which it falls to 0; this is what a cell does not share with the
    larger ones of its trunk.
    """
    clip: float = 1.0
    corrupt_history: float = 0.0
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: fp32 on CPU, bf16 on CUDA."""
    validate_windows: int = 2048
    """At most so many windows of the validation split, the same for all cells."""


@dataclass
class SweepConfig(JobConfig):
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    train: CellTraining = field(default_factory=CellTraining)
    large: int = 10_000_000
    """Cells of more parameters than this are each a pretrain job of several workers; smaller ones
    share warm processes and trunks.
    """
    workers: int = 2
    """Of a large cell."""
    concurrent: int = 2
    """Trunks that train at once, a worker each."""
    cluster: str = "local"
    """`clusters/<name>.yaml`, for the estimates of hours and price."""

    def validate(self) -> None:
        """Raises UsageError naming the key, its value and the fix. Looks at nothing but the config."""
        g = self.grid
        default = SweepConfig()
        if self.seed != default.seed:
            raise UsageError(
                f"seed={self.seed} is not read by a sweep; give grid.seeds=[{self.seed}]"
            )
        if self.model.size != default.model.size:
            raise UsageError(
                f"model.size={self.model.size} is not read by a sweep; give"
                f" grid.sizes=[{self.model.size}]"
            )
        if self.data.unique is not None:
            raise UsageError(
                f"data.unique={self.data.unique} is not read by a sweep; give"
                f" grid.unique=[{self.data.unique}]"
            )
        for key in ("weights", "block", "cache_gib"):
            if (value := getattr(self.data, key)) is not None:
                raise UsageError(
                    f"data.{key}={value} is not read by a sweep; leave it out, or pretrain the"
                    " sizes one by one"
                )
        if not g.sizes:
            raise UsageError(
                "grid.sizes=[] names no size; give rungs of the ladder, as in"
                " grid.sizes=[10k,30k,100k]"
            )
        for size in g.sizes:
            nominal(size, "grid.sizes")
        if bool(g.data) == bool(g.flops):
            said = (
                f"grid.data={g.data} and grid.flops={g.flops} are both set"
                if g.data
                else "neither grid.data nor grid.flops is set"
            )
            raise UsageError(f"{said}; give either the transitions that cells see or their FLOPs")
        for key, least in (("sizes", 1), ("data", 0), ("flops", 0), ("unique", 1), ("seeds", 1)):
            _distinct(f"grid.{key}", getattr(g, key), least)
        if not 0 <= min(g.seeds) <= max(g.seeds) < 2**32:
            raise UsageError(f"grid.seeds={g.seeds} must be at least 0 and below 2**32")
        for key in ("large", "workers", "concurrent"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key}={getattr(self, key)} must be at least 1")
        t = self.train
        if t.warmup < 0:
            raise UsageError(f"train.warmup={t.warmup} must be a number of steps not less than 0")
        if not 0 < t.decay <= 1:
            raise UsageError(
                f"train.decay={t.decay} must be a share above 0 and at most 1: a law is of models"
                " whose learning rate fell to 0"
            )
        if t.decay == 1 and t.warmup:
            raise UsageError(
                f"train.decay=1 leaves no step for train.warmup={t.warmup}; give train.warmup=0, or"
                " a decay below 1"
            )
        self.pretraining(g.sizes[0], g.seeds[0], None, 1, 0, 1, t.precision).validate()

    def training(self, steps: int, rise: int, fall: int, precision: str) -> TrainConfig:
        """A cell's options as pretraining takes them, in one process; `rise` and `fall` in steps."""
        shared = {
            f.name: getattr(self.train, f.name)
            for f in fields(CellTraining)
            if f.name not in ("warmup", "decay", "precision")
        }
        return TrainConfig(
            **shared,
            steps=steps,
            warmup=share(rise, steps),
            decay=share(fall, steps),
            precision=precision,
        )

    def pretraining(
        self,
        size: str,
        seed: int,
        unique: int | None,
        steps: int,
        rise: int,
        fall: int,
        precision: str,
    ) -> PretrainConfig:
        """The pretrain job that makes the world of a cell."""
        train = self.training(steps, rise, fall, precision)
        model = ModelConfig(**{**vars(self.model), "size": size})
        data = DataConfig(list(self.data.datasets), unique)
        return PretrainConfig(
            seed=seed,
            storage=self.storage,
            tracking=self.tracking,
            ray=self.ray,
            data=data,
            model=model,
            train=train,
        )

    def fall(self, steps: int) -> int:
        """Steps of decay in a cell of so many."""
        return length(self.train.decay, steps)


def what(config: SweepConfig) -> dict[str, Any]:
    """The part of `config` that says which table is made."""
    return identity(config, without=("large", "workers", "concurrent", "cluster", "data"))


def _distinct(name: str, values: Sequence[Any] | None, least: int) -> None:
    if values is None:
        return
    if len(values) < least:
        raise UsageError(f"{name}=[] must name at least one")
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{name}={list(values)} names {value} twice; name each once")
        if name in ("grid.data", "grid.flops", "grid.unique") and not (
            math.isfinite(value) and value > 0
        ):
            raise UsageError(f"{name}={list(values)} holds {value}; give numbers above 0")
        if name in ("grid.data", "grid.flops") and value > LARGEST[name]:
            raise UsageError(
                f"{name}={list(values)} holds {value:g}; {LARGEST[name]:g} is the most that can be"
                " meant"
            )
