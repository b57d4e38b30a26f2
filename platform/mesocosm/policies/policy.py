"""A trained policy as data: policy.json and policy.safetensors. Imports torch, no Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mesocosm.datasets import masks
from mesocosm.datasets.masks import MASK, has_mask, mask_of
from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.errors import ArtifactError
from mesocosm.policies.attention import TableNetwork
from mesocosm.policies.heads import (
    ActionMap,
    batch_size,
    flat_size,
    flatten_batch,
    map_batch,
    mask_columns,
    stack,
)

POLICY_JSON, WEIGHTS = "policy.json", "policy.safetensors"
TRAINING_STATE = "training.safetensors"
"""All weights of the learner's module, critics and target networks included."""
SNAPSHOTS = "snapshots"
"""Folder of an `agents` artifact with one policy folder per saved iteration."""
SCHEMA = 1
Head = Literal["categorical", "gaussian", "squashed_gaussian", "values"]
"""Network outputs: logits; mean and log std; the same before a tanh; action values."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
MASKED = -1e9
"""The logit, or the value, of an action that is not possible"""
SQUASHED_LOG_STD = (-5.0, 2.0)
"""RLlib's bounds of a squashed Gaussian's log std (ray.rllib.utils.numpy)."""
Rng = np.random.Generator


class Acts(Protocol):
    """An exported policy, a random one or a script."""

    def act(self, observations: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map observations of B environments to B actions, both in vector layout."""


@runtime_checkable
class RemembersEpisodes(Protocol):
    """A policy that reads more than the current observations, such as a planner."""

    def reset(self, num_envs: int = 1, seed: int = 0) -> None:
        """Begin new episodes in `num_envs` environments; `seed` is of the policy's own draws."""


def begin_episodes(policy: Acts, num_envs: int, seed: int) -> None:
    """Reset a policy that remembers. Other policies are not changed.

    Args:
        policy: It acts in `num_envs` environments from here on.
        num_envs: The environments, all of which begin new episodes.
        seed: In [0, 2^62).
    """
    if isinstance(policy, RemembersEpisodes):
        policy.reset(num_envs, seed)


@dataclass(frozen=True)
class Layout:
    """The network's layers, such as `{"kind": "linear", "in": 4, "out": 64}`, `{"kind": "norm",
    "size": 64, "eps": 1e-3}` or `{"kind": "tanh"}`.
    """

    head: Head
    trunk: list[dict[str, Any]]
    """Layers from the flat observation to the outputs; with `value`, the shared encoder."""
    advantage: list[dict[str, Any]] = field(default_factory=list)
    """The advantage stream of a dueling network, whose value stream is `value` (Wang et al., arXiv
    1511.06581).
    """
    value: list[dict[str, Any]] = field(default_factory=list)
    free_log_std: int = 0
    """Size of a log std that is a parameter rather than an output; 0 for none."""
    log_std_clip: float | None = None
    """A Gaussian's log std is clipped to plus and minus this."""
    atoms: int = 1
    """Atoms of a value distribution (C51) over [v_min, v_max]; 1 for expected values."""
    v_min: float = 0.0
    v_max: float = 0.0
    table_width: int = 0
    """Width of an `attention.TableNetwork`, which replaces the layers; 0 for none."""


