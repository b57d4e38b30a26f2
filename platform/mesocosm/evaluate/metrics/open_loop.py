"""Open-loop error: logged actions played in the world from logged states, against the logged
observations.

Numbers are normalised by their standard deviation in the data. The reference is persistence, the
prediction that nothing changes. Horizon h is the error of o_{t+h} alone, for starts t drawn from
all logged states with h steps left; "full" starts at an episode's first state and compares its
last. Reported are the mean of several rollouts, with members in turn, and a single rollout, which
an agent lives in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split, split_to_measure
from mesocosm.evaluate.config import HORIZONS
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.log import ROWS, Array, Log, codec_of, play
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.train.prepare import transitions

Progress = Callable[[str], None]
"""Receives in a few words how far a long computation is."""
FULL_EPISODES = 16
"""Episodes rolled out in full at most."""


@dataclass(frozen=True)
class Row:
    """The figures of one horizon. None if the data cannot answer."""

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
    """The ratio of the median errors: far below `ratio` where rare events dominate the mean"""
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
    """The table of open-loop errors."""

    rows: tuple[Row, ...]
    split: Split
    samples: int
    warmup: int
    """True steps of history before a start: half of the world's context"""
    notes: tuple[str, ...]
    nominal: float
    """Coverage of one more draw by the range of `samples` exchangeable ones: 90% for 19."""


def open_loop(
    world: World,
    dataset: Dataset,
    *,
    horizons: Sequence[int | str] = HORIZONS,
    starts: int = 128,
    samples: int = 19,
    seed: int = 0,
    split: Split = "valid",
    linear: Base | None = None,
    progress: Progress = lambda text: None,
) -> OpenLoop:
    """The table of open-loop errors of `world` on a split of `dataset`.

    Args:
        world: The world.
        dataset: Of the world's spaces.
        horizons: Steps ahead, or "full".
        starts: Logged states at most, for each horizon.
        samples: Sampled rollouts from each start; their mean is the prediction.
        seed: Of the starts and the rollouts.
        split: Falls back on "train", with a note, where it holds fewer than two episodes.
        linear: The linear model to compare with. Defaults to `linear_model` of the dataset.
        progress: Called on each imagined step.

    Raises:
        UsageError: The dataset is of other spaces.
    """
    codec = codec_of(world)
    warmup = world.net.memory // 2
    notes: list[str] = []
    count = len(dataset.episodes("valid"))
    if split == "valid" and (split := split_to_measure(count, 2)) == "train":
        few = f"validation holds {count} episodes, too few"
        notes.append(f"{few}: these are errors on the training split.")
    log = Log(dataset, codec, split)
    measure = _Measure(world, log, linear or linear_model(dataset, codec), samples, notes, progress)
    rows = []
    for number, horizon in enumerate(horizons):
        generator = np.random.default_rng([seed, number])
        if horizon == "full":
            episode = np.sort(generator.permutation(len(log.episodes))[:FULL_EPISODES])
            step, ahead = np.zeros(len(episode), np.int64), log.lengths[episode]
        else:
            episode, step = log.starts(int(horizon), starts, generator)
            ahead = np.full(len(episode), int(horizon))
        history = 0 if horizon == "full" else warmup
        rows.append(measure.row(str(horizon), (episode, step), ahead, seed + number, history))
    nominal = (samples - 1) / (samples + 1)
    return OpenLoop(tuple(rows), split, samples, warmup, tuple(notes), nominal)


