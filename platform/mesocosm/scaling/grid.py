"""From a sweep's config to its cells: exact parameters, counted FLOPs, transitions and steps.
Imports no Ray and trains nothing.

A cell is a model of one size, trained once on D transitions, of which U are different, from one
seed. Its id is a hash of everything that decides its result: sweeps share equal cells.

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
from itertools import count, product
from operator import attrgetter
from typing import Any

from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import fingerprint
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.model import counts
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.train import prepare
from mesocosm.train.config import TrainConfig
from mesocosm.train.engine import least_gib
from mesocosm.train.prepare import AnyCodec, AnyLoader
from mesocosm.versions import VERSIONS

SCHEMA = 1
"""Version of the meaning of a cell's id and record."""


@dataclass(frozen=True)
class Cell:
    """A model of one size, trained once. Lengths are in steps."""

    id: str
    trunk: str
    """Hash of the part that it shares with the cells of its trunk."""
    size: str
    seed: int
    target: float
    """The grid's D, or its C."""
    unique_limit: int | None
    """The grid's U. None: all."""
    steps: int
    warmup: int
    decay: int
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
    """Cells of one (size, seed, U) that train together, ascending in steps. A large cell is alone
    and has several workers.
    """

    id: str
    model: ModelConfig
    options: TrainConfig
    """Options of all cells. Its steps, warm-up and decay are the first cell's."""
    seed: int
    unique: int | None
    cells: tuple[Cell, ...]
    workers: int
    seconds: dict[str, float]
    """Expected seconds of each cell by id."""

    @property
    def large(self) -> bool:
        return self.cells[0].large

    def ran(self, i: int) -> int:
        """Steps that run for cell `i`: the trunk's since the last fork, and its decay."""
        return self.cells[i].steps - (self.cells[i - 1].fork if i else 0)


