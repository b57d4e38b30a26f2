"""Discounts by gamma^dt where steps take different times, which an environment reports in
`info["duration"]`.

gamma is per unit of duration. PPO's advantages are those of a semi-Markov process, delta_t =
r_t + gamma^dt_t V(s_t+1) - V(s_t), summed with gamma^dt_t lambda. The targets of DQN and SAC and
the V-trace of APPO and IMPALA discount in the same way. Without durations RLlib's numbers keep
their bits.

Samples are not weighted by duration. Where environments repeat an action until a clock's window
closes, fast actions are over-represented (Yang, He-Yueya, Liang, arXiv 2509.01684). RLlib's
samplers step in lock step, or drop no unfinished step. In both an action's share of the steps is
its probability, and a weight of dt would bias it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import GeneralAdvantageEstimation
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from mesocosm import compat
from mesocosm.agents.learner_access import on_learners
from mesocosm.errors import MesocosmError, UsageError

DURATION = "duration"


class Durations:
    """Converts the durations of a NEXT_STEP vector environment into infos that RLlib keeps."""

    def __init__(self) -> None:
        self.reported: bool | None = None
        """True if the environment reports durations; None before the first step"""

    def infos(
        self, infos: Mapping[str, Any], stepped: NDArray[np.bool_], ended: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """The infos of the environments that `stepped`, or {} without durations.

        A negative duration, which a world may imagine, becomes 0. A step that `ended` its episode
        without a duration has failed in reality: it takes 0, so that its last value counts.

        Raises:
            MesocosmError: A duration is not finite, or only some steps have one.
        """
        default = np.full(len(stepped), DURATION in infos)
        reported = np.asarray(infos.get(f"_{DURATION}", default), np.bool_) & stepped
        silent = stepped & ~ended & ~reported
        if self.reported is None and (reported | silent).any():
            self.reported = bool(reported.any())
        if self.reported is not None and (silent if self.reported else reported).any():
            raise MesocosmError(
                "the environment gave info['duration'] at some steps and not at others; give it at"
                " every step, or at none"
            )
        if not self.reported:
            return {}
        durations = np.zeros(len(stepped))
        if reported.any():
            durations[reported] = np.asarray(infos[DURATION])[reported].astype(np.float64)
        wrong = durations[~np.isfinite(durations)]
        if wrong.size:
            raise MesocosmError(
                f"the environment gave info['duration']={wrong[0]}; give a finite number"
            )
        durations = np.maximum(durations, 0.0)
        return {DURATION: durations, f"_{DURATION}": stepped}


def install(algorithm: Algorithm) -> None:
    """Make the learners discount by durations, if their episodes have them."""
    on_learners(algorithm, _install)
    buffer: Any = getattr(algorithm, "local_replay_buffer", None)
    if buffer is not None:
        compat.sample_infos(buffer)


def _install(learner: Any) -> None:
    pipeline = learner._learner_connector
    connector = DiscountConnector(learner.config.gamma)
    if any(isinstance(piece, GeneralAdvantageEstimation) for piece in pipeline.connectors):
        pipeline.insert_before(GeneralAdvantageEstimation, connector)
    else:
        pipeline.append(connector)


class DiscountConnector(ConnectorV2):
    """A learner connector that calls `discount` with each step's duration, if there are any."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        iterator = self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False)
        infos = [episode.get_infos() for episode in iterator]
        if any(DURATION in (info[1] or {}) for info in infos if len(info) > 1):
            # RLlib adds a step for an episode's last value: it counts 1.
            steps = [step or {} for episode in infos for step in episode[1:]]
            durations = np.array([step.get(DURATION, 1.0) for step in steps], np.float64)
            discount(self.gamma, batch[DEFAULT_MODULE_ID], durations)
        return batch


def discount(gamma: float, columns: dict[str, Any], durations: NDArray[np.float64]) -> None:
    """gamma^dt in place of gamma, at the end of the pipeline or before the advantages.

    RLlib's losses multiply by gamma (1 - terminated) wherever a next value or advantage counts. A
    `terminated` of 1 - gamma^(dt-1) where the episode continues makes it gamma^dt.
    """
    if gamma == 0:
        return
    n_step = int(columns["n_step"].max()) if "n_step" in columns else 1
    if n_step != 1:
        raise UsageError(f"params.n_step must be 1 where steps have durations, got {n_step}")
    terminated = columns[Columns.TERMINATEDS]
    assert terminated.shape == durations.shape, (terminated.shape, durations.shape)
    factor = torch.as_tensor(gamma ** (durations - 1.0)).to(terminated.device, torch.float32)
    columns[Columns.TERMINATEDS] = 1.0 - (1.0 - terminated.float()) * factor
