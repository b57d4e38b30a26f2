"""The encoder by which an agent sees images: in a world by the world's tokenizer, in reality and in
logs by a stored one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import AnyBatchCodec
from mesocosm.data.tokens.reading import stored_tokenizers
from mesocosm.datasets.images import image_spaces
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError
from mesocosm.model.tokenizer.frames import FrameTokenizer
from mesocosm.policies.images import ImageEncoder
from mesocosm.store.artifacts import Storage

Space = gymnasium.Space[Any]
Spaces = tuple[Space, Space]


def tokenizers_of(codec: AnyBatchCodec) -> Sequence[FrameTokenizer]:
    """The tokenizers of a world's images, in order; empty if it has no images."""
    return codec.observation_codec.tokenizers if isinstance(codec, Codec) else ()


def encoder_for(
    algo: str, observation: Space, tokenizers: Sequence[FrameTokenizer]
) -> ImageEncoder | None:
    """The encoder by which an agent sees the images of a world; None if it has none.

    Args:
        algo: The algorithm of its training.
        observation: The world's observation space.
        tokenizers: The world's (`tokenizers_of`).

    Raises:
        UsageError: The algorithm does not train on images.
    """
    if not tokenizers:
        return None
    if algo == "SAC":
        raise UsageError(
            "algo must be PPO, APPO, IMPALA or DQN in a world of images, got SAC: its branches"
            " begin within logged episodes, without the frames before; use PPO"
        )
    return ImageEncoder(observation, tokenizers)


def stored_encoder(
    ref: str | None, observation: Space, storage: Storage
) -> tuple[ImageEncoder | None, list[str]]:
    """The encoder by which an agent sees the images of an environment or of logs, from the key
    `tokenizer`.

    Args:
        ref: The key's value.
        observation: The observation space.
        storage: Where the tokenizer is.

    Returns:
        The encoder, and the tokenizer's id; (None, []) if nothing is an image.

    Raises:
        UsageError: There are images without a tokenizer or a tokenizer without images, the
            tokenizer is unknown, or it is of other images.
        ArtifactError: The tokenizer is damaged.
    """
    images = image_spaces(observation)
    if not images:
        if ref is not None:
            raise UsageError(
                f"tokenizer must be null where no observation is an image, got {ref} for"
                f" {observation}; leave it out"
            )
        return None, []
    if ref is None:
        raise UsageError(
            f"tokenizer must name the codes by which an agent sees {images[0]}, got null; fit one"
            " to frames of this environment (mesocosm tokenize data.datasets=[ID]) and set"
            " tokenizer=ID"
        )
    leaves = SpaceCodec(observation, "observation").image_leaves
    files, tokenizers = stored_tokenizers(storage, ref, leaves, "tokenizer")
    return ImageEncoder(observation, tokenizers.each), [files.name.partition("/")[2]]


def seen_spaces(spaces: Spaces, encoder: ImageEncoder | None) -> Spaces:
    """The network's (observation, action) spaces, given the environment's."""
    return spaces if encoder is None else (encoder.space, spaces[1])
