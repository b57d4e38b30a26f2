"""Open-loop error: logged actions played in the world from logged states, against what truly
followed.

Numbers are compared normalised (each over its standard deviation in the data), categories by
equality. The reference is persistence, the prediction that nothing changes: a ratio of 1 is no
better than that. At horizon h the error is of o_{t+h} alone, for starts t drawn uniformly from all
logged states with h steps left; "full" starts at an episode's first state and compares its last. A
world with history is given the true steps before a start, up to `warmup`.

Two predictions are reported: the mean over several sampled rollouts, each with one member (members
in turn), and a single rollout. What a model samples well has the smaller ratio in the first; what
an agent lives in is the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.loading.codec import Codec
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics import stats
from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.spec import Parts
from mesocosm.model.world import Carry, Context, World
from mesocosm.train.prepare import transitions

Array = NDArray[Any]
Progress = Callable[[str], None]
"""Told in a few words how far a long computation is."""
HORIZONS: tuple[int | str, ...] = (1, 5, 15, 50, "full")
FULL_EPISODES = 16
"""Episodes rolled out in full at most."""
ROWS = 2048
"""Environments that step together at most."""


def silent(text: str) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Row:
    """One horizon. None where the data cannot say."""

    horizon: str
    steps: float
    """Steps ahead; for "full" the mean length of the episodes"""
    starts: int
    episodes: int
    ratio: float | None = None
    """RMSE over persistence's, of the mean of the sampled rollouts"""
    interval: stats.Interval | None = None
    """90% bootstrap interval of `ratio`, resampled by episode"""
    single: float | None = None
    """The same ratio for a single sampled rollout"""
    typical: float | None = None
    """The ratio of the median errors: far below `ratio` where rare events (a collision never seen
    in training) own the mean
    """
    persistence: float | None = None
    """Persistence's RMSE, normalised"""
    linear: float | None = None
    """The ratio of a linear model: ridge regression of the change on (1, o, a, task), fitted on the
    training split and iterated
    """
    coverage: float | None = None
    """Share of true numbers between the lowest and the highest of the sampled rollouts, true ones
    spread over their bin: `nominal` where the world is calibrated; None without numbers, or with
    one sample
    """
    coverage_interval: stats.Interval | None = None
    accuracy: float | None = None
    """Share of category slots that the most frequent category of the rollouts has right; None
    without categories
    """
    accuracy_interval: stats.Interval | None = None
    persistence_accuracy: float | None = None


@dataclass(frozen=True)
class OpenLoop:
    rows: tuple[Row, ...]
    split: Split
    samples: int
    warmup: int
    notes: tuple[str, ...]

    @property
    def nominal(self) -> float:
        """What the range of `samples` exchangeable draws covers of one more: 90% for 19."""
        return (self.samples - 1) / (self.samples + 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"nominal": self.nominal}


def codec_of(world: World) -> Codec:
    return Codec.from_json(world.codec)


