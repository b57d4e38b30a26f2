"""From a sweep's config to its cells: exact parameters, counted FLOPs, transitions and steps.
Imports no Ray and trains nothing.

A cell is a model of one size, trained once on D transitions, of which U are different, from one
seed. Its id is a hash of everything that decides its result, so that two sweeps with the same cell
share it.

Cells that differ in D alone share a *trunk*: warm-up and a constant learning rate over the one
order of samples that the seed draws. A cell forks off the trunk `decay` steps before its end and
decays to 0 there. It equals a separate run to the last bit. Every U has separate trunks, because
the base is fitted on all of U. A D that several U hold without a repeat is trained with the
smallest of them only: a law, which uses min(D, U), sees one cell.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import fingerprint
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.model import counts
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.train import prepare
from mesocosm.train.config import TrainConfig
from mesocosm.train.engine import least_gib
from mesocosm.versions import VERSIONS

SCHEMA = 1
"""Version of the meaning of a cell's id and record."""


@dataclass(frozen=True)
class Cell:
    id: str
    trunk: str
    """Hash of what it shares with the cells of its trunk."""
    size: str
    seed: int
    target: float
    """The grid's D, or its C."""
    unique_limit: int | None
    """The grid's U. None: all."""
    steps: int
    warmup: int
    """Steps of warm-up."""
    decay: int
    """Steps of decay."""
    data: int
    """Transitions seen, exactly. Batches are of windows, so that D is met to half a batch."""
    unique: int
    params: int
    total_params: int
    flops: int
    """Counted FLOPs of a separate run."""
    lr: float
    large: bool
    identity: dict[str, Any] = field(compare=False)
    """The facts that `id` hashes."""

    @property
    def fork(self) -> int:
        """Steps that it shares with the trunk."""
        return self.steps - self.decay

    @property
    def epochs(self) -> float:
        return self.data / self.unique


