"""A trained policy's value function as data: value.json and value.safetensors, without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mesocosm.errors import ArtifactError
from mesocosm.policies.policy import Policy, describe, save_weights, sequential

VALUE_JSON, VALUE_WEIGHTS = "value.json", "value.safetensors"
SCHEMA = 1
ValueKind = Literal["state", "state_action", "actions", "policy", "table"]
"""The inputs and outputs of the networks: V(o); Q(o, a) of a head action in [-1, 1]; Q(o, .) of all
discrete actions; or none, if the policy's own outputs are action values or its network over a table
also gives V(o).
"""


class ValueFunction:
    """The value of an observation under a policy: of its greedy action where the networks value
    actions, and the smallest of several networks' values.

    SAC's values hold the entropy that its policy earns. Discrete SAC's are means over the policy's
    probabilities, and DQN's the highest action value.
    """

    def __init__(self, kind: ValueKind, networks: list[nn.Sequential], gamma: float):
        self.kind, self.gamma = kind, gamma
        self.networks = nn.ModuleList(networks).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, policy: Policy, observations: Tensor) -> Tensor:
        """Value observations.

        Args:
            policy: The policy that the value function belongs to.
            observations: Flat observations [N, n] float32 (`heads.flatten_batch`).

        Returns:
            Discounted returns [N] in raw units of reward.
        """
        if self.kind == "policy":
            return cast(Tensor, policy.network(observations).amax(-1))
        if self.kind == "table":
            return cast(Tensor, policy.network.table(observations)[1])  # type: ignore[misc]
        inputs = observations
        if self.kind == "state_action":
            mean = policy.network(observations).chunk(2, -1)[0]
            inputs = torch.cat((observations, torch.tanh(mean)), -1)
        values = torch.stack([network(inputs) for network in self.networks]).amin(0)
        if self.kind == "actions":
            return (policy.network(observations).softmax(-1) * values).sum(-1)
        return values.squeeze(-1)

    def save(self, folder: Path) -> None:
        """Write value.json and value.safetensors into an existing folder."""
        layers = [describe(cast(nn.Sequential, network)) for network in self.networks]
        about = {"schema": SCHEMA, "kind": self.kind, "gamma": self.gamma, "networks": layers}
        (folder / VALUE_JSON).write_text(json.dumps(about, indent=1))
        save_weights(self.networks, folder / VALUE_WEIGHTS)

    @staticmethod
    def load(folder: Path) -> ValueFunction:
        """Read a value function. Raises ArtifactError where it is missing or of another schema."""
        try:
            about: dict[str, Any] = json.loads((folder / VALUE_JSON).read_text())
            weights = load_file(folder / VALUE_WEIGHTS)
        except OSError as error:
            raise ArtifactError(
                f"{folder} holds no value function ({VALUE_JSON}), which a planner needs at the end"
                " of its plans; train the agent again, with --force"
            ) from error
        if about.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{folder / VALUE_JSON}: schema must be {SCHEMA}, got {about.get('schema')!r};"
                " train the agent again"
            )
        with torch.random.fork_rng([]):
            networks = [sequential(layers) for layers in about["networks"]]
        value = ValueFunction(about["kind"], networks, about["gamma"])
        value.networks.load_state_dict(weights)
        return value
