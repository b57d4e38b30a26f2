"""The gain of an agent's training, in the world and in reality: its returns less those of the
policy that the training began with, in the same episodes.

A gain in the world is a claim; a gain in reality is a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.judge import JudgeResult
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.policy_set import ComparedPolicy, initial_agent
from mesocosm.policies.policy import SNAPSHOTS
from mesocosm.policies.stored import policy_of
from mesocosm.store.artifacts import Artifact, Storage


@dataclass(frozen=True)
class PairedGain:
    """The mean difference of returns over pairs of episodes with the same start and seed."""

    mean: float
    interval: stats.Interval | None
    """90% bootstrap interval over the pairs; None for a single pair."""
    start: float
    """Mean return of the policy that training began with."""
    pairs: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean if self.interval is None else self.interval[0]


@dataclass(frozen=True)
class Gain:
    """The gain in the world, where the agent was trained, and in reality."""

    start: str
    """The name of the policy that training began with."""
    world: PairedGain
    real: PairedGain

    @property
    def unconfirmed(self) -> bool:
        """True if the world shows a gain that the real episodes do not show."""
        return self.world.low > 0 >= self.real.low

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"unconfirmed": self.unconfirmed}


def start_of(agent: Artifact, storage: Storage) -> ComparedPolicy:
    """The policy that an agent's training began with: that of `init`, or snapshot 0.

    Raises:
        UsageError: The agent does not have it.
    """
    if (initial := initial_agent(agent)) is not None:
        name = f"agents/{initial}"
    elif (agent.path / SNAPSHOTS / "0").is_dir():
        name = f"{agent.name}@0"
    else:
        raise UsageError(
            f"gain must be false for {agent.name}, which holds no snapshot of its training's start;"
            " train it with init, or with snapshots of at least 1"
        )
    return ComparedPolicy(name, policy_of(storage, name))


def gain(
    start: str,
    real: tuple[JudgeResult, JudgeResult],
    imagined: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Gain:
    """Compute the gain.

    Args:
        start: The name of the policy that training began with.
        real: The judged episodes of (agent, start), of the same seed.
        imagined: Returns [n] of (agent, start) in episodes of the same seed.

    Raises:
        MesocosmError: No episode was judged of both.
    """
    agent, before = ({e.index: e.total_reward for e in result.episodes} for result in real)
    both = sorted(agent.keys() & before.keys())
    if not both:
        raise MesocosmError(
            f"gain: no judged episode was finished by both the agent and {start}; raise episodes"
        )
    pairs = [agent[k] for k in both], [before[k] for k in both]
    return Gain(start, _paired(*imagined), _paired(*pairs))


def _paired(agent: ArrayLike, start: ArrayLike) -> PairedGain:
    after, before = np.asarray(agent, np.float64), np.asarray(start, np.float64)
    differences = after - before
    interval = stats.mean_interval(differences)
    return PairedGain(float(differences.mean()), interval, float(before.mean()), len(differences))


def sentence(values: Mapping[str, Any]) -> str:
    """The values of `Gain.to_json` as a sentence."""
    text = (
        f"over {values['start']}, with which its training began, it gains"
        f" {words(values['world'])} in the world and {words(values['real'])} in reality"
    )
    if values["unconfirmed"]:
        text += f": {values['real']['pairs']} pairs of real episodes do not show that gain"
    return text


def words(values: Mapping[str, Any]) -> str:
    """A `PairedGain` as a dict: the mean, and its interval in brackets."""
    mean, interval = values["mean"], values["interval"]
    text = f"{mean:+.3g}"
    return text if interval is None else f"{text} ({interval[0]:.3g} to {interval[1]:.3g})"


def figures(values: Mapping[str, Any] | None) -> dict[str, float]:
    """The figures of `Gain.to_json` to log; empty without a gain."""
    return {} if values is None else {f"gain/{k}": values[k]["mean"] for k in ("world", "real")}
