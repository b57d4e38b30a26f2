"""Scripted experts of robot arms, as behaviours:
`{kind: noisy, noise: 0.2, function: mesocosm.envs.robot_policies:fetch_push}`.

Meta-World ships an expert for each of its tasks; the experts of Fetch are this file's.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np

from mesocosm.envs.robotics import Observation

Array = np.ndarray[Any, Any]
REACH = 0.05
"""Metres that the hand of Fetch moves in a step at action 1."""


def meta_world_reach(observation: Observation, rng: np.random.Generator) -> Array:
    """Meta-World's expert of `reach`."""
    return _meta_world("reach", observation)


def meta_world_push(observation: Observation, rng: np.random.Generator) -> Array:
    """Meta-World's expert of `push`."""
    return _meta_world("push", observation)


def meta_world_drawer_open(observation: Observation, rng: np.random.Generator) -> Array:
    """Meta-World's expert of `drawer-open`."""
    return _meta_world("drawer-open", observation)


def _meta_world(task: str, observation: Observation) -> Array:
    now = np.concatenate([observation["hand"], observation["object"], np.zeros(7)])
    action = _expert(task).get_action(np.concatenate([now, now, observation["goal"]]))
    return np.clip(action, -1.0, 1.0).astype(np.float32)


@cache
def _expert(task: str) -> Any:
    name = f"sawyer_{task.replace('-', '_')}_v3_policy"
    words = [word.capitalize() for word in task.split("-")]
    module = importlib.import_module(f"metaworld.policies.{name}")
    return getattr(module, f"Sawyer{''.join(words)}V3Policy")()


def fetch_push(observation: Observation, rng: np.random.Generator) -> Array:
    """FetchPush: go behind the block, seen from the goal, and push it there."""
    hand, block = observation["observation"][:3], observation["achieved_goal"]
    way = (observation["desired_goal"] - block)[:2]
    distance = float(np.linalg.norm(way))
    if distance < 0.02:
        return _move(np.zeros(3))
    ahead = way / distance
    behind = np.append(block[:2] - 0.06 * ahead, block[2])
    along = float((hand - block)[:2] @ ahead)
    beside = float(np.linalg.norm((hand - block)[:2] - along * ahead))
    if along < -0.03 and beside < 0.02 and abs(hand[2] - block[2]) < 0.03:
        return _move(
            np.append(min(distance, 0.05) * ahead, block[2] - hand[2]) + _side(hand, block, ahead)
        )
    if np.linalg.norm((hand - behind)[:2]) > 0.02:  # above the table, so as not to touch the block
        lifted = behind + np.array([0.0, 0.0, 0.08])
        if hand[2] < block[2] + 0.06 and np.linalg.norm((hand - block)[:2]) < 0.09:
            return _move(np.array([0.0, 0.0, lifted[2] - hand[2]]))
        return _move(lifted - hand)
    return _move(behind - hand)


def _side(hand: Array, block: Array, ahead: Array) -> Array:
    """The correction that brings the hand onto the line through block and goal."""
    offset = (hand - block)[:2]
    return np.append(offset @ ahead * ahead - offset, 0.0)


def fetch_pick_and_place(observation: Observation, rng: np.random.Generator) -> Array:
    """FetchPickAndPlace: grip the block from above, and carry it to the goal."""
    hand, block = observation["observation"][:3], observation["achieved_goal"]
    opening = float(observation["observation"][9:11].sum())
    offset = block - hand
    aside = float(np.linalg.norm(offset[:2]))
    if aside > 0.01:
        above = 0.06 if aside > 0.02 else 0.0
        return _move(offset + np.array([0.0, 0.0, above]), 1.0)
    if abs(offset[2]) > 0.01:
        return _move(offset, 1.0)
    if opening > 0.06:  # the block is 0.05 m wide
        return _move(np.zeros(3), -1.0)
    return _move(observation["desired_goal"] - block, -1.0)


def _move(way: Array, grip: float = -1.0) -> Array:
    """An action that moves the hand by `way`, in metres, as far as a step can."""
    return np.append(np.clip(way / REACH, -1.0, 1.0), grip).astype(np.float32)
