"""From a sweep's config to its cells: exact parameters, counted FLOPs, transitions, steps. Pure: no
Ray, nothing is trained.

A cell is a model of one size trained once, on D transitions of U different ones, from one seed. Its
id is a hash of all that decides its result, so two sweeps that ask for the same cell share it.
Cells that differ in D alone share a *trunk*: warm-up, then a constant learning rate, over the one
order of samples that the seed draws. A cell leaves the trunk `fall` steps before its end and decays
to 0 there; it is the same, to the last bit, as a run of its own. Every U has trunks of its own, for
the base is fitted on all U. A D that several U hold without a repetition is trained with the
smallest of them only: to a law, which knows min(D, U), those cells are one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import fingerprint
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import UsageError
from mesocosm.model import counts
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.train import prepare
from mesocosm.train.config import TrainConfig
from mesocosm.versions import VERSIONS

SCHEMA = 1
"""Of what a cell's id and its record mean."""


@dataclass(frozen=True)
class Cell:
    id: str
    trunk: str
    """Hash of what it shares with the cells of its trunk."""
    size: str
    seed: int
    asked: float
    """The grid's D, or its C."""
    narrowed: int | None
    """The grid's U; None: all."""
    steps: int
    rise: int
    """Steps of warm-up."""
    fall: int
    """Steps of decay."""
    data: int
    """Transitions that are seen, exactly: batches are of windows, so D is met to half a batch."""
    unique: int
    params: int
    total_params: int
    flops: int
    """Counted, of a run of its own."""
    lr: float
    large: bool
    what: dict[str, Any] = field(compare=False)
    """What `id` is a hash of, before it is hashed."""

    @property
    def fork(self) -> int:
        """The trunk's steps that it has in common."""
        return self.steps - self.fall

    @property
    def epochs(self) -> float:
        return self.data / self.unique


