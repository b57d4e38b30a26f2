"""Images as an agent sees them: the codes of a frozen tokenizer, which its policy includes.

A network reads features of the codes of the last FRAMES frames, because a frame shows no
velocities. The encoder needs no world, so that a policy acts in reality by itself. In a world it
reads the imagined codes; decoding and encoding them again would change those of a learned
tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from mesocosm.config import fingerprint
from mesocosm.datasets.images import image_spaces, image_values, with_image_values, with_images
from mesocosm.errors import UsageError
from mesocosm.model.tokenizer.frames import FrameTokenizer, as_bytes, as_dtype
from mesocosm.model.tokenizer.kinds import tokenizer_from_json, tokenizer_to_json

FRAMES = 3
"""Frames that a network sees: the newest and those before it. At an episode's start all of them
are its first one.
"""
Array = NDArray[Any]
Space = gym.Space[Any]


class ImageEncoder:
    """Turns the images of observations into numbers.

    Args:
        observation_space: A space with one image for each tokenizer.
        tokenizers: One for each image, in order.
    """

    def __init__(self, observation_space: Space, tokenizers: Sequence[FrameTokenizer]):
        self.observation_space, self.tokenizers = observation_space, tuple(tokenizers)
        zeros = (np.zeros((1, len(one.sizes)), np.int64) for one in self.tokenizers)
        pairs = zip(self.tokenizers, zeros, strict=True)
        self.widths = [one.features(zero).shape[1] for one, zero in pairs]
        """The numbers of a frame of each image."""
        boxes = (Box(-1.0, 1.0, (FRAMES, width), np.float32) for width in self.widths)
        self.space = with_images(observation_space, boxes)
        """The space of a network's observations: each image is [FRAMES, width] numbers, the newest
        frame first; all else is as it was."""

    @cached_property
    def id(self) -> str:
        """A fingerprint of the tokenizers."""
        return fingerprint("encoder", self.to_json())

    def features(self, batch: Any) -> list[Array]:
        """For each image [B, width] float32 of B observations in vector layout, whose images are
        frames [B, height, width, channels] or the tokenizer's codes [B, n].
        """
        features = []
        for one, values in zip(self.tokenizers, self._values(batch), strict=True):
            array = np.asarray(values)
            coded = array.ndim == 2
            features.append(one.features(array if coded else one.encode(as_bytes(array))))
        return features

    def of_episode(self, batch: Any) -> Any:
        """The T observations of one episode in order, in vector layout, as a network sees them:
        what an `ImageMemory` of one environment gives, observation by observation. Each image,
        frames [T, height, width, channels] or codes [T, n], becomes float32 [T, FRAMES, width].
        """
        each = self.features(batch)
        now = np.arange(len(each[0]))[:, None]
        seen = np.maximum(now - np.arange(FRAMES), 0)
        return with_image_values(self.observation_space, batch, (part[seen] for part in each))

    def frames(self, batch: Any) -> Any:
        """A batch whose images are codes, with frames instead."""
        leaves = image_spaces(self.observation_space)
        parts = zip(self.tokenizers, self._values(batch), leaves, strict=True)
        decoded = (as_dtype(one.decode(codes), np.dtype(leaf.dtype)) for one, codes, leaf in parts)
        return with_image_values(self.observation_space, batch, decoded)

    def _values(self, batch: Any) -> list[Any]:
        return image_values(self.observation_space, batch)

    def to_json(self) -> list[dict[str, Any]]:
        """The tokenizers as plain JSON."""
        return [tokenizer_to_json(one) for one in self.tokenizers]

    @staticmethod
    def from_json(observation_space: Space, values: Sequence[Mapping[str, Any]]) -> ImageEncoder:
        """The inverse of `to_json`."""
        return ImageEncoder(observation_space, [tokenizer_from_json(one) for one in values])


class ImageMemory:
    """The last frames of B environments that step together, as numbers."""

    def __init__(self, encoder: ImageEncoder, num_envs: int):
        self.encoder = encoder
        self._fresh = np.ones(num_envs, np.bool_)
        self._seen = [np.zeros((num_envs, FRAMES, width), np.float32) for width in encoder.widths]

    def __len__(self) -> int:
        return len(self._fresh)

    def restart(self, mask: Array) -> None:
        """New episodes for the environments of `mask` [B]: their next observation is a first
        one.
        """
        self._fresh = self._fresh | mask

    def see(self, observations: Any) -> Any:
        """The next observations in vector layout, as a network sees them (`ImageEncoder.space`)."""
        fresh = self._fresh[:, None, None]
        for i, now in enumerate(self.encoder.features(observations)):
            newest = now[:, None]
            moved = np.concatenate([newest, self._seen[i][:, :-1]], 1)
            self._seen[i] = np.where(fresh, newest, moved)
        self._fresh = np.zeros(len(self), np.bool_)
        space = self.encoder.observation_space
        return with_image_values(space, observations, iter(self._seen))

    def state(self) -> dict[str, Any]:
        """The memory, for `restore`."""
        return {"fresh": self._fresh, "seen": copy.copy(self._seen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._fresh, self._seen = state["fresh"], list(state["seen"])


def encoder_of(policy: Any) -> ImageEncoder | None:
    """The encoder of a policy that sees images; None for another one."""
    encoder: ImageEncoder | None = getattr(policy, "encoder", None)
    return encoder


def check_tokenizer(
    policy: Any, tokenizers: Sequence[FrameTokenizer], name: str, world: str
) -> None:
    """Raise UsageError where a policy sees images by other tokenizers than a world's.

    Args:
        policy: Of the world's spaces.
        tokenizers: The world's.
        name: The policy's name, or the key that names it.
        world: The world's name.
    """
    encoder = encoder_of(policy)
    if encoder is None or not tokenizers:
        return
    if encoder.id != ImageEncoder(encoder.observation_space, tokenizers).id:
        raise UsageError(
            f"{name} sees images by another tokenizer than that of {world}, whose codes mean other"
            " patches; train an agent in this world, or pretrain with that agent's tokenizer"
        )
