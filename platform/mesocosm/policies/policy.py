"""A trained policy as data: policy.json (what it is) and policy.safetensors (its weights). Imports
torch, no Ray.

A policy takes and gives raw values of the environment's own spaces, batched in Gymnasium's vector
layout.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mesocosm.data.format.spaces import space_from_json, space_to_json
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.policies.heads import ActionMap, first, flat_size, flatten_batch, one_batch
from mesocosm.store.artifacts import Storage

POLICY_JSON, WEIGHTS = "policy.json", "policy.safetensors"
SNAPSHOTS = "snapshots"
"""Of an `agents` artifact: a folder with a policy for each iteration kept, named by its number."""
SCHEMA = 1
Head = Literal["categorical", "gaussian", "squashed_gaussian", "values"]
"""What the network's outputs mean: logits; mean and log std; the same before a tanh; action values.
"""

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}
SQUASHED_LOG_STD = (-5.0, 2.0)
"""RLlib's bounds of a squashed Gaussian's log std (ray.rllib.utils.numpy)."""


class Acts(Protocol):
    """Whatever acts: an exported policy, a random one, a script."""

    def act(
        self, observations: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        """Raw observations of B environments in vector layout -> B raw actions in vector layout."""
        ...


@dataclass(frozen=True)
class Layout:
    """The network: layers as `{"kind": "linear", "in": 4, "out": 64}`, `{"kind": "norm", "size":
    64, "eps": 1e-3}`, `{"kind": "tanh"}`.
    """

    head: Head
    trunk: list[dict[str, Any]]
    """All layers from the flat observation to the outputs; with `value`, those of the common
    encoder.
    """
    advantage: list[dict[str, Any]] = field(default_factory=list)
    """With `value`: the dueling network's advantage stream (Wang et al., arXiv 1511.06581)."""
    value: list[dict[str, Any]] = field(default_factory=list)
    free_log_std: int = 0
    """Size of a log std that is a parameter and not a network output; 0: there is none."""
    log_std_clip: float | None = None
    """A Gaussian's log std is clipped to plus and minus this."""
    atoms: int = 1
    """Atoms of a value distribution (C51) over [v_min, v_max]; 1: expected values."""
    v_min: float = 0.0
    v_max: float = 0.0


class Network(nn.Module):
    """Flat observations [B, n] float32 -> outputs [B, m], as the layout's head reads them."""

    def __init__(self, layout: Layout, actions: int):
        super().__init__()
        self.layout, self.actions = layout, actions
        self.trunk = _sequential(layout.trunk)
        self.advantage = _sequential(layout.advantage)
        self.value = _sequential(layout.value)
        self.log_std = (
            nn.Parameter(torch.zeros(layout.free_log_std)) if layout.free_log_std else None
        )

    def forward(self, observations: Tensor) -> Tensor:
        out = self.trunk(observations)
        value = self.value(out) if self.layout.value else None
        out = self.advantage(out)
        if self.layout.head == "values":
            return self._values(out, value)
        if self.log_std is not None:
            out = torch.cat([out, self.log_std.expand(len(out), -1)], dim=-1)
        if self.layout.head == "gaussian" and self.layout.log_std_clip is not None:
            mean, log_std = out.chunk(2, dim=-1)
            out = torch.cat(
                [mean, log_std.clamp(-self.layout.log_std_clip, self.layout.log_std_clip)], dim=-1
            )
        return out

    def _values(self, out: Tensor, value: Tensor | None) -> Tensor:
        if self.layout.atoms == 1:
            return out if value is None else out - out.mean(-1, keepdim=True) + value
        logits = out.reshape(len(out), self.actions, self.layout.atoms)
        if value is not None:  # RLlib centres over the atoms, and shifts all atoms by one value
            logits = logits - logits.mean(-1, keepdim=True) + value.reshape(-1, 1, 1)
        support = torch.linspace(self.layout.v_min, self.layout.v_max, self.layout.atoms)
        return (logits.softmax(-1) * support).sum(-1)


