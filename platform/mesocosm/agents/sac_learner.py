"""Soft actor-critic on columns: RLlib's SAC with one pair of MLPs as its critics, and many updates
a call.

RLlib 2.60's critic of continuous actions has 660,993 parameters, which take most of the time of an
update. SAC's is an MLP on (o, a) (Haarnoja et al., arXiv 1812.05905). The policy is RLlib's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import gymnasium as gym
import torch
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.algorithms.sac.torch.sac_torch_learner import SACTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns as RLlibColumns
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.models.base import ENCODER_OUT
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.agents.replay import Columns
from mesocosm.datasets.masks import MASK
from mesocosm.policies.policy import SQUASHED_LOG_STD, masked

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "swish": F.silu,
    "silu": F.silu,
}
NORM_EPS = 1e-5
"""Added to the variance of a normalization."""
LEAST_SCALE = 0.1
"""Least deviation by which an observation is divided: a number that hardly varies stays small."""
ACTOR_EVERY = 2
"""The actor and the temperature learn in every second update, as in TD3 (arXiv 1802.09477)."""


class Critics(nn.Module):
    """Two MLPs with layer normalization, computed at once.

    Normalized hidden layers bound a critic's values of actions and states that no batch contains.
    Without them the values can diverge on a small dataset (Ball et al. 2023, arXiv 2302.02948,
    section 4.2).
    """

    def __init__(self, inputs: int, hidden: list[int], outputs: int, activation: str):
        super().__init__()
        if activation.lower() not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"fcnet_activation must be one of {names}, got {activation!r}")
        self.activation = ACTIVATIONS[activation.lower()]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise([inputs, *hidden, outputs]):
            bound = 1 / math.sqrt(fan_in)
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))
        self.gains, self.shifts = nn.ParameterList(), nn.ParameterList()
        """Gains and shifts of the normalizations, one for each hidden layer."""
        for width in hidden:
            self.gains.append(torch.ones(2, 1, width))
            self.shifts.append(torch.zeros(2, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [2, N, outputs]"""
        y = x.expand(2, -1, -1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, y, weight)
            if layer < last:
                y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
                y = self.activation(torch.addcmul(self.shifts[layer], self.gains[layer], y))
        return y


