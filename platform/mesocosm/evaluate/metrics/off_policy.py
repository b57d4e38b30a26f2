"""Is the world right away from its data: errors on episodes of other behaviours, by their distance
from the logs, and whether the members' disagreement knows where it is wrong.

The distance of a behaviour is the mean negative log density of its actions under a clone of the
logs' behaviour, per step (nats).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.format.episode import Episode
from mesocosm.data.format.manifest import Environment
from mesocosm.data.format.writer import write_dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.fidelity import Fidelity, fidelity
from mesocosm.evaluate.metrics.open_loop import (
    Array,
    Log,
    Progress,
    begin_at,
    codec_of,
    linear_model,
    silent,
)
from mesocosm.model import rng
from mesocosm.model.base import MAX_CARDINALITY
from mesocosm.model.world import World

CLONE_STEPS, CLONE_BATCH, CLONE_HIDDEN = 600, 256, 64
LARGE = 0.9
"""An error above this quantile of the errors on validation is large."""
TRANSITIONS = 2048
"""Of a behaviour that are looked at, at most."""


@dataclass(frozen=True)
class Errors:
    """One-step errors of a world on logged transitions, each from its true state."""

    error: Array
    """[N] root mean square over the normalised numbers of (members' mean - truth), categories
    counted 1 where most members are wrong
    """
    disagreement: Array
    """[N] mean over members, on the world's scale"""
    group: Array
    """[N] episode, numbered 0..n-1"""
    diverged: int
    """Steps at which a member left all bounds: their error and disagreement are the largest float
    """


@dataclass(frozen=True)
class Behaviour:
    """A row of the table: episodes of one behaviour, and how the world fares on them."""

    name: str
    divergence: float | None
    """Nats a step under the clone; None where the action space leaves nothing to say"""
    transitions: int
    fidelity: Fidelity
    error: float
    """Median one-step error"""
    disagreement: float
    """Median"""
    large: float
    """Share of transitions with an error above what a tenth of validation's exceed"""
    auroc: float | None
    """Does disagreement tell those from the others here; None where there is only one kind"""
    auroc_interval: stats.Interval | None
    logged: bool = False
    """Some of the world's data are of this behaviour"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fidelity": self.fidelity.to_json()}


@dataclass(frozen=True)
class OffPolicy:
    behaviours: tuple[Behaviour, ...]
    """By divergence, nearest first"""
    logs: float | None
    """Divergence of the held-out logs themselves"""
    auroc: float | None
    """Over validation and all behaviours' transitions together"""
    auroc_interval: stats.Interval | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "behaviours": [behaviour.to_json() for behaviour in self.behaviours],
        }


