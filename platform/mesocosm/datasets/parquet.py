"""The episodes of a shard as a Parquet table, for people and other tools.

One row an observation (T+1 rows an episode of T transitions), in order of episode and step:

    episode      int64           `Episode.index`
    step         int32           0..T
    observation  the space       Box, MultiDiscrete, MultiBinary: nested lists of the space's dtype
                                 (a scalar where the shape is ()); Discrete: int64, counted from its
                                 start; Text: string; Dict: struct; Tuple: struct of "0", "1", ...
    action       the space       null in an episode's last row, as are the next four
    reward       double
    terminated   bool            the environment ended the episode here
    truncated    bool            a time limit ended it here; an episode that ends with neither is
                                 unfinished
    duration     double          seconds; only where the environment gives durations
    behaviour    string          who acted
    seed         int64           of `env.reset`
    success      bool            of the episode; null where unknown
    task         struct          the episode's reset options; only where the task has any

Images are left out: their frames are in the shards (`images`), which `Dataset.episode` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.images import is_image
from mesocosm.datasets.leaf import children
from mesocosm.datasets.manifest import OUTCOMES
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.texts import stored

Array = NDArray[Any]


def episodes_table(
    codecs: tuple[SpaceCodec, SpaceCodec],
    arrays: dict[str, Array],
    records: Array,
    behaviours: Sequence[str],
    tasks: Sequence[dict[str, Any]],
) -> pa.Table:
    """The table of a shard, of its `manifest.ARRAYS` with `texts.TEXTS`, `manifest.EPISODES` and
    reset options.
    """
    observation, action = codecs
    repeats = records["length"] + 1
    last = np.zeros(len(arrays["step"]), bool)
    last[np.cumsum(repeats) - 1] = True
    truncated = np.zeros(len(last), bool)
    by_limit = records["outcome"] == OUTCOMES.index("truncated")
    truncated[(np.cumsum(repeats) - 2)[by_limit]] = True
    each = np.repeat(np.arange(len(records)), repeats)
    success = records["success"][each]
    actions = action.decode_stored(*stored(arrays, "act"))
    columns: dict[str, pa.Array] = {
        "episode": pa.array(records["index"][each]),
        "step": pa.array(arrays["step"]),
    }
    visible = without_images(observation.space)
    if visible is not None:
        none = [np.zeros((len(last), 0))] * len(observation.image_leaves)
        observations = observation.decode_stored(*stored(arrays, "obs"), *none)
        columns["observation"] = arrow(visible, observations)
    columns |= {
        "action": arrow(action.space, actions, last),
        "reward": pa.array(arrays["reward"], mask=last),
        "terminated": pa.array(arrays["terminated"], mask=last),
        "truncated": pa.array(truncated, mask=last),
        "behaviour": pa.array(np.array(behaviours)[records["behaviour"][each]], pa.string()),
        "seed": pa.array(records["seed"][each]),
        "success": pa.array(success == 1, mask=success < 0),
    }
    unknown = np.isnan(arrays["duration"])
    if not unknown.all():
        columns["duration"] = pa.array(arrays["duration"], mask=last | unknown)
    if tasks and tasks[0]:
        columns["task"] = pa.array(tasks).take(pa.array(each))
    return pa.table(columns)


def without_images(space: gymnasium.Space[Any]) -> gymnasium.Space[Any] | None:
    """A space without its images; None where nothing else is in it. A Tuple's other parts keep
    their numbers as names.
    """
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return None if is_image(space) else space
    parts = [(key, without_images(child)) for key, child in children(space)]
    if not any(child is None for _, child in parts):
        return space
    rest = {key: child for key, child in parts if child is not None}
    return spaces.Dict(list(rest.items())) if rest else None  # type: ignore[arg-type]


def arrow(space: gymnasium.Space[Any], batch: Any, null: Array | None = None) -> pa.Array:
    """A batch (vector layout) as a nested Arrow array; `null` [B] marks missing rows."""
    mask = None if null is None else pa.array(null)
    if isinstance(space, spaces.Dict | spaces.Tuple):
        names = [str(name) for name, _ in children(space)]
        parts = [arrow(child, batch[key]) for key, child in children(space)]
        return pa.StructArray.from_arrays(parts, names, mask=mask)
    if isinstance(space, spaces.Text):
        return pa.array(np.array(batch, object), pa.string(), mask=null)
    array = np.asarray(batch)
    if array.ndim == 1:
        return pa.array(array, mask=null)
    nested = pa.array(array.reshape(-1))
    for axis in range(array.ndim - 1, 0, -1):
        outer = int(np.prod(array.shape[:axis]))
        offsets = pa.array(np.arange(outer + 1, dtype=np.int32) * array.shape[axis])
        nested = pa.ListArray.from_arrays(offsets, nested, mask=mask if axis == 1 else None)
    return nested
