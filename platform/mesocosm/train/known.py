"""Checks of known functions, before anything is spent: on values of the spaces, and on logs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.data.loading.raw import raw_leaves
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.envs.config import KnownConfig
from mesocosm.errors import UsageError
from mesocosm.model.known import REWARD, TERMINATED, KnownFunction, Raw, RawSpace
from mesocosm.model.tensors import Parts
from mesocosm.user_code import one_line

Functions = dict[str, KnownFunction]
"""The functions by part: `reward`, `terminated`."""
SAMPLES, FEWER = 8, 3
"""Transitions of a batch on which a function is tried, and of a smaller one."""
LOGGED, ENDS = 4096, 1024
"""Logged transitions, and last transitions of episodes, on which a function is compared."""
TOLERANCE = 1e-3
"""Error of a reward that is reported, in units of the logged rewards' root mean square."""
REFUSED = 0.01
"""A function is refused above this root mean square error of a reward, in the same units, or this
number of wrong terminations per logged terminal.
"""


def load(config: KnownConfig, prefix: str = "known.") -> Functions:
    """Import the functions of a config whose keys begin with `prefix`.

    Raises:
        UsageError: A function cannot be imported.
    """
    names = {REWARD: config.reward, TERMINATED: config.terminated}
    return {
        part: KnownFunction.load(name, f"{prefix}{part}")
        for part, name in names.items()
        if name is not None
    }


def check_spaces(
    functions: Functions,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    prefix: str = "known.",
) -> None:
    """Try the functions on values drawn from the spaces.

    Raises:
        UsageError: A function fails, has side effects, or its result has another shape or dtype,
            is not finite, or depends on other rows of the batch.
    """
    if not functions:
        return
    observation, following = (_drawn(observation_space, "observation", seed) for seed in (0, 1))
    arguments = observation, _drawn(action_space, "action", 2), following
    for part, function in functions.items():
        _try(part, function, f"{prefix}{part}={function.name!r}", arguments)


def _drawn(space: gymnasium.Space[Any], name: str, seed: int) -> Raw:
    """SAMPLES values of a space."""
    space = copy.deepcopy(space)  # a draw changes the space's generator
    space.seed(seed)
    codec = SpaceCodec(space, name)
    return _raw(codec, *codec.encode_list([space.sample() for _ in range(SAMPLES)]))


def _try(part: str, function: KnownFunction, setting: str, arguments: tuple[Raw, ...]) -> None:
    before = [_map(x, torch.clone) for x in arguments]
    first, second = (_call(function, setting, arguments) for _ in range(2))
    _check_form(part, setting, first, SAMPLES)
    pairs = zip(_tensors(arguments), _tensors(before), strict=True)
    if not all(torch.equal(x, y) for x, y in pairs):
        raise UsageError(f"{setting} must not change its arguments; compute on new tensors")
    if not torch.equal(first, second):
        raise UsageError(
            f"{setting} must be a function of (o, a, o') alone, got two results for the same"
            " arguments; remove its state and its random numbers"
        )
    few = _call(function, setting, [_map(x, _first_with_gradient) for x in arguments])
    _check_form(part, setting, few, FEWER)
    if not torch.allclose(few.double(), first[:FEWER].double()):
        raise UsageError(
            f"{setting} must compute each row from the same row of its arguments, got other values"
            f" for {FEWER} of {SAMPLES} rows alone; do not reduce over the batch"
        )


def _call(function: KnownFunction, setting: str, arguments: Sequence[Raw]) -> Any:
    try:
        return function.call(*arguments)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(
            f"{setting} fails on {SAMPLES} transitions ({reason}); it receives torch tensors"
            " (o, a, o'), batch first, which may require gradients"
        ) from error


def _first_with_gradient(x: Tensor) -> Tensor:
    return x[:FEWER].clone().requires_grad_(x.dtype.is_floating_point)


def _map(value: Raw, function: Callable[[Tensor], Tensor]) -> Raw:
    """The same layout with `function` of each tensor."""
    if isinstance(value, Mapping):
        return {key: _map(child, function) for key, child in value.items()}
    if isinstance(value, tuple):
        return tuple(_map(child, function) for child in value)
    return function(value)


def _tensors(value: Raw) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for child in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(child)