@dataclass(frozen=True)
class Grid:
    config: SweepConfig
    precision: str
    cells: tuple[Cell, ...]
    dataset: Dataset
    codec: AnyCodec
    cluster: ClusterConfig

    def trunks(self, cells: Iterable[Cell], *, alone: bool = False) -> list[Trunk]:
        """The trunks of `cells`, the longest first. With `alone`, one of each cell."""
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            key = cell.id if alone or cell.large else cell.trunk
            groups.setdefault(key, []).append(cell)
        trunks = [
            self._trunk(id, sorted(group, key=attrgetter("steps"))) for id, group in groups.items()
        ]
        return sorted(trunks, key=lambda trunk: -sum(trunk.seconds.values()))

    def _trunk(self, id: str, group: list[Cell]) -> Trunk:
        cells = sorted(group, key=attrgetter("steps"))
        first, workers = cells[0], self.config.workers if cells[0].large else 1
        options = self.config.training(first.steps, first.warmup, first.decay, self.precision)
        model = replace(self.config.model, size=first.size)
        shape = (model, options, first.seed, first.unique_limit, tuple(cells), workers)
        trunk, seconds = Trunk(id, *shape, {}), {}
        for i, cell in enumerate(cells):
            steps = trunk.ran(i)
            flops = cell.flops // cell.steps * steps
            seconds[cell.id] = self.cluster.seconds(flops, steps, workers)
        return replace(trunk, seconds=seconds)

    def hours(self, trunks: Sequence[Trunk]) -> float:
        """Estimated hours on the cluster: `concurrent` trunks at once, then the large cells."""
        seconds = 0.0
        for large in (False, True):
            tasks = [sum(trunk.seconds.values()) for trunk in trunks if trunk.large == large]
            slots = self.cluster.slots // (self.config.workers if large else 1)
            seconds += _makespan(tasks, min(self.config.concurrent, slots))
        return seconds / 3600

    def memory_gib(self, trunks: Sequence[Trunk]) -> float:
        """Host memory that the largest concurrent trunks, or the largest large cell, need."""
        on_gpu = self.cluster.gpus > 0
        needs: dict[bool, list[float]] = {False: [], True: []}
        for trunk in trunks:
            total, workers = trunk.cells[0].total_params, trunk.workers
            gib = least_gib(total, trunk.options, workers, on_gpu=on_gpu)
            needs[trunk.large].append(gib)
        small = sorted(needs[False], reverse=True)[: self.config.concurrent]
        return max(sum(small), *needs[True], 0.0)

    def summary(self, done: set[str]) -> dict[str, Any]:
        """The cells, and what those that are not `done` would cost, for `--dry-run`."""
        missing = [cell for cell in self.cells if cell.id not in done]
        trunks = self.trunks(missing)
        together, alone = self.hours(trunks), self.hours(self.trunks(missing, alone=True))
        steps = {cell.id: trunk.ran(i) for trunk in trunks for i, cell in enumerate(trunk.cells)}
        seconds = worker_seconds(trunks)
        price, tokenizer = self.cluster.price_per_hour, self.config.data.tokenizer
        price_per_second = together * price / max(sum(seconds.values()), 1e-9)
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
                "worker hours": round(seconds.get(cell.id, 0.0) / 3600, 4),
                "price": round(seconds.get(cell.id, 0.0) * price_per_second, 4),
                "state": "finished" if cell.id in done else "to do",
            }
            for cell in self.cells
        ]
        return {
            "datasets": ", ".join(self.dataset.ids),
            **({} if tokenizer is None else {"tokenizer": f"tokenizers/{tokenizer}"}),
            "cluster": self.config.cluster,
            "precision": self.precision,
            "cells": rows,
            "finished": f"{len(self.cells) - len(missing)} of {len(self.cells)} cells",
            "trunks": sum(not trunk.large for trunk in trunks),
            "steps": sum(steps.values()),
            "steps without trunks": sum(cell.steps for cell in missing),
            "flops": sum(cell.flops // cell.steps * steps[cell.id] for cell in missing),
            "flops without trunks": sum(cell.flops for cell in missing),
            "memory_gib": round(self.memory_gib(trunks), 2),
            "hours": round(together, 4),
            "hours without trunks": round(alone, 4),
            "price": f"{together * price:g} {self.cluster.currency}",
            "price without trunks": f"{alone * price:g} {self.cluster.currency}",
        }


def worker_seconds(trunks: Iterable[Trunk]) -> dict[str, float]:
    """Expected worker seconds of each cell by id."""
    return {id: s * trunk.workers for trunk in trunks for id, s in trunk.seconds.items()}


def _makespan(seconds: Iterable[float], slots: int) -> float:
    """When the last of several tasks ends that `slots` (at least one) take up, longest first."""
    free = [0.0] * max(slots, 1)
    for duration in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def lay_out(config: SweepConfig, dataset: Dataset, cluster: ClusterConfig) -> Grid:
    """The grid of `config`, with full ids, on `dataset`.

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
    codec = prepare.fit_codec(dataset, config.model)
    precision = resolved_precision(config, cluster)

    @cache
    def loader(unique: int | None, seed: int) -> AnyLoader:
        view = prepare.narrowed(dataset, unique, seed)
        return prepare.make_loader(view, codec, "train", config.model, config.train.batch, seed)

    cells: list[Cell] = []
    uniques = [None] if config.grid.unique is None else sorted(config.grid.unique)
    for size in config.grid.sizes:
        fresh: set[tuple[float, int]] = set()
        for unique, seed in product(uniques, sorted(config.grid.seeds)):
            batches = loader(unique, seed)
            for cell in _cells(config, precision, codec, dataset.ids, size, unique, batches):
                if cell.data > cell.unique or (cell.target, seed) not in fresh:
                    cells.append(cell)
                if cell.data <= cell.unique:
                    fresh.add((cell.target, seed))
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
    codec: AnyCodec,
    datasets: list[str],
    size: str,
    unique: int | None,
    loader: AnyLoader,
) -> list[Cell]:
    """The cells of one size, U and seed, ascending in steps."""
    grid, train, transitions = config.grid, config.train, loader.transitions_per_epoch
    model = replace(config.model, size=size)
    params = counts.params(codec.spec, model)
    step_flops = prepare.step_flops(codec.spec, model, config.training(1, 0, 1, precision))
    key, targets, unit = "flops", sorted(grid.flops), float(step_flops)
    least_step = f"one step of {size}, {unit:.3g} FLOPs"
    if grid.data:
        key, targets = "data", sorted(grid.data)
        unit = train.batch * transitions / loader.windows_per_epoch
        least_step = f"a batch, about {unit:.0f} transitions"
    options = {name: value for name, value in asdict(train).items() if name != "decay"}
    shared = {
        "family": config.model.family,
        "model": model.to_json(),
        "train": options | {"precision": precision},
        "datasets": datasets,
        "codec": codec.id,
        "unique": transitions,
        "seed": loader.seed,
    }
    if config.data.tokenizer is not None:
        shared["tokenizer"] = config.data.tokenizer
    versions = VERSIONS["pretrain"], VERSIONS["sweep"], SCHEMA
    cells: list[Cell] = []
    for target in targets:
        if target < unit:
            fix = "use more, or lower train.batch"
            raise UsageError(f"grid.{key}={target:.6g} is less than {least_step}; {fix}")
        steps = round(target / unit)
        decay = config.decay_steps(steps)
        if cells and cells[-1].steps == steps:
            text = (
                f"grid.{key} {cells[-1].target:g} and {target:g} are both {steps} steps of {size}"
            )
            raise UsageError(f"{text}; give values further apart")
        if train.warmup > steps - decay:
            least = next(n for n in count(steps) if n - config.decay_steps(n) >= train.warmup)
            text = f"grid.{key}={target:g} is {steps} steps of {size}, which are fewer than"
            text += f" train.warmup={train.warmup} and the {decay} of its decay"
            fix = (
                f"use at least {math.ceil(least * unit):.12g} ({least} steps), or a shorter warm-up"
            )
            raise UsageError(f"{text}; {fix}, or sweep {size} apart")
        identity = shared | {"steps": steps, "fall": decay}
        cell = Cell(
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
        cells.append(cell)
    return cells
