"""The files of a trained agent: its policy, its value function and its training state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from torch import Tensor, nn

from mesocosm.agents.candidate_module import CandidateModule
from mesocosm.agents.learner_access import module_of
from mesocosm.agents.mbpo import WorldSAC
from mesocosm.agents.rllib import export, save_training
from mesocosm.agents.sac_learner import NORM_EPS
from mesocosm.agents.table_module import TableModule
from mesocosm.policies.images import ImageEncoder
from mesocosm.policies.policy import describe, sequential
from mesocosm.policies.value import ValueFunction

ACTIVATIONS = {"swish": "silu"}
"""Names of activations that differ between RLlib and `policies.policy`"""


def save_agent(
    algorithm: Algorithm,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    folder: Path,
    encoder: ImageEncoder | None = None,
) -> None:
    """Write an algorithm's policy, value function and training state into `folder`.

    Args:
        algorithm: An algorithm that trains in a world.
        spaces: The (observation, action) spaces of its network.
        folder: Made where it does not exist.
        encoder: How it sees images; `spaces` are then those that it makes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = module_of(algorithm)
    export(algorithm, module, spaces, encoder).save(folder)
    if not isinstance(module, CandidateModule):  # no planner takes texts
        export_value(algorithm, module).save(folder)
    save_training(module, folder)


def export_value(algorithm: Algorithm, module: Any) -> ValueFunction:
    """The value function of a trained algorithm: the critics of SAC in a world, the value network
    of PPO, APPO and IMPALA, and DQN's own action values. `module` is its `module_of`.
    """
    gamma = float(algorithm.config.gamma)  # type: ignore[union-attr]
    if isinstance(algorithm, WorldSAC):
        kind = "actions" if module.discrete else "state_action"
        return ValueFunction(kind, [critic(module, i) for i in range(2)], gamma)  # type: ignore[arg-type]
    if isinstance(module, TableModule):
        return ValueFunction("table", [], gamma)
    if type(algorithm).__name__ == "DQN":
        return ValueFunction("policy", [], gamma)
    encoder = getattr(module.encoder, "critic_encoder", None) or module.encoder.encoder
    layers = nn.Sequential(*encoder.net.mlp, *module.vf.net.mlp)
    with torch.random.fork_rng([]):  # the initial weights are replaced
        network = sequential(describe(layers))
    network.load_state_dict(layers.state_dict())
    return ValueFunction("state", [network], gamma)


def critic(module: Any, index: int) -> nn.Sequential:
    """One of the two critics of a `WorldSACModule`, for observations that are not normalized."""
    weights = [weight.detach()[index].T for weight in module.critics.weights]
    biases = [bias.detach()[index, 0] for bias in module.critics.biases]
    observed = len(module.mean)
    first: Tensor = weights[0].clone()
    first[:, :observed] /= module.scale
    biases[0] = biases[0] - first[:, :observed] @ module.mean
    weights[0] = first
    name = str(module.model_config["fcnet_activation"]).lower()
    layers: list[dict[str, Any]] = []
    for weight in weights:
        layers.append({"kind": "linear", "in": weight.shape[1], "out": weight.shape[0]})
        layers.append({"kind": "norm", "size": weight.shape[0], "eps": NORM_EPS})
        layers.append({"kind": ACTIVATIONS.get(name, name)})
    with torch.random.fork_rng([]):
        network = sequential(layers[:-2])
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    norms = [layer for layer in network if isinstance(layer, nn.LayerNorm)]
    gains, shifts = module.critics.gains, module.critics.shifts
    with torch.no_grad():
        for linear, weight, bias in zip(linears, weights, biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        for norm, gain, shift in zip(norms, gains, shifts, strict=True):
            norm.weight.copy_(gain[index, 0])
            norm.bias.copy_(shift[index, 0])
    return network