def _check_form(part: str, setting: str, result: Any, rows: int) -> None:
    kind = "bool" if part == TERMINATED else "float"
    if not isinstance(result, Tensor):
        raise UsageError(f"{setting} must return a torch tensor, got {type(result).__name__}")
    right = result.dtype == torch.bool if kind == "bool" else result.dtype.is_floating_point
    if tuple(result.shape) != (rows,) or not right:
        raise UsageError(
            f"{setting} must return a {kind} tensor [{rows}] for {rows} transitions, got"
            f" {str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
        )
    if not torch.isfinite(result).all():
        raise UsageError(
            f"{setting} must be finite for all values of the spaces, got"
            f" {result[~torch.isfinite(result)][0]}; limit it, for example by torch.nan_to_num"
        )


def check_data(functions: Functions, dataset: Dataset, prefix: str = "known.") -> list[str]:
    """Compare the functions with logged transitions: LOGGED of all, and the ends of episodes.

    Returns:
        A warning for each function that is near the data, but not equal.

    Raises:
        UsageError: A function disagrees with them by more than REFUSED.
    """
    if not functions:
        return []
    arguments, rewards, terminated = _logged(dataset)
    warnings = []
    for part, function in functions.items():
        setting = f"{prefix}{part}={function.name!r}"
        result = function.call(*arguments)
        _check_form(part, setting, result, len(rewards))
        wrong, share, text = (
            _terminations(result, terminated) if part == TERMINATED else _rewards(result, rewards)
        )
        if share > REFUSED:
            fix = f"correct the function, or leave {prefix}{part} out"
            raise UsageError(f"{setting} must agree with the data, got {text}; {fix}")
        if wrong:
            warnings.append(f"{setting} differs from the data: {text}")
    return warnings


def _terminations(result: Tensor, logged: Tensor) -> tuple[int, float, str]:
    """(wrong terminations, the same per logged terminal, in words)."""
    terminals, missed = int(logged.sum()), int((logged & ~result).sum())
    false = int((result & ~logged).sum())
    text = (
        f"{missed} of {terminals} terminal transitions missed and {false} of"
        f" {len(logged) - terminals} others called terminal"
    )
    return missed + false, (missed + false) / max(terminals, 1), text


def _rewards(result: Tensor, logged: Tensor) -> tuple[int, float, str]:
    """(rewards beyond the tolerance, root mean square error by that of the rewards, in words)."""
    size, error = float(logged.square().mean().sqrt()) or 1.0, (result - logged).abs()
    wrong, rms = int((error > TOLERANCE * size).sum()), float(error.square().mean().sqrt())
    text = (
        f"{wrong} of {len(logged)} rewards that differ by more than {TOLERANCE * size:.2g} (at"
        f" most {float(error.max()):.3g}, root mean square {rms:.3g} where that of the rewards is"
        f" {size:.3g})"
    )
    return wrong, rms / size, text


def _logged(dataset: Dataset) -> tuple[tuple[Raw, ...], Tensor, Tensor]:
    """((o, a, o'), rewards [N] float64, terminated [N] bool) of logged transitions."""
    table = dataset.table
    table = table[table["length"] > 0]
    ends = np.cumsum(table["length"].astype(np.int64))
    total = int(ends[-1])
    evenly = np.arange(min(LOGGED, total)) * total // min(LOGGED, total)
    last = ends[np.arange(min(ENDS, len(ends))) * len(ends) // min(ENDS, len(ends))] - 1
    chosen = np.union1d(evenly, last)
    number = np.searchsorted(ends, chosen, "right")
    rows = table["first_row"][number] + chosen - (ends - table["length"])[number]
    pairs = rows[:, None] + np.arange(2)
    columns = dict.fromkeys(("act_num", "act_cat", "reward", "terminated"), rows)
    columns |= dict.fromkeys(("obs_num", "obs_cat"), pairs)
    data = dataset.gathered(table["shard"][number], columns)
    dataset.turn(())
    numbers, categories = data["obs_num"], data["obs_cat"]
    now, following = (
        _raw(dataset.observation_codec, numbers[:, i], categories[:, i]) for i in (0, 1)
    )
    action = _raw(dataset.action_codec, data["act_num"], data["act_cat"])
    rewards = torch.from_numpy(data["reward"].astype(np.float64))
    return (now, action, following), rewards, torch.from_numpy(data["terminated"].astype(bool))


def _raw(codec: SpaceCodec, numbers: NDArray[Any], categories: NDArray[Any]) -> Raw:
    """Convert raw columns to the arguments of a known function."""
    parts = Parts(
        torch.from_numpy(numbers.astype(np.float64)), torch.from_numpy(categories.astype(np.int64))
    )
    return RawSpace(raw_leaves(codec))(parts)
