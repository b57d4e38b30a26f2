"""The config of reality: the environment, its task distribution, its price and budget."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mesocosm import checks
from mesocosm.config import ADDED
from mesocosm.errors import UsageError

BOUNDS = ("drop", "clip", "ignore")
"""Values of `reality.bounds`."""
ROUNDING = 1e-9
"""Relative error of a sum of prices, which must not cost a step."""
PAID = (
    "reality.budget",
    "reality.price",
    "reality.step_timeout_s",
    "reality.first_timeout_s",
    "reality.memory_gb",
    "reality.known",
)
"""Keys that change costs, waiting times and worlds, but no transition."""


@dataclass
class PriceConfig:
    """The declared price of reality: of a robot's step, an assay, a browser's action."""

    per_step: float = 0.0
    per_reset: float = 0.0
    currency: str = "USD"
    per_second: float = field(default=0.0, metadata=ADDED)
    """Price of a second of `info["duration"]`, which every step must then report. 2 USD an hour are
    2 / 3600.
    """
    longest_s: float | None = field(default=None, metadata=ADDED)
    """The longest duration of a step or reset, in seconds. `reality.budget.money` reserves it for
    each call, and charges it for a call that fails without a duration. Defaults to the longest in
    the ledger.
    """

    def of(self, steps: int, resets: int, duration: float) -> float:
        """The price of real steps and resets that take `duration` seconds in all."""
        return steps * self.per_step + resets * self.per_reset + duration * self.per_second


@dataclass
class BudgetConfig:
    steps: int | None = None
    """Real steps that the purposes collect, select and play may take together. None for no bound.
    """
    money: float | None = field(default=None, metadata=ADDED)
    """The money that these steps and their resets may cost together, by `reality.price`. None for
    no bound. The bound holds as long as no step takes longer than `reality.price.longest_s`.
    """


@dataclass
class DrawnOption:
    """The distribution of one reset option: uniform over `choices`, or a float in [low, high)."""

    choices: list[Any] | None = None
    """All numbers (with a float among them the option is a number of the task, else a category),
    all booleans or all texts.
    """
    low: float | None = None
    high: float | None = None


@dataclass
class KnownConfig:
    """Parts of a world that need no learning, each a pure `module:function` of (o, a, o') as torch
    tensors, batch first (docs/environments.md).
    """

    reward: str | None = None
    """Returns floats [B]."""
    terminated: str | None = None
    """Returns bools [B]."""


@dataclass
class RealityConfig:
    env: str = ""
    """A Gymnasium id, or `module:Id` of your own: the current directory is importable, `Id` is
    registered or a name in the module. `openenv:URL` is an environment behind OpenEnv's protocol.
    """
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    task: list[str] = field(default_factory=list)
    """Keys of a Dict observation, or names of reset options, that identify an episode's task."""
    task_options: dict[str, DrawnOption] = field(default_factory=dict)
    """How each reset option of `task` is drawn, by name."""
    success: str | None = None
    """`return >= 475` (or >, <=, <), or `info.KEY`: true at the last step."""
    horizon: int | None = None
    """Steps after which an episode is truncated. Replaces the environment's own time limit."""
    bounds: str = "drop"
    """Policy of collect and import for a number outside the bounds of its space: drop the episode,
    clip the number, or ignore the bounds. Judged episodes are never dropped for their bounds.
    """
    price: PriceConfig = field(default_factory=PriceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    step_timeout_s: float = 60.0
    """A step or reset that takes longer has hung: its worker is killed and the episode dropped.
    The behaviour's own time is not bounded.
    """
    first_timeout_s: float | None = field(default=None, metadata=ADDED)
    """Time limit of the resets and steps of a new environment up to its first step, in which a
    simulator may start or compile. Defaults to `step_timeout_s`.
    """
    memory_gb: float | None = field(default=None, metadata=ADDED)
    """GiB that the process of an environment and its child processes may use. `collect` limits its
    workers to those that fit into the cluster's memory, and replaces a worker that uses more.
    """
    known: KnownConfig = field(default_factory=KnownConfig)
    """Known parts of a loop's worlds, as in `known` of pretrain. Other jobs do not use them."""


def timeout(config: RealityConfig, first: bool) -> tuple[str, float]:
    """(key, seconds) of the time limit of a step or reset.

    Args:
        config: Reality's.
        first: The environment has not taken a step yet.
    """
    if first and config.first_timeout_s is not None:
        return "reality.first_timeout_s", config.first_timeout_s
    return "reality.step_timeout_s", config.step_timeout_s


def check(config: RealityConfig) -> None:
    """Raise UsageError on the first invalid value. Makes no environment."""
    rule = "a Gymnasium id such as 'InvertedPendulum-v5', or module:Id of your own"
    _require(bool(config.env), "reality.env", rule, config.env)
    keys = ("price.per_step", "price.per_reset", "price.per_second")
    checks.within(config, 0, math.inf, *keys, open="]", prefix="reality.")
    for key, value in (
        ("first_timeout_s", config.first_timeout_s),
        ("memory_gb", config.memory_gb),
        ("price.longest_s", config.price.longest_s),
        ("budget.money", config.budget.money),
    ):
        rule = "above 0 and finite"
        _require(value is None or 0 < value < math.inf, f"reality.{key}", rule, value)
    currency = config.price.currency
    _require(bool(currency), "reality.price.currency", "a currency such as 'USD'", currency)
    checks.at_least(config, 0, "budget.steps", prefix="reality.")
    price = config.price
    free = not (price.per_step or price.per_reset or price.per_second)
    if config.budget.money is not None and free:
        raise UsageError(
            f"reality.budget.money={config.budget.money:g} has no effect if reality is free; set"
            " reality.price.per_step, per_reset or per_second"
        )
    if price.longest_s is not None and not price.per_second:
        raise UsageError(
            "reality.price.longest_s must be null unless reality.price.per_second is above 0, got"
            f" {price.longest_s:g}; set per_second, or leave longest_s out"
        )
    checks.at_least(config, 1, "horizon", prefix="reality.")
    check_bounds(config)
    checks.within(config, 0, math.inf, "step_timeout_s", open="[]", prefix="reality.")
    task = list(config.task)
    _require(len(set(task)) == len(task), "reality.task", "a list of different names", task)
    for name, option in config.task_options.items():
        key = f"reality.task_options.{name}"
        if name not in task:
            problem = f"{key} is drawn but is not part of the task"
            raise UsageError(f"{problem}; add {name!r} to reality.task={task}")
        check_option(key, option)
    if config.success is not None:
        parse_success(config.success)


def check_affordable(config: RealityConfig, steps: int) -> None:
    """Raise UsageError where the budget of money is less than the price of `steps` steps and a
    reset, without their time.
    """
    money, least = config.budget.money, config.price.of(steps, 1, 0.0)
    if money is not None and steps and least > money * (1 + ROUNDING):
        raise UsageError(
            f"reality.budget.money must be >= {least:g} {config.price.currency}, the price of"
            f" {steps} steps and a reset, got {money:g}; raise it, or lower the steps"
        )


def _require(valid: bool, key: str, rule: str, value: Any) -> None:
    if not valid:
        raise UsageError(f"{key} must be {rule}, got {value!r}")


def check_bounds(config: RealityConfig) -> None:
    """Raise UsageError where `reality.bounds` is unknown."""
    checks.one_of(config, BOUNDS, "bounds", prefix="reality.")


def check_option(key: str, option: DrawnOption) -> None:
    """Raise UsageError where the option of the config key `key` has no valid distribution."""
    choices, low, high = option.choices, option.low, option.high
    if (choices is not None) == (low is not None or high is not None):
        raise UsageError(
            f"{key} needs either choices or both low and high; give {key}.choices=[...] or"
            f" {key}.low and {key}.high"
        )
    if choices is None:
        valid = low is not None and high is not None and -math.inf < low < high < math.inf
        _require(valid, f"{key}.low and high", "two numbers with low < high", (low, high))
        return
    valid = all(
        isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        for value in choices
    )
    kinds = {float if type(value) is int else type(value) for value in choices}
    rule = "one or more finite numbers, or booleans, or texts"
    _require(valid and len(kinds) == 1, f"{key}.choices", rule, list(choices))


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def parse_success(text: str) -> Callable[[float, Mapping[str, Any]], bool]:
    """`reality.success` as a function of an episode's return and its last step's info.

    Raises UsageError on any other syntax.
    """
    if by_return := re.fullmatch(r"\s*return\s*(>=|<=|>|<)\s*(\S+)\s*", text):
        compare = _OPERATORS[by_return[1]]
        try:
            bound = float(by_return[2])
        except ValueError:
            bound = math.nan
        if math.isfinite(bound):
            return lambda total, info: compare(total, bound)
    if by_info := re.fullmatch(r"\s*info\.(\w+)\s*", text):
        key = by_info[1]
        return lambda total, info: bool(info.get(key, False))
    rule = "'return >= NUMBER' (or >, <=, <) or 'info.KEY'"
    raise UsageError(f"reality.success must be {rule}, got {text!r}")