def _sequential(layers: list[dict[str, Any]]) -> nn.Sequential:
    def layer(entry: dict[str, Any]) -> nn.Module:
        match entry["kind"]:
            case "linear":
                return nn.Linear(entry["in"], entry["out"], bias=entry.get("bias", True))
            case "norm":
                return nn.LayerNorm(entry["size"], eps=entry["eps"])
            case kind:
                return _ACTIVATIONS[kind]()

    return nn.Sequential(*[layer(entry) for entry in layers])


def describe(module: nn.Sequential) -> list[dict[str, Any]]:
    """The layers of a plain MLP as data. Raises ValueError naming a layer that has no description."""
    names = {kind: name for name, kind in _ACTIVATIONS.items()}
    layers: list[dict[str, Any]] = []
    for item in module:
        if isinstance(item, nn.Linear):
            layers.append(
                {
                    "kind": "linear",
                    "in": item.in_features,
                    "out": item.out_features,
                    "bias": item.bias is not None,
                }
            )
        elif isinstance(item, nn.LayerNorm):
            layers.append({"kind": "norm", "size": item.normalized_shape[0], "eps": item.eps})
        elif type(item) in names:
            layers.append({"kind": names[type(item)]})
        else:
            raise ValueError(
                f"layer {type(item).__name__} of a policy cannot be exported; known are Linear,"
                f" LayerNorm, {', '.join(sorted(_ACTIVATIONS))}"
            )
    return layers


