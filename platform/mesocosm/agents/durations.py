"""Steps of different duration, which an environment reports in `info["duration"]`: a discount of
gamma^dt, and a weight of dt.

gamma is per unit of duration. PPO's advantages are those of a semi-Markov process, delta_t =
r_t + gamma^dt_t V(s_t+1) - V(s_t), summed with gamma^dt_t lambda. The targets of DQN and SAC and
the V-trace of APPO and IMPALA discount alike. Without durations RLlib's numbers keep their bits.

The weight is for samples that arrive by time (Yang, He-Yueya, Liang, arXiv 2509.01684). Where
environments repeat an action until a clock's window closes, action a appears pi(a) T/dt(a) times,
and unweighted sums favour fast actions. In lock step samples are distributed as the policy. They
also are where environments run at their own pace and no unfinished step is dropped (a renewal
process takes the fraction pi(a) of its steps with a, whatever their duration). The weight would
bias both. RLlib's samplers are of these two kinds, so that only an environment with
metadata["arrival"] = "time" is weighted. (Where a window's unfinished steps are dropped, fast
actions are over-represented too, but by less than dt.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import GeneralAdvantageEstimation
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from mesocosm.agents.learners import on_learners
from mesocosm.errors import MesocosmError, UsageError

DURATION = "duration"
WEIGHT = "weight"
ARRIVAL = "arrival"
"""Key of a vector environment's metadata; "time" where its samples arrive by time"""


def arrival_weights(durations: NDArray[Any]) -> NDArray[np.float64]:
    """Weights of samples that arrived by time: dt over its mean."""
    total = durations.sum()
    return durations * (len(durations) / total) if total > 0 else np.ones(len(durations))


class Durations:
    """Converts the durations of a NEXT_STEP vector environment into infos that RLlib keeps."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._by_time = metadata.get(ARRIVAL) == "time"
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
        names = (DURATION, WEIGHT) if self._by_time else (DURATION,)
        return {key: durations for key in names} | {f"_{key}": stepped for key in names}


def install(algorithm: Algorithm) -> None:
    """Make the learners discount by durations, if their episodes have them."""
    on_learners(algorithm, partial(_install, type(algorithm).__name__))
    buffer: Any = getattr(algorithm, "local_replay_buffer", None)
    if buffer is not None:
        buffer.sample = partial(buffer.sample, include_infos=True)


def _install(algo: str, learner: Any) -> None:
    config, pipeline = learner.config, learner._learner_connector
    discounting = InfoConnector(DURATION, partial(discount, config.gamma))
    if any(isinstance(piece, GeneralAdvantageEstimation) for piece in pipeline.connectors):
        pipeline.insert_before(GeneralAdvantageEstimation, discounting)
        pipeline.append(InfoConnector(WEIGHT, weight_advantages))
    else:
        pipeline.append(discounting)
        if hasattr(config, "vtrace"):
            pipeline.append(InfoConnector(WEIGHT, partial(refuse, algo)))


class InfoConnector(ConnectorV2):
    """A learner connector: `apply(columns of the module, values)` with a value of each step's
    infos, where there are any.
    """

    def __init__(self, key: str, apply: Callable[[dict[str, Any], NDArray[np.float64]], None]):
        super().__init__()
        self.key, self.apply = key, apply

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        iterator = self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False)
        infos = [episode.get_infos() for episode in iterator]
        if any(self.key in (info[1] or {}) for info in infos if len(info) > 1):
            # RLlib adds a step for an episode's last value: it counts 1.
            steps = [step or {} for episode in infos for step in episode[1:]]
            values = np.array([step.get(self.key, 1.0) for step in steps], np.float64)
            self.apply(batch[DEFAULT_MODULE_ID], values)
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


def weight_advantages(columns: dict[str, Any], durations: NDArray[np.float64]) -> None:
    """Weight the advantages by `arrival_weights` where samples arrived by time.

    The value function is not weighted. It is a baseline, and biases a policy gradient only by what
    it bootstraps.
    """
    advantages = columns[Postprocessing.ADVANTAGES]
    real = columns[Columns.LOSS_MASK].cpu().numpy()
    weights = np.ones(len(durations))
    weights[real] = arrival_weights(durations[real])
    tensor = torch.as_tensor(weights).to(advantages.device, advantages.dtype)
    columns[Postprocessing.ADVANTAGES] = advantages * tensor


def refuse(algo: str, columns: dict[str, Any], durations: NDArray[np.float64]) -> None:
    """Reject samples that arrived by time, where the loss computes the policy gradient (V-trace).

    Q-learning and SAC need no weight: their targets hold for any frequency of the actions.
    """
    raise UsageError(
        f"agent.algo={algo} cannot weight samples that arrive by time"
        " (metadata['arrival']='time'); use PPO, DQN or SAC"
    )
