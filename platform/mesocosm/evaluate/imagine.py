"""The same policy in reality and in the world, from the same first states: trajectories side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from mesocosm.data.format.episode import Episode
from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.errors import UsageError
from mesocosm.evaluate.metrics.open_loop import codec_of
from mesocosm.evaluate.report import report
from mesocosm.model import rng
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.policies.policy import Acts


def starts_of(world: World, episodes: Sequence[Episode]) -> tuple[Parts, Parts]:
    """(task, o_0) of real episodes, [n, ...]. Raises UsageError for a task that the world does not
    know.
    """
    codec = codec_of(world)
    space = codec.observation_space
    first = [episode.observations[0] for episode in episodes]
    batch = concatenate(space, first, create_empty_array(space, len(first)))
    return codec.task(batch, [episode.task for episode in episodes]), codec.observation(batch)


def imagine(
    world: World,
    policy: Acts,
    starts: tuple[Parts, Parts],
    horizon: int,
    seed: int,
    samples: int = 1,
) -> list[list[NDArray[np.float64]]]:
    """Play `policy` greedily in the world from each start, `samples` times, each with one member in
    turn.

    Returns for each of the n starts `samples` arrays [T+1, d] of raw numbers and categories (the
    columns of `names`), which end where the world terminates or diverges, or after `horizon` steps.
    """
    codec = codec_of(world)
    columns = SpaceCodec(codec.observation_space)
    count = len(starts[0].numbers)
    row = torch.arange(count).repeat_interleave(samples)
    draw = torch.arange(samples).repeat(count)
    task, observation = starts[0][row].to(world.device), starts[1][row].to(world.device)
    carry = world.begin(task, observation, (draw % world.config.members).to(world.device))
    raw = codec.decode_observation(observation, task)
    path = [_flat(columns, raw)]
    lengths = np.full(count * samples, horizon + 1)
    generator = np.random.default_rng(seed)
    for t in range(horizon):
        action = codec.action(policy.act(raw, False, generator)).to(world.device)
        carry, out = world.step(
            carry, action, rng.keys(seed, row.to(world.device), draw.to(world.device), t)
        )
        raw = codec.decode_observation(out.observation, task)
        path.append(_flat(columns, raw))
        ended = out.terminated.cpu().numpy()
        lengths = np.where(ended, np.minimum(lengths, t + 2), lengths)
        lengths = np.where(out.diverged.cpu().numpy(), np.minimum(lengths, t + 1), lengths)
        if (lengths <= t + 2).all():
            break
    whole = np.stack(path, axis=1)
    return [
        [whole[k * samples + s, : lengths[k * samples + s]] for s in range(samples)]
        for k in range(count)
    ]


def side_by_side(
    world: World,
    policy: Acts,
    episodes: Sequence[Episode],
    *,
    title: str,
    seed: int,
    count: int = 3,
    samples: int = 4,
) -> report.Trajectories:
    """The first `count` judged episodes, and the same policy imagined from their first states for
    as long as they lasted (at most 600 steps).
    """
    shown = list(episodes[:count])
    if not shown:
        raise UsageError("there is no episode to imagine; judge the agent in reality first")
    columns = SpaceCodec(codec_of(world).observation_space)
    horizon = min(600, max(len(episode) for episode in shown))
    imagined = imagine(world, policy, starts_of(world, shown), horizon, seed, samples)
    pairs = []
    for episode, rollouts in zip(shown, imagined, strict=True):
        numbers, categories = columns.encode_list(episode.observations[: horizon + 1])
        real = np.concatenate([numbers, categories], axis=1)
        heading = f"episode {episode.index}: return {episode.total_reward:.0f}, {episode.outcome}"
        pairs.append(report.Episode(heading, real, [r[: len(episode) + 1] for r in rollouts]))
    return report.Trajectories(title, names(columns), pairs)


def names(columns: SpaceCodec) -> list[str]:
    """A short name for each column: numbers, then categories."""
    found = []
    for which in ("numbers", "categories"):
        for leaf in columns.leaves:
            span = getattr(leaf, which)
            name = leaf.name.removeprefix("observation.")
            width = span.stop - span.start
            found += [name if width == 1 else f"{name}[{i}]" for i in range(width)]
    return found


def _flat(columns: SpaceCodec, batch: Any) -> NDArray[np.float64]:
    numbers, categories = columns.encode(batch)
    return np.concatenate([numbers, categories.astype(np.float64)], axis=1)
