"""The same policy in reality and in the world, from the same first states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.datasets.episode import Episode
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.evaluate.report import report
from mesocosm.model import rng
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.policies.heads import stack
from mesocosm.policies.policy import Acts, begin_episodes


def starts_of(world: World, episodes: Sequence[Episode]) -> tuple[Parts, Parts]:
    """(task, o_0) of real episodes, [n, ...]. Raises UsageError for a task unknown to the world."""
    codec = codec_of(world)
    first = [episode.observations[0] for episode in episodes]
    batch = stack(codec.observation_space, first)
    return codec.task(batch, [episode.task for episode in episodes]), codec.observation(batch)


def imagine(
    world: World,
    policy: Acts,
    starts: tuple[Parts, Parts],
    horizon: int,
    seed: int,
    samples: int = 1,
) -> list[list[NDArray[np.float64]]]:
    """Play `policy` greedily in the world from each start, `samples` times, with members in turn.

    Returns:
        For each of the n starts, `samples` arrays [T+1, d] of raw numbers and categories. They end
        where the world terminates or diverges, or after `horizon` steps.
    """
    codec, device = codec_of(world), world.device
    columns = codec.observation_codec
    count = len(starts[0].numbers)
    row = torch.arange(count).repeat_interleave(samples)
    draw = torch.arange(samples).repeat(count)
    task, observation = starts[0][row].to(device), starts[1][row].to(device)
    carry = world.begin(task, observation, (draw % world.config.members).to(device))
    raw = codec.decode_observation(observation, task)
    path = [np.concatenate(columns.encode(raw), axis=1)]
    lengths = np.full(count * samples, horizon + 1)
    generator = np.random.default_rng(seed)
    begin_episodes(policy, count * samples, seed)
    for t in range(horizon):
        action = codec.action(policy.act(raw, False, generator)).to(device)
        carry, out = world.step(carry, action, rng.keys(seed, row.to(device), draw.to(device), t))
        raw = codec.decode_observation(out.observation, task)
        path.append(np.concatenate(columns.encode(raw), axis=1))
        for end, ended in ((t + 2, out.terminated), (t + 1, out.diverged)):
            lengths = np.where(ended.cpu().numpy(), np.minimum(lengths, end), lengths)
        if (lengths <= t + 2).all():
            break
    whole = np.stack(path, axis=1)
    cut = [rollout[:length] for rollout, length in zip(whole, lengths, strict=True)]
    return [cut[k : k + samples] for k in range(0, len(cut), samples)]


def side_by_side(
    world: World,
    policy: Acts,
    episodes: Sequence[Episode],
    *,
    title: str,
    seed: int,
    count: int = 3,
    samples: int = 4,
) -> list[dict[str, Any]]:
    """The first `count` judged episodes, each with imagined episodes of the same policy from the
    same first state.

    Returns:
        `report.trajectories`; rollouts are as long as the real episode at most. Empty in a world of
        images, whose codes make no lines.
    """
    shown = list(episodes[:count])
    columns = codec_of(world).observation_codec
    if columns.tokenizers:
        return []
    horizon = min(report.STEPS, max(len(episode) for episode in shown))
    imagined = imagine(world, policy, starts_of(world, shown), horizon, seed, samples)
    pairs = []
    for episode, rollouts in zip(shown, imagined, strict=True):
        real = np.concatenate(columns.encode_list(episode.observations[: horizon + 1]), axis=1)
        heading = f"episode {episode.index}: return {episode.total_reward:.0f}, {episode.outcome}"
        pairs.append(report.SideBySide(heading, real, [r[: len(episode) + 1] for r in rollouts]))
    names = []
    for kind in ("numbers", "categories"):
        for leaf in columns.leaves:
            span, name = getattr(leaf, kind), leaf.name.removeprefix("observation.")
            width = span.stop - span.start
            names += [name] if width == 1 else [f"{name}[{i}]" for i in range(width)]
    return [report.trajectories(title, names, pairs)]
