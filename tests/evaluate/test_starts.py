"""Generated starts against real ones: generators of known faults, and a real world's start model
before and after it has learned.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.windows import start_parts
from mesocosm.datasets.dataset import Dataset, Environment
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics.starts import LEAST, TaskDistribution, task_distribution
from mesocosm.model.tensors import Parts

from . import worlds
from .worlds import KnownWorld

Draw = Callable[[np.random.Generator], Any]
GOAL = spaces.Dict(
    goal=spaces.Dict(
        at=spaces.Box(-3.0, 3.0, (1,), np.float64), name=spaces.Text(4, min_length=1, charset="abc")
    ),
    body=spaces.Box(-np.inf, np.inf, (2,), np.float64),
    count=spaces.Box(0, 9, (1,), np.int64),
    lamp=spaces.Discrete(3),
)


def goal(rng: np.random.Generator) -> dict[str, Any]:
    """Two of body lie on a line with the goal; the count is a small integer; the last of body is a
    constant.
    """
    at = rng.uniform(-2, 2, 1)
    name = "".join(rng.choice(list("abc"), int(rng.integers(1, 4))))
    return {
        "goal": {"at": at, "name": name},
        "body": np.array([at[0] + 0.1 * rng.normal(), 7.0]),
        "count": rng.integers(0, 4, 1),
        "lamp": rng.integers(0, 2),
    }


def point(rng: np.random.Generator) -> Any:
    return rng.normal(size=3)


POINTS = spaces.Box(-5.0, 5.0, (3,), np.float64)


def reality(
    folder: Path,
    draw: Draw,
    space: Any,
    episodes: int,
    valid_fraction: float = 0.5,
    task: Sequence[str] = (),
    options: Callable[[Any], Any] | None = None,
) -> Dataset:
    """Episodes of two steps whose starts are `draw`n, and whose later observations are other draws
    with the same task.
    """
    rng, done = np.random.default_rng(5), []
    for k in range(episodes):
        observations = [draw(rng) for _ in range(3)]
        if task:
            same = {name: observations[0][name] for name in task}
            observations = [o | same for o in observations]
        done.append(episode(k, observations, options(rng) if options else {}))
    environment = Environment(id="starts", task=[*task, *done[0].task])
    return worlds.dataset(folder, done, environment, (space, spaces.Discrete(2)), valid_fraction)


def episode(k: int, observations: list[Any], task: dict[str, Any]) -> Episode:
    actions, rewards = [np.int64(0)] * 2, np.zeros(2)
    return Episode(k, k, "random", observations, actions, rewards, "truncated", task=task)


def memory_of(dataset: Dataset, noise: float = 0.0) -> Generator:
    """A generator that repeats the training starts, with `noise`."""
    train = [dataset.episode(int(e)).observations[0] for e in dataset.episodes("train")]

    def draw(rng: np.random.Generator) -> Any:
        start = train[rng.integers(len(train))]
        return start + noise * point(rng) if noise else start

    return Generator(dataset, draw)


class Generator(KnownWorld):
    """A world of the dataset's codec whose starts are `draw`n anew, `change`d as parts."""

    def __init__(
        self,
        dataset: Dataset,
        draw: Draw,
        change: Callable[[Parts, Parts], None] | None = None,
        options: Callable[[Any], Any] | None = None,
    ):
        super().__init__(Codec.fit(dataset))
        self.draw, self.change, self.options = draw, change, options

    def sample_start(self, keys: Tensor) -> tuple[Parts, Parts]:
        rng = np.random.default_rng([77, int(keys[0]) & 0xFFFF])
        raw = [self.draw(rng) for _ in keys]
        options_drawn = [self.options(rng) for _ in keys] if self.options else None
        space = SpaceCodec(self.fitted.observation_space)
        batch = space.decode(*space.encode_list(raw))
        task, observation = self.fitted.task(batch, options_drawn), self.fitted.observation(batch)
        if self.change:
            self.change(task, observation)
        return task, observation