class Policy:
    """A network and the two spaces it stands between."""

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
        self.map = ActionMap(action_space)
        with torch.random.fork_rng(
            []
        ):  # its initial weights are replaced: a training that exports on the way draws as one that does not
            self.network = Network(layout, self.map.counts[0] if self.map.counts else 0)

    @torch.no_grad()
    def outputs(self, observations: Any) -> Tensor:
        """The network's outputs for raw observations in vector layout."""
        return self.network(torch.from_numpy(flatten_batch(self.observation_space, observations)))

    def act(
        self, observations: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        """Raw observations of B environments -> B raw actions, both in vector layout.

        Without `explore`: the likeliest action, a Gaussian's mean (under its tanh, where squashed),
        the action of the highest value. With it: a draw from the policy by `rng` (epsilon-greedy,
        for values). Box actions are rescaled and clipped to their bounds.
        """
        out = self.outputs(observations).double().numpy()
        assert rng is not None or not explore, "explore needs rng"
        draw = rng if explore else None
        head: NDArray[Any]
        match self.layout.head:
            case "categorical":
                head = self._categorical(out, draw)
            case "values":
                head = out.argmax(-1)
                if draw is not None:
                    head = np.where(
                        draw.random(len(head)) < self.epsilon,
                        draw.integers(out.shape[-1], size=len(head)),
                        head,
                    )
            case "gaussian" | "squashed_gaussian":
                head = self._gaussian(out, draw)
        return self.map.to_raw(head)

    def act_one(
        self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        """One raw observation -> one raw action."""
        return first(self.action_space, self.act(one_batch(observation), explore, rng))

    def _categorical(
        self, logits: NDArray[np.float64], rng: np.random.Generator | None
    ) -> NDArray[np.int64]:
        if (
            rng is not None
        ):  # the Gumbel trick: argmax of logits plus Gumbel noise is a draw from their softmax
            logits = logits + rng.gumbel(size=logits.shape)
        counts = self.map.counts
        assert counts is not None
        parts = np.split(logits, np.cumsum(counts)[:-1], axis=-1)
        return np.stack([part.argmax(-1) for part in parts], axis=-1)

    def _gaussian(
        self, out: NDArray[np.float64], rng: np.random.Generator | None
    ) -> NDArray[np.float64]:
        mean, log_std = np.split(out, 2, axis=-1)
        squashed = self.layout.head == "squashed_gaussian"
        if rng is not None:
            mean = mean + np.exp(
                np.clip(log_std, *SQUASHED_LOG_STD) if squashed else log_std
            ) * rng.standard_normal(mean.shape)
        return np.tanh(mean) if squashed else mean

    def save(self, folder: Path) -> None:
        """Write policy.json and policy.safetensors into an existing folder."""
        description = {
            "schema": SCHEMA,
            "algo": self.algo,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "network": asdict(self.layout),
            "epsilon": self.epsilon,
        }
        (folder / POLICY_JSON).write_text(json.dumps(description, indent=1))
        save_file(
            {
                name: tensor.detach().contiguous()
                for name, tensor in self.network.state_dict().items()
            },
            folder / WEIGHTS,
        )

    @staticmethod
    def load(folder: Path) -> Policy:
        """Read what `save` wrote. Raises ArtifactError if it is not there or of another schema."""
        try:
            data = json.loads((folder / POLICY_JSON).read_text())
            weights = load_file(folder / WEIGHTS)
        except OSError as error:
            raise ArtifactError(
                f"{folder} holds no policy ({error}); train one with mesocosm train-agent"
            ) from error
        if data.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{folder / POLICY_JSON} has schema {data.get('schema')!r}, this version reads"
                f" {SCHEMA}; train the agent again"
            )
        spaces = (space_from_json(data["observation_space"]), space_from_json(data["action_space"]))
        policy = Policy(data["algo"], *spaces, Layout(**data["network"]), data["epsilon"])
        policy.network.load_state_dict(weights)
        return policy

    def export_torch(self, path: Path) -> None:
        """Write the network alone (flat observation -> outputs) as a torch.export program, a `.pt2`
        file, for use outside this project.
        """
        example = torch.zeros(2, flat_size(self.observation_space))
        program = torch.export.export(
            self.network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, path)


def policy_of(storage: Storage, ref: str) -> Policy:
    """The policy of `agents/<id>`, or `agents/<id>@<iteration>`: as it was when so many iterations
    of its training were done.

    Raises UsageError where there is no such agent, or no snapshot of it at that iteration.
    """
    name, _, iteration = ref.partition("@")
    agent = storage.artifact("agents", name)
    if not iteration:
        return Policy.load(agent.path)
    kept = sorted((path.name for path in (agent.path / SNAPSHOTS).glob("*")), key=int)
    if iteration not in kept:
        raise UsageError(
            f"{agent.name} has no snapshot at iteration {iteration!r}; it has"
            f" {', '.join(kept) or 'none'}"
        )
    return Policy.load(agent.path / SNAPSHOTS / iteration)


class RandomPolicy:
    """Draws from the action space, by `rng`."""

    def __init__(self, action_space: gym.Space[Any]):
        self.action_space = action_space

    def act(
        self, observations: Any, explore: bool = True, rng: np.random.Generator | None = None
    ) -> Any:
        """B raw actions in vector layout, for B observations; random whatever `explore` says."""
        count = batch_size(observations)
        draws = [self.act_one(None, explore, rng) for _ in range(count)]
        return concatenate(self.action_space, draws, create_empty_array(self.action_space, count))

    def act_one(
        self, observation: Any, explore: bool = True, rng: np.random.Generator | None = None
    ) -> Any:
        """One raw action."""
        assert rng is not None, "a random policy needs rng"
        self.action_space.seed(int(rng.integers(2**31)))
        return self.action_space.sample()


def random_policy(action_space: gym.Space[Any]) -> RandomPolicy:
    return RandomPolicy(action_space)


def batch_size(observations: Any) -> int:
    """B of values in Gymnasium's vector layout."""
    if isinstance(observations, dict):
        return batch_size(next(iter(observations.values())))
    if isinstance(observations, tuple) and not isinstance(observations[0], str):
        return batch_size(observations[0])
    return len(observations)
