"""A model's view of an environment: slots of normalised numbers and of categories.

Numbers are normalised float32, categories int64. An observation, an action and a task are each a
`Parts`; `mesocosm.data.loading.codec` converts Gymnasium spaces to parts and back.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # datasets, and the commands that only read them, need no torch
    from torch import Tensor


@dataclass(frozen=True)
class TextSpan:
    """Consecutive category slots of one text: category 0 ends and pads it, c > 0 is character c."""

    start: int
    length: int
    min_length: int


@dataclass(frozen=True)
class ImageSpan:
    """Consecutive category slots of one image's codes: row by row, `digits` slots a position."""

    start: int
    rows: int
    columns: int
    digits: int

    @property
    def length(self) -> int:
        """The number of slots."""
        return self.rows * self.columns * self.digits


@dataclass(frozen=True)
class TableSpan:
    """The columns of an observation that are a table of N slots."""

    numbers: tuple[tuple[int, ...], ...]
    """[N][p]: the numbers of each slot"""
    categories: tuple[tuple[int, ...], ...]
    """[N][q]: the categories of each slot"""
    present: int
    """The place among a slot's q categories of the flag that says whether it holds something"""
    pointer: int | None
    """The category of an action that is a slot's number; None if actions do not point to slots"""


@dataclass(frozen=True)
class PartSpec:
    """The slots of an observation, an action or a task: numbers first, then categories."""

    numbers: int = 0
    bins: tuple[float, ...] = ()
    """Precision of each number in normalised units: its density is integrated over this width."""
    categories: tuple[int, ...] = ()  # cardinality of each category slot
    texts: tuple[TextSpan, ...] = ()
    grid: tuple[float | None, ...] = ()
    """The normalised position of zero for each integer number, whose values are whole bins away
    from it; None for another number; empty if no number is an integer.
    """
    table: TableSpan | None = None
    """Columns whose slots share their weights."""
    images: tuple[ImageSpan, ...] = ()


@dataclass(frozen=True)
class Spec:
    """Everything that a model must know of an environment."""

    observation: PartSpec
    action: PartSpec
    task: PartSpec = PartSpec()
    reward_values: tuple[float, ...] | None = None
    """Raw reward values if at most 64 are distinct: rewards are then categories, else numbers."""
    reward_mean: float = 0.0
    reward_scale: float = 1.0  # numeric rewards enter as (reward - reward_mean) / reward_scale
    reward_bin: float = 1e-3  # precision of a numeric reward, in units of `reward_scale`
    reward_rare: tuple[float, float, float] | None = None
    """(share, mean, scale) of rare large rewards, the last two normalised: `reward_mean` and
    `reward_scale` are then those of all other rewards.
    """
    reward_far: tuple[float, float] | None = None
    """(middle, distance), raw: a reward farther than this from the middle is a rare large one. None
    if no reward is, and in worlds older than this field.
    """
    durations: bool = False
    duration_mean: float = 0.0
    duration_scale: float = 1.0
    duration_bin: float = 1e-3  # as for rewards, of `info["duration"]`
    duration_log: bool = False  # the duration's logarithm is normalised and learned
    terminal_rate: float = 0.0  # fraction of the training transitions that terminate

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if not self.duration_log:  # worlds are older than this field
            del values["duration_log"]
        for name in ("reward_rare", "reward_far"):
            if values[name] is None:
                del values[name]
        for name in ("observation", "action", "task"):
            for field in ("table", "images"):
                if not values[name][field]:  # worlds are older than these
                    del values[name][field]
        return values

    def seconds(self, duration: Tensor) -> Tensor:
        """Normalised durations as seconds."""
        value = duration * self.duration_scale + self.duration_mean
        return value.exp() if self.duration_log else value

    @property
    def reward_size(self) -> float:
        """Root mean square of the data's rewards, the rare large ones included, raw units; 1 if all
        are 0.
        """
        constant = self.reward_values is not None and len(self.reward_values) == 1
        size = math.hypot(self.reward_mean, 0.0 if constant else self.reward_scale) or 1.0
        if self.reward_rare is None:
            return size
        share, mean, scale = self.reward_rare
        rare = math.hypot(self.reward_mean + mean * self.reward_scale, scale * self.reward_scale)
        return math.hypot(math.sqrt(1.0 - share) * size, math.sqrt(share) * rare)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Spec:
        """The inverse of `to_json`."""

        added = ("duration_log", "reward_rare", "reward_far")
        names = [field.name for field in fields(Spec) if field.name not in added]
        values = {name: data[name] for name in names}
        values["duration_log"] = data.get("duration_log", False)
        for name in ("reward_rare", "reward_far"):
            values[name] = None if data.get(name) is None else tuple(data[name])
        for name in ("observation", "action", "task"):
            part: dict[str, Any] = {"grid": (), **data[name]}
            part["texts"] = [TextSpan(**text) for text in part["texts"]]
            lists = {key: tuple(part[key]) for key in ("bins", "categories", "texts", "grid")}
            table = part.get("table")
            if table is not None:
                rows = {key: tuple(map(tuple, table[key])) for key in ("numbers", "categories")}
                table = TableSpan(**{**table, **rows})
            images = tuple(ImageSpan(**image) for image in part.get("images", ()))
            values[name] = PartSpec(part["numbers"], **lists, table=table, images=images)
        if values["reward_values"] is not None:
            values["reward_values"] = tuple(values["reward_values"])
        return Spec(**values)
