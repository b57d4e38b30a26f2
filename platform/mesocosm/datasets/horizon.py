"""The time limit of environments that register none, from truncated episodes in the logs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import OUTCOMES
from mesocosm.errors import UsageError
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.store.cache import open_partial

MAX_EPISODE_STEPS = 10_000
"""Episodes without a known time limit are cut here, in reality and in a world."""
UNKNOWN = 1000
"""The limit that a loop sets if neither the environment nor its data shows one."""


@dataclass(frozen=True)
class Horizon:
    """Steps after which an episode is cut, and where the number comes from."""

    steps: int
    source: str
    inferred: bool = False
    """True if the number comes from the logs rather than from a config or the environment."""


def logged_horizon(storage: Storage, datasets: Iterable[str]) -> Horizon | None:
    """The length of the longest truncated episode of datasets (ids or names; deleted ones are
    skipped), at most `MAX_EPISODE_STEPS`; None where no episode is truncated.
    """
    lengths: list[np.ndarray] = []
    for name in datasets:
        try:
            data = Dataset([open_partial(storage, "datasets", name)])
        except UsageError:
            continue
        for shard in range(len(data.shards)):
            table = data.records(shard)
            lengths.append(table["length"][table["outcome"] == OUTCOMES.index("truncated")])
    truncated = np.concatenate([np.zeros(0, np.int64), *lengths])
    if not len(truncated):
        return None
    longest = int(truncated.max())
    source = f"the longest of {len(truncated)} truncated episodes of the data"
    if (truncated == longest).all():
        source = f"all {len(truncated)} truncated episodes of the data have this length"
    return Horizon(min(longest, MAX_EPISODE_STEPS), source, inferred=True)


def horizon_of(storage: Storage, world: Artifact, limit: int | None, key: str) -> Horizon:
    """The horizon of a world's episodes: `limit` (of the config or environment) or the logs'.
    Raises UsageError where there is neither; `key` is the config key that sets it.
    """
    if limit is not None:
        return Horizon(limit, "time limit of the environment")
    inferred = logged_horizon(storage, world.meta.get("inputs", {}).get("datasets", []))
    if inferred is None:
        raise UsageError(
            f"{key} must be set for {world.name}: its environment registers no time limit, and no"
            " truncated episode of its data is in storage.root; set it to the steps after which an"
            " episode is cut"
        )
    return inferred
