"""Errors on episodes of other behaviours than the logs', and whether disagreement predicts them.

The distance of a behaviour is the mean negative log density of its actions under a clone of the
logs' behaviour, per step (nats).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.windows import coded
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.manifest import Environment
from mesocosm.datasets.split import Split, split_to_measure
from mesocosm.datasets.writer import write_dataset
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.fidelity import Fidelity, fidelity
from mesocosm.evaluate.metrics.log import Array, Log, codec_of, single_steps
from mesocosm.evaluate.metrics.open_loop import Progress, linear_model
from mesocosm.model.base import MAX_CARDINALITY
from mesocosm.model.world import World

CLONE_STEPS, CLONE_BATCH, CLONE_HIDDEN = 600, 256, 64
LARGE = 0.9
"""An error above this quantile of the errors on validation is large."""
TRANSITIONS = 2048
"""The most transitions of a behaviour that are measured."""


@dataclass(frozen=True)
class OneStepErrors:
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
    """Steps at which a member diverged; their error and disagreement are the largest float"""

    def __add__(self, other: OneStepErrors) -> OneStepErrors:
        group = np.concatenate([self.group, other.group + self.group.max() + 1])
        error = np.concatenate([self.error, other.error])
        disagreement = np.concatenate([self.disagreement, other.disagreement])
        return OneStepErrors(error, disagreement, group, self.diverged + other.diverged)


@dataclass(frozen=True)
class BehaviourErrors:
    """A row of the table: errors on the episodes of one behaviour."""

    name: str
    divergence: float | None
    """Nats a step under the clone; None where the action space is empty"""
    transitions: int
    fidelity: Fidelity
    error: float
    """Median one-step error"""
    disagreement: float
    """Median"""
    large: float
    """Share of transitions with a larger error than nine tenths of validation's"""
    auroc: float | None
    """AUROC of disagreement for those against the others; None if there is only one kind"""
    auroc_interval: stats.Interval | None
    logged: bool = False
    """Some of the world's data are of this behaviour"""


@dataclass(frozen=True)
class OffPolicy:
    """The table of errors away from the data."""

    behaviours: tuple[BehaviourErrors, ...]
    """By divergence, nearest first"""
    logs: float | None
    """Divergence of the held-out logs themselves"""
    auroc: float | None
    """The value over validation and all behaviours' transitions together"""
    auroc_interval: stats.Interval | None
    notes: tuple[str, ...]


def one_step_errors(
    world: World, dataset: Dataset, split: Split, *, seed: int = 0
) -> OneStepErrors:
    """Measure errors on a uniform draw of at most TRANSITIONS transitions of the split. One draw of
    each member replaces its expectation: the noise averages out over K members.
    """
    log = Log(dataset, codec_of(world), split)
    episode, step = log.starts(1, TRANSITIONS, np.random.default_rng([seed, 5]))
    truth = log.observation(episode, step + 1)
    error, disagreement = np.zeros((2, len(episode)))
    diverged = np.zeros(len(episode), np.bool_)
    for rows, out in single_steps(world, log, (episode, step), seed):
        shape, true = (len(rows), world.config.members), truth[rows]
        seen = out.observation.to("cpu")
        numbers = seen.numbers.double().reshape(*shape, true.numbers.shape[1])
        codes = seen.categories.reshape(*shape, true.categories.shape[1])
        squares = (
            (numbers.mean(1) - true.numbers.double()).pow(2),
            ((codes != true.categories[:, None]).double().mean(1) > 0.5).double(),
        )
        error[rows] = torch.cat(squares, -1).mean(-1).sqrt().numpy()
        assert out.disagreement is not None
        disagreement[rows] = out.disagreement.cpu().double().reshape(shape).mean(1).numpy()
        diverged[rows] = out.diverged.cpu().reshape(shape).any(1).numpy()
    most = np.finfo(np.float64).max
    error, disagreement = (np.where(diverged, most, x) for x in (error, disagreement))
    group = np.unique(episode, return_inverse=True)[1]
    return OneStepErrors(error, disagreement, group, int(diverged.sum()))