class Network(nn.Module):
    """Flat observations [B, n] float32 to outputs [B, m], in the form of the layout's head."""

    def __init__(self, layout: Layout, observation: gym.Space[Any], action: gym.Space[Any]):
        super().__init__()
        self.layout, self.mask = layout, mask_columns(observation)
        counts = ActionMap(action, has_mask(observation)).counts
        self.actions = counts[0] if counts else 0
        width = layout.table_width
        self.table = TableNetwork(observation, action, width) if width else None
        self.trunk = sequential(layout.trunk)
        self.advantage = sequential(layout.advantage)
        self.value = sequential(layout.value)
        size = layout.free_log_std
        self.log_std = nn.Parameter(torch.zeros(size)) if size else None

    def forward(self, observations: Tensor) -> Tensor:
        if self.table is not None:
            return self._masked(self.table(observations)[0], observations)
        out = self.trunk(observations)
        value = self.value(out) if self.layout.value else None
        out = self.advantage(out)
        if self.layout.head == "values":
            out = self._values(out, value)
        if self.mask is not None:  # its actions are discrete
            return self._masked(out, observations)
        if self.log_std is not None:
            out = torch.cat([out, self.log_std.expand(len(out), -1)], dim=-1)
        clip = self.layout.log_std_clip
        if self.layout.head == "gaussian" and clip is not None:
            mean, log_std = out.chunk(2, dim=-1)
            out = torch.cat([mean, log_std.clamp(-clip, clip)], dim=-1)
        return out

    def _masked(self, out: Tensor, observations: Tensor) -> Tensor:
        return out if self.mask is None else masked(out, observations[:, slice(*self.mask)])

    def _values(self, out: Tensor, value: Tensor | None) -> Tensor:
        if self.layout.atoms == 1:
            return out if value is None else out - out.mean(-1, keepdim=True) + value
        logits = out.reshape(len(out), self.actions, self.layout.atoms)
        if value is not None:  # RLlib centres over the atoms, and shifts all atoms by one value
            logits = logits - logits.mean(-1, keepdim=True) + value.reshape(-1, 1, 1)
        support = torch.linspace(self.layout.v_min, self.layout.v_max, self.layout.atoms)
        return (logits.softmax(-1) * support).sum(-1)


def masked(outputs: Tensor, mask: Tensor) -> Tensor:
    """Logits or values [..., n] with MASKED where the mask [..., n] is 0; as they are where it is 0
    everywhere.
    """
    possible = mask > 0.5
    possible = possible | ~possible.any(-1, keepdim=True)
    return torch.where(possible, outputs, MASKED)