class Log:
    """Logged steps as a world's parts, for any (episode, step) of one split."""

    def __init__(self, dataset: Dataset, codec: Codec, split: Split):
        check_dataset(dataset, codec)
        self.dataset, self.codec, self.split = dataset, codec, split
        self.episodes: Array = dataset.episodes(split)
        self.lengths: Array = dataset.table["length"][self.episodes].astype(np.int64)
        self._options = codec.option_rows(
            dataset.options, dataset.option_numbers, dataset.option_values
        )

    def _gather(self, name: str, episode: Array, step: Array) -> Array:
        """`episode` [n] positions in the split, `step` [n, ...] -> rows [n, ..., columns]."""
        table = self.dataset.table[self.episodes[episode]]
        first = table["first_row"].reshape(-1, *(1,) * (step.ndim - 1))
        return self.dataset.gather(name, table["shard"], first + step)

    def observation(self, episode: Array, step: Array) -> Parts:
        return self.codec.observation_parts(
            self._gather("obs_num", episode, step), self._gather("obs_cat", episode, step)
        )

    def action(self, episode: Array, step: Array) -> Parts:
        return self.codec.action_parts(
            self._gather("act_num", episode, step), self._gather("act_cat", episode, step)
        )

    def task(self, episode: Array) -> Parts:
        zero = np.zeros(len(episode), np.int64)
        options = self._options[self.episodes[episode]]
        return self.codec.task_parts(
            self._gather("obs_num", episode, zero), self._gather("obs_cat", episode, zero), options
        )

    def outcome(self, episode: Array, step: Array) -> tuple[Array, Array]:
        """(raw reward [n], terminated [n]) of transitions."""
        return self._gather("reward", episode, step), self._gather(
            "terminated", episode, step
        ).astype(bool)

    def starts(
        self, horizon: int, limit: int, generator: np.random.Generator
    ) -> tuple[Array, Array]:
        """At most `limit` distinct (episode, step) with at least `horizon` steps left, drawn
        uniformly from all such.
        """
        room = np.maximum(self.lengths - horizon + 1, 0)
        ends = np.cumsum(room)
        total = int(ends[-1]) if len(ends) else 0
        chosen = np.sort(generator.choice(total, size=min(limit, total), replace=False))
        episode = np.searchsorted(ends, chosen, "right")
        return episode, chosen - (ends - room)[episode]


def check_dataset(dataset: Dataset, codec: Codec) -> None:
    """Raise UsageError where a dataset is of other spaces than the world's."""
    for what in ("observation_space", "action_space"):
        theirs, own = getattr(dataset, what), getattr(codec, what)
        if theirs != own:
            raise UsageError(
                f"dataset {', '.join(dataset.ids)} has {what} {theirs}, the world {own}; evaluate"
                " the world on data of its own environment"
            )


def begin_at(
    world: World, log: Log, episode: Array, step: Array, member: Tensor, warmup: int
) -> Carry:
    """A session that stands at o_step of each logged episode [n], having seen the up to `warmup`
    true steps before it.
    """
    columns = min(warmup, world.net.memory)
    observation, task = (
        log.observation(episode, step).to(world.device),
        log.task(episode).to(world.device),
    )
    if not columns:
        return world.begin(task, observation, member)
    before = step[:, None] - columns + np.arange(columns)
    seen = np.maximum(before, 0)
    context = Context(
        clock=columns,
        past_observation=log.observation(episode, seen),
        past_action=log.action(episode, seen),
        start_column=torch.from_numpy((before < 0).sum(1)),
        observation=observation,
        task=task,
        member=member,
    )
    return world.restore(context)


def open_loop(
    world: World,
    dataset: Dataset,
    *,
    horizons: Sequence[int | str] = HORIZONS,
    starts: int = 128,
    samples: int = 19,
    seed: int = 0,
    warmup: int | None = None,
    split: Split = "valid",
    linear: Base | None = None,
    progress: Progress = silent,
) -> OpenLoop:
    """The table of open-loop errors of `world` on the validation split of `dataset`.

    Args:
        starts: logged states at most, for each horizon.
        samples: sampled rollouts from each start; their mean is the prediction.
        warmup: true steps of history given before a start; None is half of the world's context.
        linear: the linear model to compare with; None: `linear_model` of the dataset.
        progress: called with a few words on each imagined step.

    Falls back on the training split, with a note, where validation holds fewer than two episodes.
    Raises UsageError where the dataset is of other spaces.
    """
    codec = codec_of(world)
    warmup = world.net.memory // 2 if warmup is None else min(warmup, world.net.memory)
    notes: list[str] = []
    if split == "valid" and len(dataset.episodes("valid")) < 2:
        split = "train"
        notes.append(
            f"validation holds {len(dataset.episodes('valid'))} episodes, too few: these are errors"
            " on the training split."
        )
    log = Log(dataset, codec, split)
    linear = linear_model(dataset, codec) if linear is None else linear
    rows = []
    for number, horizon in enumerate(horizons):
        generator = np.random.default_rng([seed, number])
        if horizon == "full":
            drawn = generator.permutation(len(log.episodes))[:FULL_EPISODES]
            rows.append(
                _measure(
                    world,
                    log,
                    "full",
                    np.sort(drawn),
                    np.zeros(len(drawn), np.int64),
                    None,
                    samples,
                    seed + number,
                    0,
                    notes,
                    linear,
                    progress,
                )
            )
            continue
        steps = int(horizon)
        episode, step = log.starts(steps, starts, generator)
        rows.append(
            _measure(
                world,
                log,
                str(horizon),
                episode,
                step,
                steps,
                samples,
                seed + number,
                warmup,
                notes,
                linear,
                progress,
            )
        )
    return OpenLoop(tuple(rows), split, samples, warmup, tuple(notes))