@dataclass(frozen=True)
class _Measure:
    """Makes the rows of one table, and its notes."""

    world: World
    log: Log
    linear: Base
    samples: int
    notes: list[str]
    progress: Progress

    def row(
        self, name: str, start: tuple[Array, Array], ahead: Array, seed: int, warmup: int
    ) -> Row:
        """The row of a horizon: from (episode, step) [n], `ahead` [n] steps."""
        episode, step = start
        if not len(episode):
            split = "validation" if self.log.split == "valid" else "training"
            self.notes.append(f"horizon {name}: no {split} episode is that long.")
            return Row(name, 0.0 if name == "full" else float(name), 0, 0)
        numbers, categories = self._rollouts(name, start, ahead, seed, warmup)
        truth, first = self.log.observation(episode, step + ahead), self.log.observation(*start)
        group = np.unique(episode, return_inverse=True)[1]
        facts: dict[str, Any] = {}
        if truth.numbers.shape[1]:
            true = truth.numbers.double().numpy()
            still = ((first.numbers.double().numpy() - true) ** 2).mean(-1)
            if self.samples > 1:
                # A logged number represents its whole bin, and sampled numbers fill the bin.
                noise = np.random.default_rng([seed, 1]).random(true.shape) - 0.5
                spread = true + noise * np.array(self.world.spec.observation.bins)
                inside = ((numbers.min(1) <= spread) & (spread <= numbers.max(1))).mean(-1)
                facts["coverage"], interval = stats.grouped_mean(inside, group, seed=seed)
                facts["coverage_interval"] = interval
            facts |= self._errors(name, numbers, true, still, group, seed)
            if "ratio" in facts:
                facts["linear"] = self._linear(name, start, ahead, true, still)
        if truth.categories.shape[1]:
            expected = truth.categories.numpy()
            right = (most_frequent(categories) == expected).mean(-1)
            facts["accuracy"], interval = stats.grouped_mean(right, group, seed=seed)
            unchanged = float((first.categories.numpy() == expected).mean())
            facts |= {"accuracy_interval": interval, "persistence_accuracy": unchanged}
        return Row(name, float(ahead.mean()), len(episode), len(np.unique(episode)), **facts)

    def _rollouts(
        self, name: str, start: tuple[Array, Array], ahead: Array, seed: int, warmup: int
    ) -> tuple[Array, Array]:
        """Sampled observations `ahead` [n] steps after each start: numbers [n, samples, d] float64
        normalised, categories [n, samples, m]. Sampled terminations are ignored: the logged episode
        went on.
        """
        spec, samples = self.world.spec.observation, self.samples
        numbers = np.zeros((len(ahead), samples, spec.numbers))
        categories = np.zeros((len(ahead), samples, len(spec.categories)), np.int64)
        order = np.argsort(ahead, kind="stable")
        width = max(1, ROWS // samples)
        for chunk in (order[i : i + width] for i in range(0, len(order), width)):
            last, shape = int(ahead[chunk].max()), (len(chunk), samples)
            outputs = play(
                self.world, self.log, start, chunk, samples, steps=last, seed=seed, warmup=warmup
            )
            diverged = np.zeros((len(chunk), samples, 1), np.bool_)
            for t, out in enumerate(outputs, 1):
                self.progress(f"horizon {name}, step {t} of {last}")
                diverged |= out.diverged.cpu().numpy().reshape(*shape, 1)
                end, seen = ahead[chunk] == t, out.observation
                values = seen.numbers.cpu().double().numpy().reshape(*shape, spec.numbers)
                numbers[chunk[end]] = np.where(diverged, np.inf, values)[end]
                codes = seen.categories.cpu().numpy().reshape(*shape, len(spec.categories))
                categories[chunk[end]] = codes[end]
        return numbers, categories

    def _errors(
        self, name: str, numbers: Array, true: Array, still: Array, group: Array, seed: int
    ) -> dict[str, Any]:
        """Errors over those of persistence, `still` [n] squared."""
        persistence = {"persistence": float(np.sqrt(still.mean()))}
        mean = ((numbers.mean(1) - true) ** 2).mean(-1)
        each = ((numbers - true[:, None]) ** 2).mean((1, 2))
        infinite = int((~np.isfinite(each)).sum())
        reason = None
        if infinite:
            reason = f"rollouts from {infinite} of {len(each)} starts left the finite numbers; the"
            reason += " error is infinite"
        elif not still.any():
            reason = "persistence makes no error here, so the ratio is undefined"
        if reason is not None:
            self.notes.append(f"horizon {name}: {reason}.")
            return persistence
        interval = stats.grouped_mean(mean, group, weights=still, root=True, seed=seed)[1]
        return persistence | {
            "ratio": stats.ratio_of_rms(mean, still),
            "interval": interval,
            "single": stats.ratio_of_rms(each, still),
            "typical": stats.ratio_of_rms(np.median(mean), np.median(still)),
        }

    def _linear(
        self, name: str, start: tuple[Array, Array], ahead: Array, true: Array, still: Array
    ) -> float | None:
        """The ratio of the linear model, iterated; categories stay as they were at the start."""
        episode, step = start
        now, task = self.log.observation(episode, step), self.log.task(episode)
        predicted = now.numbers.double().numpy().copy()
        for t in range(int(ahead.max())):
            at = np.minimum(step + t, self.log.lengths[episode] - 1)
            change = self.linear(now, self.log.action(episode, at), task)[0]
            now, end = Parts(now.numbers + change, now.categories), ahead == t + 1
            predicted[end] = now.numbers.double().numpy()[end]
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = stats.ratio_of_rms(((predicted - true) ** 2).mean(-1), still)
        if ratio is None or np.isfinite(ratio):
            return ratio
        self.notes.append(f"horizon {name}: the linear model left the finite numbers.")
        return None


def most_frequent(categories: Array) -> Array:
    """[n, m]: the most frequent of the samples [n, S, m], the smallest of equals."""
    ordered = np.sort(categories, 1)
    counts = np.stack([(ordered == ordered[:, k : k + 1]).sum(1) for k in range(ordered.shape[1])])
    best: Array = np.take_along_axis(ordered, counts.argmax(0)[:, None], 1)[:, 0]
    return best


def linear_model(dataset: Dataset, codec: Codec) -> Base:
    """The base's ridge regression of the training split, without its network."""
    config = ModelConfig(members=1, base_steps=0)
    return Base.fit(codec.spec, config, transitions(dataset, codec), 0)
