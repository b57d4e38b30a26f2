"""What reality is: an environment, the distribution of its tasks, what it costs and how much of it
may be spent.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mesocosm.errors import UsageError

BOUNDS = ("drop", "clip", "ignore")
"""Values of `reality.bounds`."""
PAID = ("reality.budget", "reality.price", "reality.step_timeout_s")
"""Keys that change what is paid or waited for, not what reality answers."""


@dataclass
class PriceConfig:
    """The declared price of the ground truth: of a robot's step, an assay, a browser's action."""

    per_step: float = 0.0
    per_reset: float = 0.0
    currency: str = "USD"


@dataclass
class BudgetConfig:
    steps: int | None = None
    """Real steps that the purposes collect and select may spend together; None is no bound."""


@dataclass
class TaskOption:
    """How one reset option is drawn: uniformly from `choices`, or a float uniform in [low, high)."""

    choices: list[Any] | None = None
    """Of one kind: numbers (with a float among them the option is a number of the task, else a
    category), booleans or texts.
    """
    low: float | None = None
    high: float | None = None


@dataclass
class RealityConfig:
    env: str = ""
    """A Gymnasium id, or `module:Id` of your own: the current directory is importable, `Id` is
    registered or a name in the module.
    """
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    task: list[str] = field(default_factory=list)
    """What names an episode's task: keys of a Dict observation, or names of reset options."""
    task_options: dict[str, TaskOption] = field(default_factory=dict)
    """How each reset option of `task` is drawn, by name."""
    success: str | None = None
    """`return >= 475` (or >, <=, <), or `info.KEY`: true at the last step."""
    horizon: int | None = None
    """Truncates episodes after so many steps, in place of the environment's own time limit."""
    bounds: str = "drop"
    """What collect and import do with a number outside the bounds of its space: drop the episode,
    clip the number, or ignore the bounds. Judged episodes are never dropped for their bounds.
    """
    price: PriceConfig = field(default_factory=PriceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    step_timeout_s: float = 60.0
    """A step or reset that takes longer has hung: its worker is killed and the episode dropped.
    Time that a behaviour takes to choose is not bounded.
    """


def check(config: RealityConfig) -> None:
    """Raise UsageError on the first value that cannot be meant. Makes no environment."""
    if not config.env:
        raise UsageError(
            "reality.env is not set; give a Gymnasium id such as 'InvertedPendulum-v5', or"
            " module:Id of your own"
        )
    for key, value in (("per_step", config.price.per_step), ("per_reset", config.price.per_reset)):
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(
                f"reality.price.{key}={value} is not a price; give a number of at least 0"
            )
    if not config.price.currency:
        raise UsageError("reality.price.currency='' names no currency; give one such as 'USD'")
    if config.budget.steps is not None and config.budget.steps < 0:
        raise UsageError(
            f"reality.budget.steps={config.budget.steps} is negative; give a number of real steps,"
            " or null for no bound"
        )
    if config.horizon is not None and config.horizon < 1:
        raise UsageError(
            f"reality.horizon={config.horizon} leaves no step; give at least 1, or null for the"
            " environment's own limit"
        )
    check_bounds(config)
    if not (math.isfinite(config.step_timeout_s) and config.step_timeout_s > 0):
        raise UsageError(
            f"reality.step_timeout_s={config.step_timeout_s} is no time limit; give seconds above 0"
        )
    if len(set(config.task)) != len(config.task):
        raise UsageError(
            f"reality.task={list(config.task)} names something twice; name each observation key or"
            " reset option once"
        )
    for name, option in config.task_options.items():
        if name not in config.task:
            key = f"reality.task_options.{name}"
            raise UsageError(
                f"{key} is drawn but is no part of the task; add {name!r} to"
                f" reality.task={list(config.task)}"
            )
        check_option(f"reality.task_options.{name}", option)
    if config.success is not None:
        parse_success(config.success)


def check_bounds(config: RealityConfig) -> None:
    """Raise UsageError where `reality.bounds` is unknown."""
    if config.bounds not in BOUNDS:
        raise UsageError(
            f"reality.bounds must be 'drop', 'clip' or 'ignore', got {config.bounds!r}"
        )


def check_option(key: str, option: TaskOption) -> None:
    """Raise UsageError where nothing can be drawn from the option of the config key `key`."""
    ranged = option.low is not None or option.high is not None
    if (option.choices is not None) == ranged:
        raise UsageError(
            f"{key} needs either choices or both low and high; give {key}.choices=[...] or"
            f" {key}.low and {key}.high"
        )
    if option.choices is not None:
        if not option.choices:
            raise UsageError(f"{key}.choices=[] leaves nothing to draw; give at least one value")
        for value in option.choices:
            if not isinstance(value, bool | int | float | str) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise UsageError(
                    f"{key}.choices holds {value!r}; give finite numbers, booleans or texts"
                )
        kinds = {float if type(value) is int else type(value) for value in option.choices}
        if len(kinds) > 1:
            raise UsageError(
                f"{key}.choices={list(option.choices)} are of several kinds; give numbers, booleans"
                " or texts alone"
            )
    elif (
        option.low is None
        or option.high is None
        or not (
            math.isfinite(option.low) and math.isfinite(option.high) and option.low < option.high
        )
    ):
        raise UsageError(
            f"{key}.low={option.low} and high={option.high} are no range; give two numbers with low"
            " < high"
        )


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def parse_success(text: str) -> Callable[[float, Mapping[str, Any]], bool]:
    """`reality.success` as a function of an episode's return and its last step's info. Raises
    UsageError on any other syntax.
    """
    by_return = re.fullmatch(r"\s*return\s*(>=|<=|>|<)\s*(\S+)\s*", text)
    if by_return:
        compare = _OPERATORS[by_return[1]]
        try:
            bound = float(by_return[2])
        except ValueError:
            bound = math.nan
        if math.isfinite(bound):
            return lambda total, info: compare(total, bound)
    by_info = re.fullmatch(r"\s*info\.(\w+)\s*", text)
    if by_info:
        key = by_info[1]
        return lambda total, info: bool(info.get(key, False))
    raise UsageError(
        f"reality.success={text!r} is not understood; write 'return >= NUMBER' (or >, <=, <) or"
        " 'info.KEY'"
    )
