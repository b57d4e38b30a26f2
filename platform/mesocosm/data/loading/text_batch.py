"""The codec of texts for vector environments: batches of raw values as `Texts`, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.vector.utils import batch_space, iterate

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.texts import TextCodec
from mesocosm.data.loading.windows import spread_episodes
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import ResetOption
from mesocosm.datasets.split import Split
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.language.session import Texts
from mesocosm.model.spec import Spec
from mesocosm.policies.heads import batch_size, stack


class TextBatchCodec:
    """A `TextCodec` with the methods of `Codec` that clients of worlds use."""

    def __init__(self, codec: TextCodec):
        self.codec = codec
        self.id: str = codec.id
        self.spec: Spec = codec.spec
        self.observation_space: gymnasium.Space[Any] = codec.observation_space
        self.action_space: gymnasium.Space[Any] = codec.action_space
        self.environment: dict[str, Any] = codec.environment
        self.options: Sequence[ResetOption] = codec.options

    def observation(self, batch: Any) -> Texts:
        """B observations in a vector environment's layout, without the task keys."""
        return Texts(map(self.codec.observation, _values(self.observation_space, batch)))

    def task(self, batch: Any, options: Sequence[Mapping[str, Any]] | None = None) -> Texts:
        """The tasks of B observations and their reset options, where the task has any."""
        values = _values(self.observation_space, batch)
        rows = [{}] * len(values) if options is None else options
        return Texts(map(self.codec.task, values, rows))

    def action(self, batch: Any) -> Texts:
        """B actions in a vector environment's layout.

        Raises:
            UsageError: An action is not of its space's type.
        """
        try:
            return Texts(map(self.codec.action, _values(self.action_space, batch)))
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise UsageError(
                f"actions must be a batch of {self.action_space}, got {str(batch)[:100]}"
            ) from error

    def batch(self, actions: Sequence[Any]) -> Any:
        """Raw actions in a vector environment's layout. Raises UsageError for another type."""
        try:
            return stack(self.action_space, list(actions))
        except (TypeError, ValueError, KeyError) as error:
            raise UsageError(
                f"an action must be in {self.action_space}, got {str(actions)[:100]}"
            ) from error

    def decode_observation(self, texts: Texts, task: Texts) -> Any:
        """B observations in a vector environment's layout, of their texts and their tasks'.

        Raises:
            MesocosmError: A text is not in the space.
        """
        pairs = zip(texts, task, strict=True)
        values = [_read(self.codec.read_with_task, *pair) for pair in pairs]
        return stack(self.observation_space, values)

    def decode_action(self, texts: Texts) -> Any:
        """B actions in a vector environment's layout. Raises ValueError for other texts."""
        return stack(self.action_space, list(map(self.codec.read_action, texts)))

    def task_options(self, task: Texts) -> list[dict[str, Any]]:
        """The B reset options of `task`; empty dicts if it has none.

        Raises:
            MesocosmError: A text is not a task.
        """
        if not self.options:
            return [{} for _ in task]
        return [_read(self.codec.read_task, text)[1] for text in task]


AnyBatchCodec = Codec | TextBatchCodec


def batch_codec(values: Mapping[str, Any]) -> AnyBatchCodec:
    """The codec of a world of either kind, from its JSON."""
    if "decimals" in values:
        return TextBatchCodec(TextCodec.from_json(values))
    return Codec.from_json(values)


def refuse_images(codec: AnyBatchCodec, user: str) -> None:
    """Raise UsageError for a world of images.

    Args:
        codec: The world's codec.
        user: The job that cannot use such worlds, for the message.
    """
    if isinstance(codec, Codec) and codec.observation_codec.tokenizers:
        raise UsageError(
            f"{user} cannot use a world of images yet, got one of"
            f" {', '.join(leaf.name for leaf in codec.observation_codec.image_leaves)}; step in it"
            " by mesocosm.WorldVectorEnv"
        )


def start_texts(
    dataset: Dataset, codec: TextCodec, split: Split = "train", limit: int | None = None
) -> tuple[Texts, Texts]:
    """The (task, observation) of the first row of the episodes of a split, in order: of at most
    `limit` episodes, spread evenly.
    """
    tasks: list[str] = []
    observations: list[str] = []
    for number in spread_episodes(dataset, split, limit).tolist():
        first = dataset.episode(number)
        tasks.append(codec.task(first.observations[0], first.task))
        observations.append(codec.observation(first.observations[0]))
    return Texts(tasks), Texts(observations)


def _read(read: Callable[..., Any], *texts: str) -> Any:
    """Return `read(*texts)`. Raises MesocosmError where the texts cannot be read, which happens
    only with starts that a client sent.
    """
    try:
        return read(*texts)
    except ValueError as error:
        raise MesocosmError(
            f"a start must be a text of the world's observation or task space ({error}); take"
            " starts from the world's own data"
        ) from error


def _values(space: gymnasium.Space[Any], batch: Any) -> list[Any]:
    if isinstance(space, gymnasium.spaces.Text):
        return list(batch)
    return list(iterate(batch_space(space, batch_size(batch)), batch))