def _measure(
    world: World,
    log: Log,
    name: str,
    episode: Array,
    step: Array,
    horizon: int | None,
    samples: int,
    seed: int,
    warmup: int,
    notes: list[str],
    linear: Base,
    progress: Progress,
) -> Row:
    ahead = log.lengths[episode] if horizon is None else np.full(len(episode), horizon)
    if not len(episode):
        notes.append(
            f"horizon {name}: no {'validation' if log.split == 'valid' else 'training'} episode is"
            " that long."
        )
        return Row(name, float(horizon or 0), 0, 0)

    def report(text: str) -> None:
        progress(f"horizon {name}, {text}")

    imagined = rollouts(world, log, episode, step, ahead, samples, seed, warmup, report)
    numbers, categories = imagined
    truth, start = log.observation(episode, step + ahead), log.observation(episode, step)
    true_numbers, first_numbers = truth.numbers.double().numpy(), start.numbers.double().numpy()
    ratio = interval = single = typical = persistence = straight = coverage = covered = accuracy = (
        accurate
    ) = persistence_accuracy = None
    groups = np.unique(episode, return_inverse=True)[1]
    if true_numbers.shape[1]:
        none = ((first_numbers - true_numbers) ** 2).mean(-1)
        mean = ((numbers.mean(1) - true_numbers) ** 2).mean(-1)
        each = ((numbers - true_numbers[:, None]) ** 2).mean((1, 2))
        persistence = float(np.sqrt(none.mean()))
        if samples > 1:
            inside = _inside(
                numbers,
                true_numbers,
                np.array(world.spec.observation.bins),
                np.random.default_rng([seed, 1]),
            )
            coverage, covered = stats.mean_of_groups(
                np.bincount(groups, weights=inside.mean(-1)), np.bincount(groups), seed=seed
            )
        if not np.isfinite(each).all():
            notes.append(
                f"horizon {name}: rollouts from {int((~np.isfinite(each)).sum())} of {len(each)}"
                " starts left the finite numbers; the error is infinite."
            )
        elif persistence == 0:
            notes.append(
                f"horizon {name}: persistence makes no error here, so the ratio is undefined."
            )
        else:
            by_episode = [np.bincount(groups, weights=values) for values in (mean, none)]
            ratio, single = stats.ratio_of_rms(mean, none), stats.ratio_of_rms(each, none)
            interval = stats.ratio_interval(*by_episode, seed=seed)
            typical = stats.ratio_of_rms(np.median(mean), np.median(none))
            with np.errstate(over="ignore"):
                straight = stats.ratio_of_rms(
                    ((_iterated(linear, log, episode, step, ahead) - true_numbers) ** 2).mean(-1),
                    none,
                )
            if straight is not None and not np.isfinite(straight):
                straight = None
                notes.append(f"horizon {name}: the linear model left the finite numbers.")
    if truth.categories.shape[1]:
        true_categories = truth.categories.numpy()
        right = (_most_frequent(categories) == true_categories).mean(-1)
        accuracy, accurate = stats.mean_of_groups(
            np.bincount(groups, weights=right), np.bincount(groups), seed=seed
        )
        persistence_accuracy = float((start.categories.numpy() == true_categories).mean())
    return Row(
        name,
        float(ahead.mean()),
        len(episode),
        len(np.unique(episode)),
        ratio,
        interval,
        single,
        typical,
        persistence,
        straight,
        coverage,
        covered,
        accuracy,
        accurate,
        persistence_accuracy,
    )


