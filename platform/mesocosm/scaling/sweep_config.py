"""The config of a sweep: a grid of sizes, data and seeds, and how its cells are trained. Imports
neither Ray nor torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mesocosm import checks
from mesocosm.config import JobConfig, identity
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import nominal
from mesocosm.train.config import DataConfig, PretrainConfig, TrainConfig
from mesocosm.train.schedule import length, share

LARGEST = {"data": 1e15, "flops": 1e27}
"""The largest values of `grid.*`. Larger ones are typing errors."""
INSTEAD = {"seed": "grid.seeds", "model.size": "grid.sizes", "data.unique": "grid.unique"}
"""Keys that a sweep does not read, and those that replace them."""


@dataclass
class GridConfig:
    """The cells are sizes x (data or flops) x unique x seeds."""

    sizes: list[str] = field(default_factory=list)
    """Rungs of the model's ladder, as in [10k, 30k, 100k]."""
    data: list[int] = field(default_factory=list)
    """D: training transitions that a cell sees, repeats counted. Either this or `flops`."""
    flops: list[float] = field(default_factory=list)
    """C: IsoFLOP budgets. Each size sees as many transitions as its counted FLOPs allow."""
    unique: list[int] | None = None
    """U: different transitions that a cell trains on. null: all training transitions."""
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class CellTraining:
    """How every cell is trained. The grid sets its steps."""

    batch: int = 32
    """Windows a step."""
    lr: float = 6e-3
    """At the ladder's base width; see model/mup.py."""
    weight_decay: float = 0.01
    warmup: int = 20
    """Steps in which the learning rate rises from 0. All cells share it, so that they share trunks
    and a changed grid keeps its results.
    """
    decay: float = 0.3
    """Share of a cell's steps in which the learning rate falls to 0. A cell does not share these
    steps with the larger cells of its trunk.
    """
    clip: float = 1.0
    corrupt_history: float = 0.0
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: fp32 on CPU, bf16 on CUDA."""
    validate_windows: int = 2048
    """The most windows of the validation split, the same for all cells."""


@dataclass
class SweepConfig(JobConfig):
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    train: CellTraining = field(default_factory=CellTraining)
    large: int = 10_000_000
    """A cell with more parameters is a pretrain job of several workers. Smaller ones share warm
    processes and trunks.
    """
    workers: int = 2
    """Workers of a large cell."""
    concurrent: int = 2
    """Trunks that train at once, with one worker each."""
    cluster: str = "local"
    """`clusters/NAME.yaml`, for the estimates of hours and price."""

    def validate(self) -> None:
        """Check the values alone. Raises UsageError with the key, its value and the fix."""
        grid, train, default = self.grid, self.train, SweepConfig()
        for key, fix in INSTEAD.items():
            block, _, name = key.rpartition(".")
            config, plain = (getattr(c, block) if block else c for c in (self, default))
            if (value := getattr(config, name)) != getattr(plain, name):
                raise UsageError(f"{key}={value} is not read by a sweep; give {fix}=[{value}]")
        for key in ("weights", "block", "cache_gib"):
            if (value := getattr(self.data, key)) is not None:
                fix = "leave it out, or pretrain the sizes one by one"
                raise UsageError(f"data.{key}={value} is not read by a sweep; {fix}")
        if self.model.pretrained is not None:
            raise UsageError(
                f"model.pretrained must be left out of a sweep, whose sizes are trained from"
                f" scratch, got {self.model.pretrained!r}"
            )
        if not grid.sizes:
            fix = "give rungs of the ladder, as in grid.sizes=[10k,30k,100k]"
            raise UsageError(f"grid.sizes must not be empty; {fix}")
        for size in grid.sizes:
            nominal(size, "grid.sizes")
        if bool(grid.data) == bool(grid.flops):
            both = f"grid.data={grid.data} and grid.flops={grid.flops} are both set"
            message = both if grid.data else "neither grid.data nor grid.flops is set"
            raise UsageError(f"{message}; give the transitions that cells see, or their FLOPs")
        for key, values in vars(grid).items():
            if values is None:
                continue
            if not values and key not in ("data", "flops"):
                raise UsageError(f"grid.{key} must not be empty, got []")
            for value in values:
                if values.count(value) > 1:
                    text = f"grid.{key}={list(values)} names {value} twice"
                    raise UsageError(f"{text}; name each value once")
                if key in ("data", "flops", "unique") and not (math.isfinite(value) and value > 0):
                    raise UsageError(f"grid.{key} must hold finite numbers above 0, got {value}")
                if key in LARGEST and value > LARGEST[key]:
                    raise UsageError(f"grid.{key} must be <= {LARGEST[key]:g}, got {value:g}")
        if not 0 <= min(grid.seeds) <= max(grid.seeds) < 2**32:
            raise UsageError(f"grid.seeds must be in [0, 2**32), got {grid.seeds}")
        checks.at_least(self, 1, "large", "workers", "concurrent")
        checks.at_least(self, 0, "train.warmup")
        # A law is of models whose learning rate fell to 0.
        checks.within(self, 0, 1, "train.decay", open="[")
        if train.decay == 1 and train.warmup:
            message = f"train.decay=1 leaves no step for train.warmup={train.warmup}"
            raise UsageError(f"{message}; give train.warmup=0, or a decay below 1")
        options = self.training(1, 0, 1, train.precision)
        self.pretraining(grid.sizes[0], grid.seeds[0], None, options).validate()

    def training(self, steps: int, warmup: int, decay: int, precision: str) -> TrainConfig:
        """A cell's options for pretraining in one process. All lengths are in steps."""
        options = asdict(self.train) | {"precision": precision, "steps": steps}
        options |= {"warmup": share(warmup, steps), "decay": share(decay, steps)}
        return TrainConfig(**options)

    def pretraining(
        self, size: str, seed: int, unique: int | None, train: TrainConfig
    ) -> PretrainConfig:
        """The pretrain job that makes the world of a cell."""
        return PretrainConfig(
            seed=seed,
            storage=self.storage,
            tracking=self.tracking,
            ray=self.ray,
            data=replace(self.data, datasets=list(self.data.datasets), unique=unique),
            model=replace(self.model, size=size),
            train=train,
        )

    def decay_steps(self, steps: int) -> int:
        """Steps of decay in a cell of `steps` steps."""
        return length(self.train.decay, steps)

    def table_identity(self) -> dict[str, Any]:
        """The keys that determine the table together with the datasets."""
        facts = identity(self, without=("large", "workers", "concurrent", "cluster", "data"))
        tokenizer = self.data.tokenizer
        return facts if tokenizer is None else facts | {"data": {"tokenizer": tokenizer}}