def one_step_errors(world: World, dataset: Dataset, split: Split, *, seed: int = 0) -> Errors:
    """Of a uniform draw of at most TRANSITIONS transitions of the split. What a member draws stands
    for its expectation: over K members it averages out.
    """
    log = Log(dataset, codec_of(world), split)
    members = world.config.members
    episode, step = log.starts(1, TRANSITIONS, np.random.default_rng([seed, 5]))
    truth = log.observation(episode, step + 1)
    drawn, categories, apart = [], [], []
    diverged = np.zeros(len(episode), np.bool_)
    for member in range(members):
        chosen = torch.full((len(episode),), member, device=world.device)
        carry = begin_at(world, log, episode, step, chosen, world.net.memory // 2)
        keys = rng.keys(seed, torch.arange(len(episode), device=world.device), member, 0)
        _, out = world.step(carry, log.action(episode, step).to(world.device), keys)
        drawn.append(out.observation.numbers.cpu().double())
        categories.append((out.observation.categories.cpu() != truth.categories).double())
        apart.append(out.disagreement.cpu().double())
        diverged |= out.diverged.cpu().numpy()
    squares = [
        (torch.stack(drawn).mean(0) - truth.numbers.double()).pow(2),
        (torch.stack(categories).mean(0) > 0.5).double(),
    ]
    error = torch.cat(squares, -1).mean(-1).sqrt().numpy()
    most = np.finfo(np.float64).max
    disagreement = np.where(diverged, most, torch.stack(apart).mean(0).numpy())
    return Errors(
        np.where(diverged, most, error),
        disagreement,
        np.unique(episode, return_inverse=True)[1],
        int(diverged.sum()),
    )


def off_policy(
    world: World,
    logs: Dataset,
    behaviours: Sequence[tuple[str, Sequence[Episode]]],
    *,
    horizons: Sequence[int | str],
    starts: int,
    samples: int,
    seed: int = 0,
    progress: Progress = silent,
) -> OffPolicy:
    """`behaviours`: (name, real episodes that were never trained on). `logs`: the world's own
    datasets, whose validation split sets the scale.
    """
    codec = codec_of(world)
    held: Split = "valid" if len(logs.episodes("valid")) >= 2 else "train"
    notes = (
        []
        if held == "valid"
        else ["validation is too small: what a large error is, is taken from the training split."]
    )
    near = one_step_errors(world, logs, held, seed=seed)
    bound = float(np.quantile(near.error, LARGE))
    alone = world.config.members == 1
    if alone:
        notes.append(
            "the world has one member, which cannot disagree: whether disagreement knows where it"
            " is wrong is undefined."
        )

    def large(error: Array) -> Array:
        # Errors of categories alone are few values, and the bound may be the largest of them.
        return error >= bound if (near.error > bound).sum() == 0 and bound > 0 else error > bound

    clone, linear = Clone.fit(logs, codec, seed), linear_model(logs, codec)
    rows: list[Behaviour] = []
    pooled = [near]
    for name, episodes in behaviours:
        with tempfile.TemporaryDirectory() as folder:
            data = _dataset(
                Path(folder) / "episodes", episodes, logs, codec.environment["task"], seed
            )
            far = one_step_errors(world, data, "train", seed=seed)
            found = fidelity(
                world,
                data,
                horizons=horizons,
                starts=starts,
                samples=samples,
                seed=seed,
                split="train",
                linear=linear,
                progress=partial(_of, progress, name),
            )
            area, interval = (
                (None, None) if alone else stats.auc(large(far.error), far.disagreement, far.group)
            )
            if far.diverged:
                notes.append(
                    f"{name}: {far.diverged} of {len(far.error)} steps left all bounds; they count"
                    " as the largest errors."
                )
            rows.append(
                Behaviour(
                    name,
                    clone.divergence(data, codec, "train"),
                    data.transitions,
                    found,
                    float(np.median(far.error)),
                    float(np.median(far.disagreement)),
                    float(large(far.error).mean()),
                    area,
                    interval,
                )
            )
            pooled.append(far)
            del data
    offsets = np.cumsum([0, *(int(e.group.max()) + 1 for e in pooled)])
    group = np.concatenate([e.group + offset for e, offset in zip(pooled, offsets, strict=False)])
    error, apart = (
        np.concatenate([e.error for e in pooled]),
        np.concatenate([e.disagreement for e in pooled]),
    )
    area, interval = (None, None) if alone else stats.auc(large(error), apart, group)
    rows.sort(key=lambda row: -np.inf if row.divergence is None else row.divergence)
    return OffPolicy(tuple(rows), clone.divergence(logs, codec, held), area, interval, tuple(notes))


def _of(progress: Progress, behaviour: str, text: str) -> None:
    progress(f"{behaviour}: {text}")


def _dataset(
    folder: Path, episodes: Sequence[Episode], logs: Dataset, task: list[str], seed: int
) -> Dataset:
    """A dataset of the world's spaces that lasts as long as its folder; everything is in its
    training split.
    """
    write_dataset(
        folder,
        list(episodes),
        id=folder.name,
        environment=Environment(id="held out", task=task),
        observation_space=logs.observation_space,
        action_space=logs.action_space,
        seed=seed,
        valid_fraction=0.0,
    )
    return Dataset([folder])


class Clone(nn.Module):
    """p(a | o, task) of the logs: an MLP to a Gaussian of each number of the action and the logits
    of each category.

    Numbers are normalised; their standard deviations are at least FLOOR, below which a
    deterministic logger's density has no bound.
    """

    FLOOR = 0.05

    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec
        spec = codec.spec
        self.numbers, self.categories = spec.action.numbers, spec.action.categories
        width = 1 + sum(
            part.numbers + sum(c for c in part.categories if c <= MAX_CARDINALITY)
            for part in (spec.observation, spec.task)
        )
        self.net = nn.Sequential(
            nn.Linear(width, CLONE_HIDDEN),
            nn.Tanh(),
            nn.Linear(CLONE_HIDDEN, CLONE_HIDDEN),
            nn.Tanh(),
            nn.Linear(CLONE_HIDDEN, 2 * self.numbers + sum(self.categories)),
        )

    @staticmethod
    def fit(dataset: Dataset, codec: Codec, seed: int) -> Clone:
        """On the training split, by Adam for CLONE_STEPS steps; the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            clone = Clone(codec)
        log = Log(dataset, codec, "train")
        episode, step = log.starts(1, 200_000, np.random.default_rng(seed))
        x, action = clone._inputs(log, episode, step), log.action(episode, step)
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(clone.parameters(), lr=3e-3)
        for _ in range(CLONE_STEPS if len(x) else 0):
            rows = torch.randint(len(x), (CLONE_BATCH,), generator=generator)
            loss = clone._nats(x[rows], action[rows].numbers, action[rows].categories).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return clone

    def _inputs(self, log: Log, episode: Array, step: Array) -> Tensor:
        """[N, F]: numbers and small categories (one-hot) of observation and task."""
        spec = self.codec.spec
        columns = [torch.ones(len(episode), 1)]
        for part, values in (
            (spec.observation, log.observation(episode, step)),
            (spec.task, log.task(episode)),
        ):
            columns.append(values.numbers)
            columns += [
                F.one_hot(values.categories[:, i], c).float()
                for i, c in enumerate(part.categories)
                if c <= MAX_CARDINALITY
            ]
        return torch.cat(columns, -1)

    def _nats(self, x: Tensor, numbers: Tensor, categories: Tensor) -> Tensor:
        """[N] negative log density"""
        mean, raw, logits = self.net(x).split(
            [self.numbers, self.numbers, sum(self.categories)], -1
        )
        deviation = F.softplus(raw) + self.FLOOR
        nats = (
            0.5 * ((numbers - mean) / deviation).pow(2) + deviation.log() + 0.5 * np.log(2 * np.pi)
        ).sum(-1)
        for i, each in enumerate(
            logits.split(list(self.categories), -1) if self.categories else ()
        ):
            nats = nats + F.cross_entropy(each, categories[:, i], reduction="none")
        return nats

    @torch.no_grad()
    def divergence(self, dataset: Dataset, codec: Codec, split: Split) -> float | None:
        """Mean nats a step of the split's actions; None where the action holds neither numbers nor
        categories.
        """
        if not self.numbers and not self.categories:
            return None
        log = Log(dataset, codec, split)
        episode, step = log.starts(1, TRANSITIONS, np.random.default_rng(0))
        action = log.action(episode, step)
        return float(
            self._nats(self._inputs(log, episode, step), action.numbers, action.categories).mean()
        )