@dataclass(frozen=True)
class Trunk:
    """Cells of one (size, seed, U) that train together, ascending in steps."""

    id: str
    model: ModelConfig
    options: TrainConfig
    """Options of all cells. Its steps, warm-up and decay are those of one of them."""
    seed: int
    unique: int | None
    cells: tuple[Cell, ...]

    @property
    def steps(self) -> int:
        return sum(self.ran(i) for i in range(len(self.cells)))

    @property
    def flops(self) -> int:
        return sum(cell.flops // cell.steps * self.ran(i) for i, cell in enumerate(self.cells))

    def ran(self, i: int) -> int:
        """Steps that run for cell `i`: the trunk's since the last fork, and its decay."""
        return self.cells[i].steps - (self.cells[i - 1].fork if i else 0)


@dataclass(frozen=True)
class Grid:
    config: SweepConfig
    precision: str
    cells: tuple[Cell, ...]
    dataset: Dataset
    codec: Codec
    cluster: ClusterConfig

    def trunks(self, cells: Iterable[Cell]) -> list[Trunk]:
        """The trunks of the small ones among `cells`, the longest first."""
        by_trunk: dict[str, list[Cell]] = {}
        for cell in cells:
            if not cell.large:
                by_trunk.setdefault(cell.trunk, []).append(cell)
        trunks = []
        for id, group in by_trunk.items():
            c, members = group[0], tuple(sorted(group, key=lambda cell: cell.steps))
            options = self.config.training(c.steps, c.warmup, c.decay, self.precision)
            model = replace(self.config.model, size=c.size)
            trunks.append(Trunk(id, model, options, c.seed, c.unique_limit, members))
        return sorted(trunks, key=lambda trunk: -self.cluster.seconds(trunk.flops, trunk.steps))

    def workers(self, cell: Cell) -> int:
        return self.config.workers if cell.large else 1

    def expected(self, cells: Sequence[Cell], *, alone: bool = False) -> dict[str, float]:
        """Estimated worker seconds of each cell by id. With `alone`, without trunks."""
        seconds = {}
        for cell in cells:
            if cell.large or alone:
                count = self.workers(cell)
                seconds[cell.id] = self.cluster.seconds(cell.flops, cell.steps, count) * count
        for trunk in [] if alone else self.trunks(cells):
            for i, cell in enumerate(trunk.cells):
                ran = trunk.ran(i)
                seconds[cell.id] = self.cluster.seconds(cell.flops // cell.steps * ran, ran)
        return seconds

    def hours(self, cells: Sequence[Cell], *, alone: bool = False) -> float:
        """Estimated hours on the cluster: `concurrent` trunks at once, then the large cells."""
        expected, concurrent = self.expected(cells, alone=alone), self.config.concurrent
        small: dict[str, float] = {}
        for cell in cells:
            if not cell.large:
                unit = cell.id if alone else cell.trunk
                small[unit] = small.get(unit, 0.0) + expected[cell.id]
        workers, slots = self.config.workers, self.cluster.slots
        large = [expected[cell.id] / workers for cell in cells if cell.large]
        seconds = _makespan(small.values(), min(concurrent, slots))
        return (seconds + _makespan(large, min(concurrent, slots // workers))) / 3600

    def memory_gib(self, trunks: Sequence[Trunk]) -> float:
        """Host memory that the largest concurrent trunks, or the largest large cell, need."""
        c, on_gpu = self.config, self.cluster.gpus > 0
        small = [
            least_gib(trunk.cells[0].total_params, trunk.options, 1, on_gpu=on_gpu)
            for trunk in trunks
        ]
        options = c.training(1, 0, 1, self.precision)
        large = [
            least_gib(cell.total_params, options, c.workers, on_gpu=on_gpu)
            for cell in self.cells
            if cell.large
        ]
        return max(sum(sorted(small, reverse=True)[: c.concurrent]), *large, 0.0)

    def summary(self, done: set[str]) -> dict[str, Any]:
        """The cells, and what those that are not `done` would cost, for `--dry-run`."""
        missing = [cell for cell in self.cells if cell.id not in done]
        trunks, large = self.trunks(missing), [cell for cell in missing if cell.large]
        steps = {cell.id: trunk.ran(i) for trunk in trunks for i, cell in enumerate(trunk.cells)}
        steps |= {cell.id: cell.steps for cell in large}
        expected, price = self.expected(missing), self.cluster.price_per_hour
        together, alone = self.hours(missing), self.hours(missing, alone=True)
        price_per_second = together * price / max(sum(expected.values()), 1e-9)
        rows = [
            {
                "cell": cell.id[:8],
                "size": cell.size,
                "params": cell.params,
                "total": cell.total_params,
                "data": cell.data,
                "unique": cell.unique,
                "epochs": round(cell.epochs, 2),
                "seed": cell.seed,
                "steps": cell.steps,
                "flops": cell.flops,
                "trunk": "a job" if cell.large else cell.trunk[:6],
                "steps to run": steps.get(cell.id, 0),
                "worker hours": round(expected.get(cell.id, 0.0) / 3600, 4),
                "price": round(expected.get(cell.id, 0.0) * price_per_second, 4),
                "state": "finished" if cell.id in done else "to do",
            }
            for cell in self.cells
        ]
        return {
            "datasets": ", ".join(self.dataset.ids),
            "cluster": self.config.cluster,
            "precision": self.precision,
            "cells": rows,
            "finished": f"{len(self.cells) - len(missing)} of {len(self.cells)} cells",
            "trunks": len(trunks),
            "steps": sum(steps.values()),
            "steps without trunks": sum(cell.steps for cell in missing),
            "flops": sum(trunk.flops for trunk in trunks) + sum(cell.flops for cell in large),
            "flops without trunks": sum(cell.flops for cell in missing),
            "memory_gib": round(self.memory_gib(trunks), 2),
            "hours": round(together, 4),
            "hours without trunks": round(alone, 4),
            "price": f"{together * price:g} {self.cluster.currency}",
            "price without trunks": f"{alone * price:g} {self.cluster.currency}",
        }


def _makespan(seconds: Iterable[float], slots: int) -> float:
    """When the last of several tasks ends that `slots` (at least one) take up, longest first."""
    free = [0.0] * max(slots, 1)
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def lay_out(config: SweepConfig, dataset: Dataset, cluster: ClusterConfig) -> Grid:
    """The grid of `config` on `dataset`.

    Raises:
        UsageError: a value that cannot be trained: a D below one batch, a U above the training
            data, an empty validation split, or a warm-up that does not end before the decay.
    """
    config.validate()
    ids = ", ".join(dataset.ids)
    if not len(dataset.episodes("valid")):
        message = f"the valid split of {ids} is empty, and a sweep measures the loss on it"
        raise UsageError(f"{message}; collect with valid_fraction above 0")
    transitions = dataset.count("train")
    for value in config.grid.unique or ():
        if value > transitions:
            message = f"grid.unique must be <= the {transitions} training transitions of {ids}"
            raise UsageError(f"{message}, got {value}; collect more, or lower it")
    codec, precision = prepare.fit_codec(dataset), resolved_precision(config, cluster)

    @cache
    def loader(unique: int | None, seed: int) -> Loader:
        view = prepare.narrowed(dataset, unique, seed)
        return Loader(view, codec, "train", config.model.context, config.train.batch, seed)

    cells: list[Cell] = []
    seeds = sorted(config.grid.seeds)
    uniques: list[int | None] = [None]
    if config.grid.unique is not None:
        uniques = [*sorted(config.grid.unique)]
    for size in config.grid.sizes:
        fresh: set[tuple[float, int]] = set()
        for unique, seed in product(uniques, seeds):
            batches = loader(unique, seed)
            for cell in _cells(config, precision, codec, dataset.ids, size, unique, batches):
                if cell.data <= cell.unique:
                    if (cell.target, seed) in fresh:
                        continue
                    fresh.add((cell.target, seed))
                cells.append(cell)
    if any(cell.large for cell in cells):
        options = config.training(1, 0, 1, precision)
        options.workers = config.workers
        config.pretraining(config.grid.sizes[0], 0, None, options).validate()
    return Grid(config, precision, tuple(cells), dataset, codec, cluster)


def resolved_precision(config: SweepConfig, cluster: ClusterConfig) -> str:
    """`train.precision`, with `auto` resolved for the cluster."""
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16" if cluster.gpus else "fp32"


def _cells(
    config: SweepConfig,
    precision: str,
    codec: Codec,
    datasets: list[str],
    size: str,
    unique: int | None,
    loader: Loader,
) -> list[Cell]:
    """The cells of one size, U and seed, ascending in steps."""
    grid, train, transitions = config.grid, config.train, loader.transitions_per_epoch
    model = replace(config.model, size=size)
    params = counts.params(codec.spec, model)
    step_flops = prepare.step_flops(codec.spec, model, config.training(1, 0, 1, precision))
    key, targets, unit = "flops", sorted(grid.flops), float(step_flops)
    if grid.data:
        key, targets = "data", sorted(grid.data)
        unit = train.batch * transitions / loader.windows_per_epoch
    options = {name: value for name, value in asdict(train).items() if name != "decay"}
    shared = {
        "family": config.model.family,
        "model": asdict(model),
        "train": options | {"precision": precision},
        "datasets": datasets,
        "codec": codec.id,
        "unique": transitions,
        "seed": loader.seed,
    }
    versions = VERSIONS["pretrain"], VERSIONS["sweep"], SCHEMA
    cells: list[Cell] = []
    for target in targets:
        if target < unit:
            step = f"a batch, about {unit:.0f} transitions"
            if not grid.data:
                step = f"one step of {size}, {unit:.3g} FLOPs"
            fix = "use more, or lower train.batch"
            raise UsageError(f"grid.{key}={target:.6g} is less than {step}; {fix}")
        steps = round(target / unit)
        decay = config.decay_steps(steps)
        if cells and cells[-1].steps == steps:
            values = f"{cells[-1].target:g} and {target:g}"
            message = f"grid.{key} {values} are both {steps} steps of {size}"
            raise UsageError(f"{message}; give values further apart")
        if train.warmup > steps - decay:
            least = _least_steps(config)
            message = f"grid.{key}={target:g} is {steps} steps of {size}, which are fewer than"
            message += f" train.warmup={train.warmup} and the {decay} of its decay"
            enough = f"{least * unit:.3g}" if key == "flops" else f"{math.ceil(least * unit)}"
            fix = f"use at least {enough} ({least} steps), a shorter warm-up, or sweep {size} apart"
            raise UsageError(f"{message}; {fix}")
        identity = shared | {"steps": steps, "fall": decay}
        cells.append(
            Cell(
                id=fingerprint("cell", identity, *versions),
                trunk=fingerprint("trunk", shared, *versions),
                size=size,
                seed=loader.seed,
                target=target,
                unique_limit=unique,
                steps=steps,
                warmup=train.warmup,
                decay=decay,
                data=loader.transitions_seen(steps),
                unique=transitions,
                params=params.n,
                total_params=params.total,
                flops=steps * step_flops,
                lr=train.lr,
                large=params.n > config.large,
                identity=identity,
            )
        )
    return cells


def _least_steps(config: SweepConfig) -> int:
    """The fewest steps that hold the warm-up and the decay."""
    warmup, steps = config.train.warmup, 1
    while steps - config.decay_steps(steps) < warmup:
        steps += 1
    return steps
