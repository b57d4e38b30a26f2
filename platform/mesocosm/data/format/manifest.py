"""What a dataset says of itself: `manifest.json`, the tables of its episodes, and how many of each
length there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesocosm.errors import ArtifactError

SCHEMA: Literal[2] = 2
MANIFEST = "manifest.json"
LENGTHS_FILE = "lengths.npy"
OUTCOMES = ("terminated", "truncated", "unfinished")
SPLITS = ("train", "valid")

ARRAYS = ("obs_num", "obs_cat", "act_num", "act_cat", "reward", "terminated", "duration", "step")
"""A shard's memory-mapped arrays, one row an observation (T+1 rows an episode); an episode never
spans two shards.

obs_num [rows, n] float64 raw, obs_cat [rows, m] unsigned, act_num, act_cat alike (zeros in an
episode's last row), reward [rows] float64, terminated [rows] bool, duration [rows] float64 seconds
(NaN where not given), step [rows] int32.
"""

EPISODES = np.dtype(
    [
        ("index", "<i8"),  # Episode.index
        ("seed", "<i8"),
        ("shard", "<i4"),  # position in Manifest.shards
        ("first_row", "<i8"),  # within the shard
        ("length", "<i8"),  # transitions
        ("behaviour", "<i4"),  # position in Manifest.behaviours
        ("outcome", "u1"),  # position in OUTCOMES
        ("success", "i1"),  # 1, 0, or -1 for not said
        ("split", "u1"),  # position in SPLITS
        ("total_reward", "<f8"),
        ("hash", "<i8"),  # of (dataset id, index): what members draw their bootstrap masks from
    ]
)
"""`tables/<shard>.npy`: one record an episode of the shard, in the order of its rows."""

LENGTHS = np.dtype(
    [
        ("shard", "<i4"),
        ("split", "u1"),
        ("terminated", "?"),
        ("length", "<i8"),
        ("episodes", "<i8"),  # that are alike in all of the above
    ]
)
"""`lengths.npy`: all that must be known of the episodes to count windows of any size, terminals and
transitions. Its size is bounded by the shards (of R rows each: not more than 4 sqrt(2 R) records),
not by the episodes.
"""


def lengths_of(table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[E] EPISODES -> [n] LENGTHS, sorted."""
    kinds = np.empty(len(table), LENGTHS.descr[:-1])
    kinds["shard"], kinds["split"], kinds["length"] = (
        table["shard"],
        table["split"],
        table["length"],
    )
    kinds["terminated"] = table["outcome"] == OUTCOMES.index("terminated")
    distinct, episodes = np.unique(kinds, return_counts=True)
    found = np.empty(len(distinct), LENGTHS)
    for name in kinds.dtype.names or ():
        found[name] = distinct[name]
    found["episodes"] = episodes
    return found


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Environment(_Model):
    """The reality that the episodes come from."""

    id: str
    version: str = ""
    """Of the package that defines it, where known."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    task: list[str] = Field(default_factory=list)
    """`reality.task`: observation keys (dotted where nested) or reset options."""
    max_episode_steps: int | None = None
    """The time limit, or `reality.horizon` where that overrides it."""
    success: str | None = None
    """`reality.success`"""


class TaskOption(_Model):
    """A reset option that is part of the task: a number, or one of `values`."""

    name: str
    values: list[bool | int | str] | None = None
    """The distinct values, sorted; None: the option is a float."""


class Behaviour(_Model):
    name: str
    episodes: int = 0
    transitions: int = 0


class Counts(_Model):
    episodes: dict[str, int]
    """By split."""
    transitions: dict[str, int]
    """By split."""
    outcomes: dict[str, int]
    """Episodes by outcome."""
    dropped: int = 0
    """Episodes that were begun and are not here: the environment crashed or hung."""
    empty: int = 0
    """Episodes without a single transition, left out."""


class Shard(_Model):
    name: str
    rows: int
    episodes: int = 0
    """Not said in schema 1."""


class Manifest(_Model):
    schema_version: Literal[1, 2]
    """1 has the episodes of all shards in one `episodes.npy`, and no `lengths.npy`."""
    id: str
    environment: Environment
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    seed: int
    valid_fraction: float
    counts: Counts
    behaviours: list[Behaviour]
    durations: bool
    """Every step has `info["duration"]`."""
    task_options: list[TaskOption] = Field(default_factory=list)
    shards: list[Shard]

    @property
    def transitions(self) -> int:
        return sum(self.counts.transitions.values())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises ArtifactError where the file is missing or is not a manifest of this version."""
        path = folder / MANIFEST
        try:
            return Manifest.model_validate_json(path.read_text())
        except OSError as error:
            raise ArtifactError(
                f"{str(folder)!r} is not a dataset: {MANIFEST} cannot be read ({error.strerror});"
                " give a datasets/<id>"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(
                f"{str(path)!r} is not a manifest of schema {SCHEMA}: {where}: {first['msg']}; make"
                " it again by its job with --force"
            ) from error