def off_policy(
    world: World,
    logs: Dataset,
    behaviours: Sequence[tuple[str, Sequence[Episode]]],
    *,
    horizons: Sequence[int | str],
    starts: int,
    samples: int,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> OffPolicy:
    """Errors on the episodes of each behaviour, which trained nothing.

    Args:
        world: The world.
        logs: Its own datasets, whose validation split sets the scale.
        behaviours: (name, real episodes).
        horizons: As of `open_loop`, and so `starts`, `samples` and `seed`.
        progress: Called on each imagined step.
    """
    codec, notes = codec_of(world), []
    logs = coded(logs, codec)
    split = split_to_measure(len(logs.episodes("valid")), 2)
    if split == "train":
        notes.append(
            "validation is too small: what a large error is, is taken from the training split."
        )
    near = one_step_errors(world, logs, split, seed=seed)
    bound = float(np.quantile(near.error, LARGE))
    if world.config.members == 1:
        notes.append(
            "the world has one member, which cannot disagree: whether disagreement tells where it"
            " is wrong is undefined."
        )

    def large(error: Array) -> Array:
        # Errors of categories alone are few values, and the bound may be the largest of them.
        return error >= bound if (near.error > bound).sum() == 0 and bound > 0 else error > bound

    def auroc(errors: OneStepErrors) -> tuple[float | None, stats.Interval | None]:
        if world.config.members == 1:
            return None, None
        return stats.auc(large(errors.error), errors.disagreement, errors.group)

    clone, linear = Clone.fit(logs, codec, seed), linear_model(logs, codec)
    rows: list[BehaviourErrors] = []
    pooled = near
    for name, episodes in behaviours:

        def report(text: str, name: str = name) -> None:
            progress(f"{name}: {text}")

        with tempfile.TemporaryDirectory() as folder:
            write_dataset(
                Path(folder) / "episodes",
                list(episodes),
                id="episodes",
                environment=Environment(id="held out", task=codec.environment["task"]),
                observation_space=logs.observation_space,
                action_space=logs.action_space,
                seed=seed,
                valid_fraction=0.0,
            )
            data = coded(Dataset([Path(folder) / "episodes"]), codec)
            far = one_step_errors(world, data, "train", seed=seed)
            table = fidelity(
                world,
                data,
                horizons=horizons,
                starts=starts,
                samples=samples,
                seed=seed,
                split="train",
                linear=linear,
                progress=report,
            )
            divergence, transitions = clone.divergence(data, codec, "train"), data.transitions
            del data  # its files are mapped: they end with the folder
        if far.diverged:
            notes.append(
                f"{name}: {far.diverged} of {len(far.error)} steps left all bounds; they count as"
                " the largest errors."
            )
        medians = float(np.median(far.error)), float(np.median(far.disagreement))
        share = float(large(far.error).mean())
        rows.append(
            BehaviourErrors(name, divergence, transitions, table, *medians, share, *auroc(far))
        )
        pooled = pooled + far
    rows.sort(key=lambda row: -np.inf if row.divergence is None else row.divergence)
    logged = clone.divergence(logs, codec, split)
    return OffPolicy(tuple(rows), logged, *auroc(pooled), tuple(notes))


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
        self.numbers, self.categories = spec.action.numbers, list(spec.action.categories)
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
        """Fit the clone on the training split, with CLONE_STEPS steps of Adam. Deterministic in the
        seed.
        """
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
        spec, columns = self.codec.spec, [torch.ones(len(episode), 1)]
        parts = (spec.observation, log.observation(episode, step)), (spec.task, log.task(episode))
        for part, values in parts:
            columns.append(values.numbers)
            for i, cardinality in enumerate(part.categories):
                if cardinality <= MAX_CARDINALITY:
                    columns.append(F.one_hot(values.categories[:, i], cardinality).float())
        return torch.cat(columns, -1)

    def _nats(self, x: Tensor, numbers: Tensor, categories: Tensor) -> Tensor:
        """[N] negative log density"""
        mean, raw, *logits = self.net(x).split([self.numbers] * 2 + self.categories, -1)
        scale = F.softplus(raw) + self.FLOOR
        nats = -torch.distributions.Normal(mean, scale).log_prob(numbers).sum(-1)
        for i, each in enumerate(logits):
            nats = nats + F.cross_entropy(each, categories[:, i], reduction="none")
        return nats

    @torch.no_grad()
    def divergence(self, dataset: Dataset, codec: Codec, split: Split) -> float | None:
        """Mean nats a step of the split's actions; None where the action space is empty."""
        if not self.numbers and not self.categories:
            return None
        log = Log(dataset, codec, split)
        start = log.starts(1, TRANSITIONS, np.random.default_rng(0))
        action = log.action(*start)
        nats = self._nats(self._inputs(log, *start), action.numbers, action.categories)
        return float(nats.mean())