class WorldSACModule(DefaultSACTorchRLModule):
    """SAC's networks: RLlib's policy, and `Critics` of (o, a), or of o for each discrete action.

    All of them read observations normalized by fixed moments, which are saved with the weights.
    """

    mean: Tensor
    scale: Tensor

    def setup(self) -> None:
        catalog: Any = self.catalog
        self.pi_encoder = catalog.build_encoder(framework="torch")
        self.pi = catalog.build_pi_head(framework="torch")
        size = cast(Any, self.observation_space).shape[0]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        if not self.inference_only:
            observation, action = cast(Any, self.observation_space), cast(Any, self.action_space)
            discrete = isinstance(action, gym.spaces.Discrete)
            inputs = observation.shape[0] + (0 if discrete else action.shape[0])
            config: Any = self.model_config
            self.critics = Critics(
                inputs,
                list(config["fcnet_hiddens"]),
                int(action.n) if discrete else 1,
                str(config["fcnet_activation"]),
            )

    def normalize_by(self, observations: Tensor) -> None:
        """Fix the normalization of observations to the moments of these [N, n]."""
        self.mean.copy_(observations.mean(0))
        self.scale.copy_(observations.std(0).clamp(min=LEAST_SCALE))

    def _normalized(self, observation: Tensor) -> Tensor:
        return (observation - self.mean) / self.scale

    def make_target_networks(self) -> None:
        self.target_critics = make_target_network(self.critics)

    def get_non_inference_attributes(self) -> list[str]:
        return ["critics", "target_critics"]

    def get_target_network_pairs(self) -> list[tuple[Any, Any]]:
        return [(self.critics, self.target_critics)]

    @property
    def discrete(self) -> bool:
        return isinstance(self.action_space, gym.spaces.Discrete)

    def logits(self, observation: Tensor) -> Tensor:
        """The policy's outputs for observations [N, n]."""
        encoded = self.pi_encoder({RLlibColumns.OBS: self._normalized(observation)})[ENCODER_OUT]
        logits, mask = cast(Tensor, self.pi(encoded)), self._mask(observation)
        return logits if mask is None else masked(logits, mask)

    def _mask(self, observation: Tensor) -> Tensor | None:
        """The action mask [N, A] of observations, or None."""
        config: Any = self.model_config
        return observation[:, slice(*config[MASK])] if MASK in config else None

    def entropy_share(self, observation: Tensor) -> Tensor | float:
        """The factor of the target entropy: the mean log number of possible actions, as a share."""
        mask = self._mask(observation)
        if mask is None:
            return 1.0
        possible = (mask > 0.5).sum(-1).clamp(min=1)
        return possible.log().mean() / math.log(max(mask.shape[-1], 2))

    def act(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(actions in [-1, 1] [N, a], their log-probabilities [N]), reparametrized; for continuous
        actions.
        """
        loc, log_std = self.logits(observation).chunk(2, -1)
        log_std = log_std.clamp(*SQUASHED_LOG_STD)
        noise = torch.randn_like(loc)
        x = loc + log_std.exp() * noise
        normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(x)^2), stable (Haarnoja et al. 2018, arXiv 1801.01290, appendix C)
        jacobian = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))
        return torch.tanh(x), (normal - jacobian).sum(-1)

    def values(self, observation: Tensor, action: Tensor | None, *, target: bool) -> Tensor:
        """[2, N]: the critics' values of the actions; [2, N, A] of all discrete actions without
        them.
        """
        critics = self.target_critics if target else self.critics
        observation = self._normalized(observation)
        if not self.discrete:
            assert action is not None
            return cast(Tensor, critics(torch.cat((observation, action), -1))).squeeze(-1)
        values = cast(Tensor, critics(observation))
        if action is None:
            return values
        return values.gather(-1, action.expand(2, -1).unsqueeze(-1)).squeeze(-1)


class WorldSACLearner(SACTorchLearner):
    """SAC's losses on columns, with `update_many`."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module: Any = self.module[module_id]
        parts = {
            "critics": (list(module.critics.parameters()), config.critic_lr),
            "policy": ([*module.pi_encoder.parameters(), *module.pi.parameters()], config.actor_lr),
            "alpha": ([self.curr_log_alpha[module_id]], config.alpha_lr),
        }
        for name, (parameters, rate) in parts.items():
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=torch.optim.Adam(parameters, eps=1e-7, fused=True),
                params=parameters,
                lr_or_lr_schedule=rate,
            )

    def build(self) -> None:
        super().build()
        self.updates = 0
        """Updates so far, which decide whose turn it is."""
        self._sac: Any = self.module[DEFAULT_MODULE_ID]
        self._settings: Any = self.config.get_config_for_module(DEFAULT_MODULE_ID)
        self._log_alpha: Any = self.curr_log_alpha[DEFAULT_MODULE_ID]
        self._target_entropy: Any = self.target_entropy[DEFAULT_MODULE_ID]

    def normalize_by(self, observations: Tensor) -> None:
        """Fix the module's normalization; see `WorldSACModule.normalize_by`."""
        self._sac.normalize_by(observations)

    def update_many(self, sample: Callable[[int], Columns], updates: int) -> dict[str, float]:
        """Run `updates` updates, each on a new batch.

        Args:
            sample: A batch of that many transitions.

        Returns:
            Means over the last tenth of the updates by RLlib's names: qf_loss, qf_mean,
            policy_loss, alpha_value.
        """
        optimizers: dict[str, Any] = dict(self.get_optimizers_for_module(DEFAULT_MODULE_ID))
        groups = {name: o.param_groups[0]["params"] for name, o in optimizers.items()}
        target = list(self._sac.target_critics.parameters())
        seen: dict[str, list[Tensor]] = {}
        for i in range(updates):
            batch = sample(self._settings.train_batch_size_per_learner)
            loss, metrics = self._critic_loss(batch)
            _descend(loss, {"critics": groups["critics"]}, optimizers)
            if self.updates % ACTOR_EVERY == 0:
                loss, more = self._actor_loss(batch.observation)
                parts = {name: groups[name] for name in ("policy", "alpha")}
                _descend(loss, parts, optimizers)
                metrics |= more
            with torch.no_grad():  # or every update would extend the targets' autograd graph
                torch._foreach_lerp_(target, groups["critics"], self._settings.tau)
            self.updates += 1
            if 10 * (i + ACTOR_EVERY) >= 9 * updates:
                for name, value in metrics.items():
                    seen.setdefault(name, []).append(value)
        return {name: float(torch.stack(values).mean()) for name, values in seen.items()}

    def _critic_loss(self, batch: Columns) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            target = batch.reward + batch.discount * self._soft_value(batch.following)
        values = self._sac.values(batch.observation, batch.action, target=False)
        loss = 2.0 * F.huber_loss(values, target.expand_as(values))
        return loss, {"qf_loss": loss.detach(), "qf_mean": values.detach().mean()}

    def _soft_value(self, observation: Tensor) -> Tensor:
        """[N]: the target critics' value of the policy, with its entropy."""
        alpha = self._log_alpha.exp()
        if self._sac.discrete:
            log_p = F.log_softmax(self._sac.logits(observation), -1)
            value = self._sac.values(observation, None, target=True).amin(0)
            return cast(Tensor, (log_p.exp() * (value - alpha * log_p)).sum(-1))
        action, log_p = self._sac.act(observation)
        value = self._sac.values(observation, action, target=True).amin(0)
        return cast(Tensor, value - alpha * log_p)

    def _actor_loss(self, observation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the actor and the temperature together."""
        alpha = self._log_alpha.detach().exp()
        if self._sac.discrete:
            log_p = F.log_softmax(self._sac.logits(observation), -1)
            value = self._sac.values(observation, None, target=False).amin(0)
            p = log_p.exp()
            log_prob, loss = (p * log_p).sum(-1), (p * (alpha * log_p - value)).sum(-1).mean()
        else:
            action, log_prob = self._sac.act(observation)
            value = self._sac.values(observation, action, target=False).amin(0)
            loss = (alpha * log_prob - value).mean()
        target = self._target_entropy * self._sac.entropy_share(observation)
        of_alpha = -(self._log_alpha * (log_prob.detach().mean() + target)).sum()
        return loss + of_alpha, {"policy_loss": loss.detach(), "alpha_value": alpha.mean()}


def _descend(loss: Tensor, groups: dict[str, list[Tensor]], optimizers: dict[str, Any]) -> None:
    """One optimizer step for the named groups of parameters; no gradient reaches any other.

    Args:
        loss: A scalar.
        groups: Parameters by the name of their optimizer.
        optimizers: Optimizers by name.
    """
    parameters = [p for group in groups.values() for p in group]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    for name in groups:
        optimizers[name].step()


def unnormalized(first: nn.Linear, module: WorldSACModule) -> dict[str, Tensor]:
    """The weights of a policy's first layer for observations that are not normalized."""
    weight = first.weight.detach() / module.scale
    return {"weight": weight, "bias": first.bias.detach() - weight @ module.mean}