def _inside(numbers: Array, truth: Array, bins: Array, generator: np.random.Generator) -> Array:
    """[n, d] bool: the truth is within the range of the samples [n, S, d]. A logged number stands
    for its whole bin, and sampled ones fill it.
    """
    spread = truth + (generator.random(truth.shape) - 0.5) * bins
    return (numbers.min(1) <= spread) & (spread <= numbers.max(1))


def linear_model(dataset: Dataset, codec: Codec) -> Base:
    """The base's own ridge regression of the training split, without its network."""
    return Base.fit(codec.spec, ModelConfig(members=1), transitions(dataset, codec), 0, steps=0)


def _iterated(linear: Base, log: Log, episode: Array, step: Array, ahead: Array) -> Array:
    """The linear model's numbers `ahead` [n] steps after each start, [n, d]; categories stay what
    they were at the start.
    """
    now, task = log.observation(episode, step), log.task(episode)
    found = now.numbers.double().numpy().copy()
    for t in range(int(ahead.max())):
        action = log.action(episode, np.minimum(step + t, log.lengths[episode] - 1))
        now = Parts(now.numbers + linear(now, action, task)[0], now.categories)
        found[ahead == t + 1] = now.numbers.double().numpy()[ahead == t + 1]
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf, neginf=-np.inf)


def rollouts(
    world: World,
    log: Log,
    episode: Array,
    step: Array,
    ahead: Array,
    samples: int,
    seed: int,
    warmup: int,
    progress: Progress = silent,
) -> tuple[Array, Array]:
    """Sampled observations `ahead` [n] steps after each start: numbers [n, samples, d] float64
    normalised, categories [n, samples, m].

    Terminations that the world samples are passed over: the logged episode went on.
    """
    numbers = np.zeros((len(episode), samples, world.spec.observation.numbers))
    categories = np.zeros((len(episode), samples, len(world.spec.observation.categories)), np.int64)
    order = np.argsort(ahead, kind="stable")
    width = max(1, ROWS // samples)
    for chunk in (order[i : i + width] for i in range(0, len(order), width)):
        rows = np.repeat(chunk, samples)
        draw = np.tile(np.arange(samples), len(chunk))
        member = torch.from_numpy(draw % world.config.members).to(world.device)
        carry = begin_at(world, log, episode[rows], step[rows], member, warmup)
        diverged = np.zeros(len(rows), np.bool_)
        last = int(ahead[chunk].max())
        for t in range(last):
            progress(f"step {t + 1} of {last}")
            at = np.minimum(step[rows] + t, log.lengths[episode[rows]] - 1)
            action = log.action(episode[rows], at).to(world.device)
            keys = rng.keys(
                seed,
                torch.from_numpy(rows).to(world.device),
                torch.from_numpy(draw).to(world.device),
                t,
            )
            carry, out = world.step(carry, action, keys)
            diverged |= out.diverged.cpu().numpy()
            ended = ahead[rows] == t + 1
            if ended.any():
                seen = np.where(
                    diverged[:, None], np.inf, out.observation.numbers.cpu().double().numpy()
                )
                numbers[rows[ended], draw[ended]] = seen[ended]
                categories[rows[ended], draw[ended]] = out.observation.categories.cpu().numpy()[
                    ended
                ]
    return numbers, categories


def _most_frequent(categories: Array) -> Array:
    """[n, samples, m] -> [n, m]; the smallest of equals."""
    values = np.arange(categories.max() + 1)
    return (categories[..., None] == values).sum(1).argmax(-1)
