"""The contents of a dataset's `manifest.json` and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesocosm.errors import ArtifactError, UsageError

Array = NDArray[Any]
SCHEMA: Literal[2] = 2
TEXT_SCHEMA: Literal[3] = 3
"""The schema of a dataset with texts, which version 2 stored as characters."""
MANIFEST = "manifest.json"
LENGTHS_FILE = "lengths.npy"
OUTCOMES = ("terminated", "truncated", "unfinished")
SPLITS = ("train", "valid")

ARRAYS = ("obs_num", "obs_cat", "act_num", "act_cat", "reward", "terminated", "duration", "step")
"""A shard's memory-mapped arrays, one row an observation (T+1 rows an episode, all in one shard).

obs_num [rows, n] float64 raw, obs_cat [rows, m] unsigned, act_num and act_cat likewise (zeros in an
episode's last row), reward [rows] float64, terminated [rows] bool, duration [rows] float64 seconds
(NaN where unknown), step [rows] int32. Texts are stored separately (`texts`). When a model reads
them, obs_cat and act_cat also hold their slots.
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
        ("success", "i1"),  # 1, 0, or -1 where unknown
        ("split", "u1"),  # position in SPLITS
        ("total_reward", "<f8"),
        ("hash", "<i8"),  # of (dataset id, index): the seed of an episode's bootstrap mask
    ]
)
"""`tables/SHARD.npy`: one record an episode of the shard, in the order of its rows."""

LENGTHS = np.dtype(
    [
        ("shard", "<i4"),
        ("split", "u1"),
        ("terminated", "?"),
        ("length", "<i8"),
        ("episodes", "<i8"),  # that agree in all of the above
    ]
)
"""`lengths.npy`: counts windows of any size in at most 4 sqrt(2 R) records a shard of R rows."""


def lengths_of(table: Array) -> Array:
    """[E] EPISODES -> [n] LENGTHS, sorted."""
    lengths = np.ones(len(table), LENGTHS)
    for name in ("shard", "split", "length"):
        lengths[name] = table[name]
    lengths["terminated"] = table["outcome"] == OUTCOMES.index("terminated")
    distinct, counts = np.unique(lengths, return_counts=True)
    distinct["episodes"] = counts
    return distinct


def sort_key(value: Any) -> tuple[str, Any]:
    """Sorts the values of a reset option, which may be of several kinds."""
    return type(value).__name__, value


MOVED = {"mesocosm.reality.domains": "mesocosm.envs.builtin"}
"""Modules of environments by the names that artifacts of earlier versions contain."""


def current_id(env: str) -> str:
    """An environment's id (`reality.env`) with its module's current name."""
    module, colon, name = env.rpartition(":")
    return f"{MOVED.get(module, module)}{colon}{name}"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Environment(_Model):
    """The reality that the episodes come from."""

    id: str
    version: str = ""
    """Version of the package that defines it, where known."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    task: list[str] = Field(default_factory=list)
    """`reality.task`: observation keys (dotted where nested) or reset options."""
    max_episode_steps: int | None = None
    """The time limit, or `reality.horizon` where that overrides it."""
    success: str | None = None
    """`reality.success`"""


class ResetOption(_Model):
    """A reset option that is part of the task: a number, or one of `values`."""

    name: str
    values: list[bool | int | str] | None = None
    """The distinct values, sorted; None: the option is a float."""


class BehaviourCounts(_Model):
    name: str
    episodes: int = 0
    transitions: int = 0


class EpisodeCounts(_Model):
    episodes: dict[str, int]  # by split
    transitions: dict[str, int]  # by split
    outcomes: dict[str, int]  # episodes by outcome
    dropped: int = 0  # not stored: the environment crashed or hung
    empty: int = 0  # not stored: no transition


class Shard(_Model):
    name: str
    rows: int
    episodes: int


class Manifest(_Model):
    schema_version: Literal[2, 3]
    id: str
    environment: Environment
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    seed: int
    valid_fraction: float
    counts: EpisodeCounts
    behaviours: list[BehaviourCounts]
    durations: bool
    """True if every step has `info["duration"]`."""
    task_options: list[ResetOption] = Field(default_factory=list)
    shards: list[Shard]

    @property
    def transitions(self) -> int:
        return sum(self.counts.transitions.values())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises ArtifactError where the file is missing or is not a manifest of this schema."""
        path = folder / MANIFEST
        try:
            manifest = Manifest.model_validate_json(path.read_text())
        except OSError as error:
            problem = f"{MANIFEST} cannot be read ({error.strerror}); give a datasets/ID"
            raise ArtifactError(f"{str(folder)!r} is not a dataset: {problem}") from error
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise ArtifactError(
                f"{str(path)!r} is not a manifest of schema {SCHEMA}: {problem}; make it again by"
                " its job with --force"
            ) from error
        texts = has_texts(manifest.observation_space) or has_texts(manifest.action_space)
        if manifest.schema_version != (TEXT_SCHEMA if texts else SCHEMA):
            raise ArtifactError(
                f"{str(path)!r} is of an earlier version, which stored texts as characters; make"
                " the dataset again by its job with --force"
            )
        return manifest


def has_texts(space: dict[str, Any]) -> bool:
    """True if a space, as JSON, has a Text leaf."""
    if space["kind"] == "Dict":
        return any(has_texts(child) for _, child in space["spaces"])
    return space["kind"] == "Text" or any(map(has_texts, space.get("spaces", ())))


def check_alike(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raise UsageError where two datasets are of different environments or spaces, or the same."""
    first = manifests[0]
    for path, other in zip(paths[1:], manifests[1:], strict=True):
        a, b = first.environment, other.environment
        fields = ["kwargs", "task", "max_episode_steps"]
        if a.version and b.version:  # "" is unknown
            fields.append("version")
        pairs: dict[str, tuple[Any, Any]] = {"environment id": (current_id(a.id), current_id(b.id))}
        pairs |= {f"environment {name}": (getattr(a, name), getattr(b, name)) for name in fields}
        pairs["observation_space"] = first.observation_space, other.observation_space
        pairs["action_space"] = first.action_space, other.action_space
        for name, (x, y) in pairs.items():
            if x != y:
                raise UsageError(
                    f"datasets {str(paths[0])!r} and {str(path)!r} differ in {name}: {x} and {y};"
                    " use datasets of one environment, or collect the older one again"
                )
    ids = [manifest.id for manifest in manifests]
    if len(set(ids)) < len(ids):
        raise UsageError(f"data.datasets must name each dataset once, got {', '.join(ids)}")


def joined_options(
    manifests: Sequence[Manifest],
) -> tuple[list[ResetOption], list[list[Array | None]]]:
    """All reset options, and for each dataset and option the positions of its values among those of
    all datasets (None: a number).
    """
    options = []
    positions: list[list[Array | None]] = [[] for _ in manifests]
    for column, option in enumerate(manifests[0].task_options):
        values = [manifest.task_options[column].values for manifest in manifests]
        if len({some is None for some in values}) > 1:
            problem = f"the reset option {option.name!r} is a number in one dataset and a choice in"
            raise UsageError(f"{problem} another; collect both with the same reality.task_options")
        union = sorted({value for some in values for value in some or ()}, key=sort_key)
        position = {value: i for i, value in enumerate(union)}
        for joined, some in zip(positions, values, strict=True):
            joined.append(None if some is None else np.array([position[v] for v in some]))
        options.append(ResetOption(name=option.name, values=None if values[0] is None else union))
    return options, positions