def save_weights(network: nn.Module, file: Path) -> None:
    """Write the weights of a network as safetensors."""
    state = network.state_dict()
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, file)


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of policy.json, and the weights next to it. Raises ArtifactError if one is
    missing or has another schema.
    """
    try:
        data = json.loads((folder / POLICY_JSON).read_text())
        weights = load_file(folder / WEIGHTS)
    except OSError as error:
        raise ArtifactError(
            f"{folder} holds no policy ({error}); train one with mesocosm train-agent"
        ) from error
    if data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{folder / POLICY_JSON}: schema must be {SCHEMA}, got {data.get('schema')!r}; train"
            " the agent again"
        )
    return data, weights


def sequential(layers: list[dict[str, Any]]) -> nn.Sequential:
    """The network of these layers (`Layout`), with new weights."""
    modules: list[nn.Module] = []
    for layer in layers:
        if layer["kind"] == "linear":
            modules.append(nn.Linear(layer["in"], layer["out"], bias=layer.get("bias", True)))
        elif layer["kind"] == "norm":
            modules.append(nn.LayerNorm(layer["size"], eps=layer["eps"]))
        else:
            modules.append(_ACTIVATIONS[layer["kind"]]())
    return nn.Sequential(*modules)


def describe(module: nn.Sequential) -> list[dict[str, Any]]:
    """The layers of a plain MLP as data. Raises ValueError for a layer that has no description."""
    names = {kind: name for name, kind in _ACTIVATIONS.items()}
    layers: list[dict[str, Any]] = []
    for item in module:
        if isinstance(item, nn.Linear):
            sizes = {"in": item.in_features, "out": item.out_features}
            layers.append({"kind": "linear", **sizes, "bias": item.bias is not None})
        elif isinstance(item, nn.LayerNorm):
            layers.append({"kind": "norm", "size": item.normalized_shape[0], "eps": item.eps})
        elif type(item) in names:
            layers.append({"kind": names[type(item)]})
        else:
            known = ", ".join(["Linear", "LayerNorm", *sorted(_ACTIVATIONS)])
            raise ValueError(f"layer {type(item).__name__} cannot be exported; use {known}")
    return layers


class Policy:
    """A network between an observation and an action space."""

    def __init__(
        self,
        algo: str,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        layout: Layout,
        epsilon: float = 0.0,
    ):
        self.algo, self.observation_space, self.action_space = algo, observation_space, action_space
        self.layout, self.epsilon = layout, epsilon
        self.map = ActionMap(action_space, has_mask(observation_space))
        # The initial weights are replaced. Without the fork an export would change the random
        # state of the training that it interrupts.
        with torch.random.fork_rng([]):
            self.network = Network(layout, observation_space, action_space)

    @torch.no_grad()
    def outputs(self, observations: Any) -> Tensor:
        """The network's outputs for observations in vector layout."""
        return self.network(torch.from_numpy(flatten_batch(self.observation_space, observations)))

    def act(self, observations: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map observations of B environments to B actions, both in vector layout.

        Args:
            observations: The observations.
            explore: Draw from the policy by `rng` (epsilon-greedy for values). Otherwise take the
                likeliest action, a Gaussian's mean (under its tanh) or the highest value.
            rng: The generator of the draws.
        """
        out = self.outputs(observations).double().numpy()
        assert rng is not None or not explore, "explore needs rng"
        draw = rng if explore else None
        head: NDArray[Any]
        if self.layout.head == "values":
            head = out.argmax(-1)
            if draw is not None:
                assert self.network.mask is None, "DQN does not train with masks"
                randomly = draw.random(len(head)) < self.epsilon
                head = np.where(randomly, draw.integers(out.shape[-1], size=len(head)), head)
        elif self.layout.head == "categorical":
            if draw is not None:  # Gumbel trick: the argmax of logits plus noise is a softmax draw
                out = out + draw.gumbel(size=out.shape)
            assert self.map.counts is not None
            parts = np.split(out, np.cumsum(self.map.counts)[:-1], axis=-1)
            head = np.stack([part.argmax(-1) for part in parts], axis=-1)
        else:
            head, log_std = np.split(out, 2, axis=-1)
            squashed = self.layout.head == "squashed_gaussian"
            if draw is not None:
                log_std = np.clip(log_std, *SQUASHED_LOG_STD) if squashed else log_std
                head = head + np.exp(log_std) * draw.standard_normal(head.shape)
            head = np.tanh(head) if squashed else head
        return self.map.to_raw(head)

    def act_one(self, observation: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map one observation to one action."""
        batch = stack(self.observation_space, [observation])
        return map_batch(lambda leaf: leaf[0], self.act(batch, explore, rng))

    def save(self, folder: Path) -> None:
        """Write policy.json and policy.safetensors into an existing folder."""
        network = asdict(self.layout)
        if not self.layout.table_width:  # as policies without a table were written before
            del network["table_width"]
        description = {
            "schema": SCHEMA,
            "algo": self.algo,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "network": network,
            "epsilon": self.epsilon,
        }
        (folder / POLICY_JSON).write_text(json.dumps(description, indent=1))
        save_weights(self.network, folder / WEIGHTS)

    @staticmethod
    def load(folder: Path) -> Policy:
        """Read a policy. Raises ArtifactError where it is missing or has another schema."""
        data, weights = read_files(folder)
        return Policy.of(data, weights, space_from_json(data["observation_space"]))

    @staticmethod
    def of(data: Mapping[str, Any], weights: dict[str, Tensor], observed: gym.Space[Any]) -> Policy:
        """The policy of policy.json and its weights, whose network observes a space."""
        layout, action = Layout(**data["network"]), space_from_json(data["action_space"])
        policy = Policy(data["algo"], observed, action, layout, data["epsilon"])
        policy.network.load_state_dict(weights)
        return policy

    def export_torch(self, path: Path) -> None:
        """Write the network (flat observation to outputs) as a `torch.export` program (`.pt2`)."""
        example = torch.zeros(2, flat_size(self.observation_space))
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(self.network.eval(), (example,), dynamic_shapes=shapes)
        torch.export.save(program, path)


class RandomPolicy:
    """Uniform draws from the action space by `rng`, whatever `explore` is, among the possible
    actions where observations have a mask.
    """

    def __init__(self, action_space: gym.Space[Any]):
        self.action_space = action_space

    def act(self, observations: Any, explore: bool = True, rng: Rng | None = None) -> Any:
        """Return one action per observation, in vector layout."""
        rows: list[Any] = [None] * batch_size(observations)
        if (possible := mask_of(observations)) is not None:
            rows = [{MASK: mask} for mask in possible]
        return stack(self.action_space, [self.act_one(row, explore, rng) for row in rows])

    def act_one(self, observation: Any, explore: bool = True, rng: Rng | None = None) -> Any:
        """Return one action."""
        assert rng is not None, "a random policy needs rng"
        mask = mask_of(observation)
        if mask is not None:
            return masks.draw(self.action_space, mask, rng)
        self.action_space.seed(int(rng.integers(2**31)))
        return self.action_space.sample()
