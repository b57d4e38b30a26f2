"""Steps of different duration, where an environment says in `info["duration"]` how long a step
took: a discount of gamma^dt, and a weight of dt.

gamma is per unit of duration. PPO's advantages are then those of a semi-Markov process, delta_t =
r_t + gamma^dt_t V(s_t+1) - V(s_t), summed up with gamma^dt_t lambda; the targets of DQN and SAC and
the V-trace of APPO and IMPALA discount alike. Without durations RLlib's numbers stay as they are,
bit for bit.

The weight is for samples that arrive by time (Yang, He-Yueya, Liang, arXiv 2509.01684): where
environments repeat what they began until a clock's window closes, action a is seen pi(a) T/dt(a)
times, and unweighted sums favour what is fast. Samples that come in lock step are distributed as
the policy is, and so are those of environments at their own pace where what is under way goes on
and nothing is dropped (a renewal process takes the share pi(a) of its steps with a, however long
each lasts): the weight would bias both. RLlib's samplers are of these two kinds, so that only an
environment that says so of itself, by metadata["arrival"] = "time", is weighted. (Where a window's
unfinished steps are dropped, fast actions are over-represented too, but by less than dt.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

from mesocosm.errors import MesocosmError, UsageError

DURATION = "duration"
WEIGHT = "weight"
ARRIVAL = "arrival"
"""Key of a vector environment's metadata; "time" where its samples arrive by time."""


def arrival_weights(durations: NDArray[Any]) -> NDArray[np.float64]:
    """What samples that arrived by time count each: dt over its mean, so that the mean weight is 1."""
    total = durations.sum()
    return durations * (len(durations) / total) if total > 0 else np.ones(len(durations))


class Durations:
    """The durations of a NEXT_STEP vector environment's steps, out of its infos and into infos that
    RLlib keeps.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._by_time = metadata.get(ARRIVAL) == "time"
        self.given: bool | None = None

    def infos(
        self, infos: Mapping[str, Any], stepped: NDArray[np.bool_], ended: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """Those of the environments that `stepped`; {} where the environment gives none. Below 0,
        as a world may imagine one, is 0.

        A step that `ended` its episode without a duration has failed in reality: it took no time,
        so that its last value stands. Raises MesocosmError for a duration that is not finite, and
        where some steps have one and others not.
        """
        given = (
            np.asarray(
                infos.get(f"_{DURATION}", np.full(len(stepped), DURATION in infos)), np.bool_
            )
            & stepped
        )
        silent = stepped & ~ended & ~given
        if self.given is None and (given | silent).any():
            self.given = bool(given.any())
        if self.given is not None and (silent if self.given else given).any():
            raise MesocosmError(
                "the environment gave info['duration'] at some steps and not at others; give it at"
                " every step, or at none"
            )
        if not self.given:
            return {}
        durations = np.zeros(len(stepped))
        if given.any():
            durations[given] = np.asarray(infos[DURATION])[given].astype(np.float64)
        if not np.isfinite(durations).all():
            raise MesocosmError(
                f"the environment gave info['duration']={durations[~np.isfinite(durations)][0]};"
                " give a finite number"
            )
        durations = np.maximum(durations, 0.0)
        told = {DURATION: durations, f"_{DURATION}": stepped}
        return told | ({WEIGHT: durations, f"_{WEIGHT}": stepped} if self._by_time else {})


def install(algorithm: Algorithm) -> None:
    """Make an algorithm of this process's learner discount by durations, wherever its episodes have
    them.
    """
    group: Any = algorithm.learner_group
    config: Any = algorithm.config
    pipeline = group._learner._learner_connector
    discount = Discount(gamma=config.gamma)
    if any(isinstance(piece, GeneralAdvantageEstimation) for piece in pipeline.connectors):
        pipeline.insert_before(GeneralAdvantageEstimation, discount)
        pipeline.append(ArrivalWeight())
    else:
        pipeline.append(discount)
        if hasattr(config, "vtrace"):
            pipeline.append(Unweighted(type(algorithm).__name__))
    buffer: Any = getattr(algorithm, "local_replay_buffer", None)
    if buffer is not None:
        buffer.sample = partial(buffer.sample, include_infos=True)


class Discount(ConnectorV2):
    """Learner connector: gamma^dt in place of gamma, at the end of the pipeline, or before the
    advantages are estimated.

    RLlib's losses multiply by gamma (1 - terminated) wherever a next value or advantage counts, so
    that a `terminated` of 1 - gamma^(dt-1) where the episode goes on makes it gamma^dt: discounting
    is a chance of ending.
    """

    def __init__(self, *, gamma: float):
        super().__init__()
        self.gamma = gamma

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        durations = _column(
            self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False), DURATION
        )
        if durations is None or self.gamma == 0:
            return batch
        columns = batch[DEFAULT_MODULE_ID]
        if "n_step" in columns and bool((columns["n_step"] != 1).any()):
            raise UsageError(
                "params.n_step above 1 cannot be discounted by this environment's durations; leave"
                " it at 1"
            )
        terminated = columns[Columns.TERMINATEDS]
        assert terminated.shape == durations.shape, (terminated.shape, durations.shape)
        kept = torch.as_tensor(
            self.gamma ** (durations - 1.0), dtype=torch.float32, device=terminated.device
        )
        columns[Columns.TERMINATEDS] = 1.0 - (1.0 - terminated.float()) * kept
        return batch


class ArrivalWeight(ConnectorV2):
    """Learner connector, after the advantages are estimated: each counts as its step's
    `arrival_weights` where samples arrived by time.

    The value function is not weighted: whatever it has learned is a baseline, and biases no policy
    gradient but by what it bootstraps.
    """

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        durations = _column(
            self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False), WEIGHT
        )
        if durations is None:
            return batch
        columns = batch[DEFAULT_MODULE_ID]
        advantages, real = (
            columns[Postprocessing.ADVANTAGES],
            columns[Columns.LOSS_MASK].cpu().numpy(),
        )
        weights = np.ones(len(durations))
        weights[real] = arrival_weights(durations[real])
        columns[Postprocessing.ADVANTAGES] = advantages * torch.as_tensor(
            weights, dtype=advantages.dtype, device=advantages.device
        )
        return batch


class Unweighted(ConnectorV2):
    """Learner connector of an algorithm whose policy gradient is made in its loss (V-trace), where
    no weight can be given: samples that arrived by time are refused. Q-learning and SAC need no
    weight: their targets hold whatever the shares of the actions.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        if (
            _column(
                self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False), WEIGHT
            )
            is not None
        ):
            raise UsageError(
                f"agent.algo={self.name} cannot weigh samples that arrive by time"
                " (metadata['arrival']='time'); use PPO, DQN or SAC"
            )
        return batch


def _column(episodes: Iterable[Any], key: str) -> NDArray[np.float64] | None:
    """What infos say of the steps of a batch, in its order; 1 at the steps that RLlib adds for a
    last value. None where they say nothing.
    """
    infos = [episode.get_infos() for episode in episodes]
    if not any(key in (info[1] or {}) for info in infos if len(info) > 1):
        return None
    return np.array(
        [(step or {}).get(key, 1.0) for episode in infos for step in episode[1:]], np.float64
    )
