"""The exported policy of an agent that sees images. Torch, no Ray."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.policies.heads import batch_size, map_batch, stack
from mesocosm.policies.images import ImageEncoder, ImageMemory
from mesocosm.policies.policy import POLICY_JSON, Policy, Rng, read_files

ENCODER = "image_encoder"
"""The key of policy.json with the tokenizers."""


class ImagePolicy:
    """A network from images, and other observations if there are any, to actions.

    It remembers the last frames of each environment. Call `reset` before the first step of
    environments that step together, and `restart` where they began new episodes.
    """

    def __init__(self, policy: Policy, encoder: ImageEncoder):
        """A policy.

        Args:
            policy: Between `encoder.space` and the environment's action space.
            encoder: Turns images into numbers.
        """
        self.policy, self.encoder = policy, encoder
        self.algo, self.network, self.layout = policy.algo, policy.network, policy.layout
        self.observation_space = encoder.observation_space
        self.action_space: gym.Space[Any] = policy.action_space
        self.explores = False
        """True if it draws where it acts in one environment at a time (`__call__`)."""
        self.reset()

    def copied(self) -> ImagePolicy:
        """The same network, with a memory of its own."""
        other = copy.copy(self)
        other.reset()
        return other

    def reset(self, num_envs: int = 1, seed: int = 0) -> None:
        """Begin new episodes in `num_envs` environments. `seed` is not used: draws take `rng`."""
        self._memory = ImageMemory(self.encoder, num_envs)

    def restart(self, mask: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Mark the environments whose episodes began since the last action, `mask` [B]."""
        self._memory.restart(np.asarray(mask, np.bool_))

    def start(self, k: int, rng: Rng) -> None:
        """Begin episode k of one environment (`envs.episode.EpisodeAct`)."""
        self.reset()

    def act(self, observations: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map observations of B environments to B actions, both in vector layout.

        Args:
            observations: Their images are frames, or codes of the policy's tokenizer.
            explore: As of `Policy.act`.
            rng: As of `Policy.act`.
        """
        if len(self._memory) != (size := batch_size(observations)):
            self.reset(size)
        return self.policy.act(self._memory.see(observations), explore, rng)

    def act_one(self, observation: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map one observation to one action."""
        batch = stack(self.observation_space, [observation])
        return map_batch(lambda leaf: leaf[0], self.act(batch, explore, rng))

    def __call__(self, observation: Any, rng: Rng) -> Any:
        """The action of one environment (`envs.episode.Act`)."""
        return self.act_one(observation, self.explores, rng)

    def save(self, folder: Path) -> None:
        """Write policy.json and policy.safetensors into an existing folder."""
        self.policy.save(folder)
        data = json.loads((folder / POLICY_JSON).read_text())
        data["observation_space"] = space_to_json(self.observation_space)
        data[ENCODER] = self.encoder.to_json()
        (folder / POLICY_JSON).write_text(json.dumps(data, indent=1))

    @staticmethod
    def load(folder: Path) -> ImagePolicy:
        """Read a policy. Raises ArtifactError where it is missing or has another schema."""
        data, weights = read_files(folder)
        encoder = ImageEncoder.from_json(space_from_json(data["observation_space"]), data[ENCODER])
        policy = Policy.of(data, weights, encoder.space)
        return ImagePolicy(policy, encoder)