@dataclass(frozen=True)
class Trunk:
    """Cells of one (size, seed, U) that are trained together, from the first fork to the last."""

    id: str
    model: ModelConfig
    options: TrainConfig
    """Of all cells; its steps, warm-up and decay are not read."""
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
        """Steps that are run for cell `i`: the trunk's since the last fork, and its own decay."""
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
        """The trunks of the small ones among `cells`, the longest first, so that the last to end
        are short.
        """
        by_trunk: dict[str, list[Cell]] = {}
        for cell in cells:
            if not cell.large:
                by_trunk.setdefault(cell.trunk, []).append(cell)
        made = []
        for id, some in by_trunk.items():
            first = some[0]
            options = self.config.training(first.steps, first.rise, first.fall, self.precision)
            model = _sized(self.config.model, first.size)
            made.append(
                Trunk(
                    id,
                    model,
                    options,
                    first.seed,
                    first.narrowed,
                    tuple(sorted(some, key=lambda cell: cell.steps)),
                )
            )
        return sorted(made, key=lambda trunk: -self.cluster.seconds(trunk.flops, trunk.steps))

    def expected(self, cells: Iterable[Cell], *, alone: bool = False) -> dict[str, float]:
        """Estimated seconds of all workers together for each of `cells`, trained together; `alone`:
        without trunks.
        """
        some = list(cells)
        single = [cell for cell in some if cell.large or alone]
        found = {
            cell.id: (
                self.cluster.seconds(cell.flops, cell.steps, self.workers(cell))
                * self.workers(cell)
            )
            for cell in single
        }
        for trunk in [] if alone else self.trunks(some):
            for i, cell in enumerate(trunk.cells):
                found[cell.id] = self.cluster.seconds(
                    cell.flops // cell.steps * trunk.ran(i), trunk.ran(i)
                )
        return found

    def hours(self, cells: Sequence[Cell], *, alone: bool = False) -> float:
        """Estimated hours on the cluster: the trunks, `concurrent` at once, then the large cells."""
        expected, c = self.expected(cells, alone=alone), self.config
        together: dict[str, float] = {}
        for cell in cells:
            if not cell.large:
                unit = cell.id if alone else cell.trunk
                together[unit] = together.get(unit, 0.0) + expected[cell.id]
        large = [expected[cell.id] / c.workers for cell in cells if cell.large]
        slots = self.cluster.slots
        return (
            _makespan(together.values(), min(c.concurrent, slots))
            + _makespan(large, min(c.concurrent, slots // c.workers))
        ) / 3600

    def workers(self, cell: Cell) -> int:
        return self.config.workers if cell.large else 1


def _makespan(seconds: Iterable[float], lanes: int) -> float:
    """When the last of several ends that `lanes` of (at least one) take up, the longest first."""
    free = [0.0] * max(lanes, 1)
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def lay_out(config: SweepConfig, dataset: Dataset, cluster: ClusterConfig) -> Grid:
    """The grid of `config` on `dataset`. Raises UsageError for what cannot be: a D below one batch,
    a U that the data have not, no validation split, a warm-up that is longer than what comes before
    the decay.
    """
    config.validate()
    if not len(dataset.episodes("valid")):
        raise UsageError(
            f"the valid split of {', '.join(dataset.ids)} is empty, and a sweep is measured on it;"
            " collect with valid_fraction above 0"
        )
    have = dataset.count("train")
    for unique in config.grid.unique or ():
        if unique > have:
            raise UsageError(
                f"grid.unique={unique} is more than the {have} training transitions of"
                f" {', '.join(dataset.ids)}; collect more, or lower it"
            )
    codec = prepare.fit_codec(dataset)
    layout = _Layout(config, dataset, codec, precision(config, cluster))
    cells = [cell for size in config.grid.sizes for cell in layout.of_size(size)]
    if any(cell.large for cell in cells):
        job = config.pretraining(config.grid.sizes[0], 0, None, 1, 0, 1, layout.precision)
        job.train.workers = config.workers
        job.validate()
    return Grid(config, layout.precision, tuple(cells), dataset, codec, cluster)


def precision(config: SweepConfig, cluster: ClusterConfig) -> str:
    """What `train.precision` comes to on `cluster`."""
    return (
        config.train.precision
        if config.train.precision != "auto"
        else "bf16"
        if cluster.gpus
        else "fp32"
    )


class _Layout:
    def __init__(self, config: SweepConfig, dataset: Dataset, codec: Codec, precision: str):
        self.config, self.dataset, self.codec, self.precision = config, dataset, codec, precision
        self._loaders: dict[tuple[int | None, int], Loader] = {}

    def of_size(self, size: str) -> list[Cell]:
        config, grid = self.config, self.config.grid
        model = _sized(config.model, size)
        sizes = counts.params(self.codec.spec, model)
        step_flops = prepare.step_flops(
            self.codec.spec, model, config.training(1, 0, 1, self.precision)
        )
        found = []
        fresh: set[tuple[float, int]] = set()
        for unique, seed in product(
            [None] if grid.unique is None else sorted(grid.unique), sorted(grid.seeds)
        ):
            loader = self._loader(unique, seed)
            shared = {
                "family": config.model.family,
                "model": asdict(model),
                "train": (
                    {name: value for name, value in asdict(config.train).items() if name != "decay"}
                    | {"precision": self.precision}
                ),
                "datasets": self.dataset.ids,
                "codec": self.codec.id,
                "unique": loader.transitions_per_epoch,
                "seed": seed,
            }
            trunk = fingerprint("trunk", shared, VERSIONS["pretrain"], VERSIONS["sweep"], SCHEMA)
            before: dict[int, float] = {}
            unit = self._unit(step_flops, loader)
            for asked in sorted(grid.data or grid.flops):
                steps = self._steps(size, asked, unit)
                fall = config.fall(steps)
                self._check(size, asked, steps, fall, before, unit)
                data = loader.transitions_seen(steps)
                if data <= loader.transitions_per_epoch:
                    if (asked, seed) in fresh:
                        continue
                    fresh.add((asked, seed))
                what = shared | {"steps": steps, "fall": fall}
                found.append(
                    Cell(
                        id=fingerprint(
                            "cell", what, VERSIONS["pretrain"], VERSIONS["sweep"], SCHEMA
                        ),
                        trunk=trunk,
                        size=size,
                        seed=seed,
                        asked=asked,
                        narrowed=unique,
                        steps=steps,
                        rise=config.train.warmup,
                        fall=fall,
                        data=data,
                        unique=loader.transitions_per_epoch,
                        params=sizes.n,
                        total_params=sizes.total,
                        flops=steps * step_flops,
                        lr=config.train.lr,
                        large=sizes.n > config.large,
                        what=what,
                    )
                )
        return found

    def _loader(self, unique: int | None, seed: int) -> Loader:
        found = self._loaders.get((unique, seed))
        if found is None:
            config = self.config
            view = prepare.narrowed(self.dataset, unique, seed)
            found = self._loaders[unique, seed] = Loader(
                view, self.codec, "train", config.model.context, config.train.batch, seed
            )
        return found

    def _steps(self, size: str, asked: float, unit: float) -> int:
        """The number nearest to what was asked; of every size alike, for D."""
        if asked < unit and self.config.grid.data:
            raise UsageError(
                f"grid.data={asked:g} is smaller than a batch, about {unit:.0f} transitions; use"
                " more, or lower train.batch"
            )
        if asked < unit:
            raise UsageError(
                f"grid.flops={asked:.3g} is less than one step of {size}, {unit:.3g} FLOPs; use"
                " more, or lower train.batch"
            )
        return round(asked / unit)

    def _unit(self, step_flops: int, loader: Loader) -> float:
        """Of a step, in what the grid asks for: transitions, or FLOPs."""
        return (
            self.config.train.batch * loader.transitions_per_epoch / loader.windows_per_epoch
            if self.config.grid.data
            else float(step_flops)
        )

    def _check(
        self, size: str, asked: float, steps: int, fall: int, before: dict[int, float], unit: float
    ) -> None:
        key = "data" if self.config.grid.data else "flops"
        if steps in before:
            raise UsageError(
                f"grid.{key} {before[steps]:g} and {asked:g} are both {steps} steps of {size}; give"
                " values further apart"
            )
        before[steps] = asked
        if self.config.train.warmup > steps - fall:
            least = _least(self.config)
            what = (
                f"grid.{key}={asked:g} is {steps} steps of {size}, and"
                f" train.warmup={self.config.train.warmup} leaves no room before the {fall} of its"
                " decay"
            )
            enough = f"{least * unit:.3g}" if key == "flops" else f"{math.ceil(least * unit)}"
            raise UsageError(
                f"{what}; use at least {enough} ({least} steps), a shorter warm-up, or sweep {size}"
                " apart"
            )


def _least(config: SweepConfig) -> int:
    """The fewest steps that hold the warm-up and the decay."""
    steps = (
        max(config.train.warmup + 1, int(config.train.warmup / (1 - config.train.decay)) - 2)
        if config.train.warmup
        else 1
    )
    while steps - config.fall(steps) < config.train.warmup:
        steps += 1
    return steps


def _sized(model: ModelConfig, size: str) -> ModelConfig:
    return ModelConfig(**{**vars(model), "size": size})