def judged(world: Any, dataset: Dataset, **rest: Any) -> TaskDistribution:
    """The figures of `world`, which are valid JSON and lie in their intervals."""
    result = task_distribution(world, dataset, **rest)
    assert json.loads(json.dumps(asdict(result), allow_nan=False))["pairs"] == result.pairs
    for name in ("in_space", "in_range", "validity", "coverage", "auc", "copies"):
        value = getattr(result, name)
        assert (0 <= value <= 1) if value is not None else result.notes, name
    for name in ("validity", "coverage", "auc", "nearest_ratio"):
        value, interval = getattr(result, name), getattr(result, f"{name}_interval")
        assert interval is None or interval[0] <= value <= interval[1], name
    return result


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return reality(tmp_path_factory.mktemp("data") / "points", point, POINTS, 700)


@pytest.fixture(scope="module")
def goals(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return reality(tmp_path_factory.mktemp("data") / "goals", goal, GOAL, 700, task=["goal"])


@pytest.mark.integration
@pytest.mark.parametrize("which", ["points", "goals"])
def test_the_true_distribution_is_not_told_from_reality(
    which: str, request: pytest.FixtureRequest
) -> None:
    dataset: Dataset = request.getfixturevalue(which)
    world = Generator(dataset, {"points": point, "goals": goal}[which])
    began = time.process_time()
    result = judged(world, dataset)
    assert time.process_time() - began < 30
    assert result.real == result.pairs == len(dataset.episodes("valid")) > 250
    assert result.split == "valid" and result.generated == 512
    assert 0.43 < result.auc < 0.57 and result.auc_interval[0] < 0.55
    assert result.coverage == pytest.approx(result.coverage_expected, abs=0.06)
    assert result.coverage_expected == pytest.approx(1 - 2**-5, abs=0.01)
    assert result.in_space == 1 and result.validity > 0.95 and result.validity_real > 0.95
    assert 0.8 < result.nearest_ratio < 1.25 and result.copies == result.copies_real == 0
    assert result.notes == ()
    again = task_distribution(Generator(dataset, world.draw), dataset)
    assert again == result, "the same seed gives the same figures"
    assert task_distribution(world, dataset, seed=1).nearest != result.nearest


def test_a_shift_is_detected(points: Dataset) -> None:
    result = judged(Generator(points, lambda rng: point(rng) + np.array([4, 0, 0])), points)
    assert result.auc > 0.95 and result.auc_interval[0] > 0.9
    assert result.coverage < 0.2 and result.validity < 0.6
    small = judged(Generator(points, lambda rng: point(rng) + np.array([1, 0, 0])), points)
    assert 0.65 < small.auc < 0.85 and small.coverage > result.coverage


def test_a_fault_that_the_marginals_hide_is_detected(goals: Dataset) -> None:
    """The body of one draw with the goal of another."""
    result = judged(Generator(goals, lambda rng: goal(rng) | {"goal": goal(rng)["goal"]}), goals)
    assert result.auc > 0.8 and result.validity > 0.95


def test_a_generator_of_one_mode_covers_little(points: Dataset) -> None:
    result = judged(Generator(points, lambda rng: 0.2 * point(rng)), points)
    assert result.validity == 1 and result.coverage < 0.5 and result.auc > 0.8


@pytest.mark.integration
def test_a_memory_is_detected(points: Dataset) -> None:
    exact = judged(memory_of(points), points)
    assert exact.auc < 0.7 and exact.coverage > 0.8 and exact.validity > 0.95
    assert exact.copies == 1 and exact.copies_real == 0
    assert exact.nearest == exact.nearest_ratio == 0
    near = judged(memory_of(points, noise=0.01), points)
    assert near.copies == 0 and near.nearest_ratio < 0.1 and near.nearest_ratio_interval[1] < 0.15


def test_digits_below_the_precision_tell_nothing(tmp_path: Path) -> None:
    """Reality knows four values about a large mean; a fraction of a bin beside them is the same
    start, three bins are not.
    """
    draw: Draw = lambda rng: 40 + rng.integers(0, 4, 2) / 100  # noqa: E731
    dataset = reality(tmp_path / "grid", draw, spaces.Box(-np.inf, np.inf, (2,), np.float64), 400)
    precision = Codec.fit(dataset).to_json()["scalings"]["observation"]["precision"][0]
    within: Draw = lambda rng: draw(rng) + rng.uniform(-0.4, 0.4, 2) * precision  # noqa: E731
    same = judged(Generator(dataset, within), dataset)
    assert same.auc < 0.6 and same.copies == same.copies_real == 1
    apart: Draw = lambda rng: draw(rng) + rng.choice([-3, 3], 2) * precision  # noqa: E731
    other = judged(Generator(dataset, apart), dataset)
    assert other.auc > 0.9 and other.copies == 0


def test_starts_outside_the_spaces_are_counted(goals: Dataset) -> None:
    def break_some(task: Parts, observation: Parts) -> None:
        task.numbers[:64] = 1e3  # the Box ends at 3
        task.categories[64:128] = 0  # a text of no characters, where one is the least
        task.categories[128:192] = torch.tensor([1, 0, 1, 0])  # a text that goes on after its end
        observation.categories[192:256] = 3
        observation.numbers[256:320] = torch.nan
        observation.numbers[320:384, 0] = 30.0  # its Box has no end; the real ones do

    result = judged(Generator(goals, goal, break_some), goals)
    assert result.in_space == 1 - 5 / 8 and result.in_range == pytest.approx(1 - 3 / 8, abs=0.02)
    assert result.validity == pytest.approx(1 - 6 / 8, abs=0.02) and result.validity_real > 0.95
    assert "64 of 512 generated starts have numbers that are not finite" in result.notes[0]
    assert result.auc > 0.6

    def break_all(task: Parts, observation: Parts) -> None:
        observation.numbers[:] = torch.inf

    result = judged(Generator(goals, goal, break_all), goals)
    assert result.validity == 0 and result.auc is result.coverage is None
    assert "0 generated starts are too few" in result.notes[1]


@pytest.mark.integration
def test_bounds_hold_to_the_precision_and_reality_may_break_them(tmp_path: Path) -> None:
    narrow = spaces.Box(-1.0, 1.0, (1,), np.float64)
    edge: Draw = lambda rng: rng.choice([-1.0, 1.0], 1)  # noqa: E731
    dataset = reality(tmp_path / "edge", edge, narrow, 100)
    assert judged(Generator(dataset, lambda rng: edge(rng) * (1 + 1e-5)), dataset).in_space == 1
    assert judged(Generator(dataset, lambda rng: edge(rng) * 1.001), dataset).in_space == 0
    broken = reality(tmp_path / "broken", lambda rng: 2 * edge(rng), narrow, 100)
    result = judged(Generator(broken, lambda rng: 2 * edge(rng)), broken)
    assert result.in_space == result.validity_real == 0
    assert "100 of 100 real starts lie outside the environment's own space" in result.notes[0]


def test_constant_starts(tmp_path: Path) -> None:
    moves: Draw = lambda rng: rng.normal(size=2)  # noqa: E731
    rng, start = np.random.default_rng(0), np.array([0.25, -0.5])
    episodes = [episode(k, [start, moves(rng), moves(rng)], {}) for k in range(80)]
    space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    dataset = worlds.dataset(
        tmp_path / "s", episodes, Environment(id="still"), (space, spaces.Discrete(2))
    )
    same = judged(Generator(dataset, lambda rng: start.copy()), dataset)
    assert same.auc == 0.5
    assert same.coverage == same.validity == same.copies == same.copies_real == 1
    assert same.nearest == same.nearest_real == 0 and same.nearest_ratio is None
    assert "starts are the same" in same.notes[0]
    assert "there is no distance to compare with" in same.notes[-1]
    near = judged(Generator(dataset, lambda rng: start + 0.001 * rng.normal(size=2)), dataset)
    assert near.auc > 0.9, "a jitter that matters to nobody is detected: hence the note"
    assert near.coverage == near.validity == 1
    note = "2 numbers are constant among the real starts and not among the generated"
    assert note in near.notes[1]
    far = judged(Generator(dataset, moves), dataset)
    assert far.auc > 0.9 and far.validity < 0.1 and far.nearest > 0.5


@pytest.mark.integration
def test_categories_only(tmp_path: Path) -> None:
    space = spaces.Dict(room=spaces.Discrete(6), name=spaces.Text(3, min_length=0, charset="ab"))
    draw: Draw = lambda rng: {"room": rng.integers(0, 6), "name": "ab"[: rng.integers(0, 3)]}  # noqa: E731
    dataset = reality(tmp_path / "rooms", draw, space, 400)
    result = judged(Generator(dataset, draw), dataset)
    assert 0.4 < result.auc < 0.6
    assert result.coverage == result.copies == result.copies_real == result.validity == 1
    assert result.nearest_ratio is None and "copies are no fault" in result.notes[-1]
    half = judged(Generator(dataset, lambda rng: draw(rng) | {"room": rng.integers(0, 2)}), dataset)
    assert half.auc > 0.75 and half.coverage < 0.5


@pytest.mark.integration
def test_reset_options_are_part_of_a_start(tmp_path: Path) -> None:
    def options(rng: np.random.Generator) -> dict[str, Any]:
        return {"mass": float(rng.uniform(1, 2)), "map": str(rng.choice(["hill", "lake"]))}

    dataset = reality(tmp_path / "options", point, POINTS, 400, options=options)
    assert judged(Generator(dataset, point, options=options), dataset).auc < 0.6

    def with_option(**fixed: Any) -> TaskDistribution:
        world = Generator(dataset, point, options=lambda rng: options(rng) | fixed)
        return judged(world, dataset)

    heavy = with_option(mass=5.0)
    assert heavy.auc > 0.95 and heavy.validity == 0
    assert heavy.in_space == 1, "an option has no bounds but those of the data"
    hills = with_option(map="hill")
    assert 0.65 < hills.auc < 0.85 and hills.validity > 0.9


@pytest.mark.integration
def test_too_few_starts(points: Dataset, tmp_path: Path) -> None:
    small = reality(tmp_path / "small", point, POINTS, 60, valid_fraction=0.1)
    assert len(small.episodes("valid")) < LEAST <= len(small.episodes("train"))
    result = judged(Generator(small, point), small)
    assert result.split == "train" and result.validity_real is None
    assert "compared with those of the training split" in result.notes[0]
    assert 0.3 < result.auc < 0.7 and result.coverage > 0.85 and 0.7 < result.nearest_ratio < 1.4
    assert result.copies_real == 0, "a start is not its own neighbour"
    assert "below 100 it overlooks small differences" in result.notes[-1]
    memory = judged(memory_of(small), small)
    assert memory.copies == 1 and memory.nearest_ratio == 0
    tiny = reality(tmp_path / "tiny", point, POINTS, 8)
    result = judged(Generator(tiny, point), tiny)
    assert result.in_space == 1 and result.pairs == 0
    for name in ("validity", "auc", "coverage", "nearest", "copies"):
        assert getattr(result, name) is None
    assert "validity needs 20" in result.notes[0] and "need 20 of each side" in result.notes[1]
    untrained = reality(tmp_path / "untrained", point, POINTS, 40, valid_fraction=0.8)
    result = judged(Generator(untrained, point), untrained)
    assert result.auc is not None and result.coverage is result.copies is None
    assert "training starts are too few" in result.notes[-1]
    result = judged(Generator(points, point), points, starts=10)
    assert result.validity is not None and result.auc is None
    assert "10 generated starts are too few" in result.notes[0]


@pytest.mark.integration
def test_starts_of_judged_episodes_are_held_out_ones(tmp_path: Path) -> None:
    """They complete a validation split that is too small; then a memory shows."""
    small = reality(tmp_path / "small", point, POINTS, 60, valid_fraction=0.1)
    few = len(small.episodes("valid"))
    more = Generator(small, point).sample_start(torch.arange(4321, 4381))
    result = judged(Generator(small, point), small, more=more)
    assert result.split == "valid" and result.real == few + 60
    assert result.copies == 0 and 0.3 < result.auc < 0.7
    memory = judged(memory_of(small), small, more=more)
    assert memory.copies == 1 and memory.copies_real < 0.1 and memory.nearest_ratio == 0


def test_a_world_of_other_spaces_is_refused(points: Dataset, goals: Dataset) -> None:
    with pytest.raises(UsageError, match="has observation_space"):
        task_distribution(Generator(points, point), goals)


@pytest.mark.integration
def test_a_real_world_that_learns_its_starts(tmp_path: Path) -> None:
    walks = worlds.collect(tmp_path / "walks", 300, valid_fraction=0.4, limit=2)
    world = worlds.untrained_world(walks, family="ensemble")
    world.base.start.fit(*start_parts(walks, Codec.fit(walks)))
    after = judged(world, walks)
    assert after.auc < 0.62
    assert after.coverage > 0.9 and after.validity > 0.9
    assert math.isclose(after.nearest_ratio, 1, abs_tol=0.4)
