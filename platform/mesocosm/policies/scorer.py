"""A network that scores candidate commands, and its exported policy. Torch, no Ray."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.errors import UsageError
from mesocosm.policies.candidates import (
    COMMANDS,
    FEATURES,
    CandidateEpisodes,
    CandidateShape,
    CandidateSource,
    load_source,
)
from mesocosm.policies.policy import MASKED, POLICY_JSON, SCHEMA, WEIGHTS, read_files, save_weights

EMBEDDING, HIDDEN = 48, 96
"""Widths of the network: about a million parameters, most of them in the embeddings."""
INITIAL_STD = 0.3
"""Initial standard deviation of the embeddings, whose means are the inputs."""
SCORER = "scorer"
"""The scorer's name in RLlib's module, and so in its training state."""
Rng = np.random.Generator


class CandidateScorer(nn.Module):
    """Scores candidates by means of word embeddings of them and of the texts, as a DRRN does
    (He et al. 2016, arXiv 1511.04636).
    """

    def __init__(self, shape: CandidateShape):
        super().__init__()
        self.shape = shape
        names = [*shape.parts, "candidate"]
        self.embedding = nn.ModuleDict(
            {
                name: nn.EmbeddingBag(shape.buckets + 1, EMBEDDING, mode="mean", padding_idx=0)
                for name in names
            }
        )
        with torch.no_grad():
            for table in self.embedding.values():
                weight: Any = table.weight
                weight.normal_(std=INITIAL_STD)
                weight[0] = 0.0
        texts = EMBEDDING * len(shape.parts)
        self.state = nn.Sequential(nn.Linear(texts, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.command = nn.Linear(EMBEDDING, HIDDEN)
        self.score = nn.Sequential(
            nn.Linear(3 * HIDDEN + FEATURES, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1)
        )
        self.value = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 1))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and values [B] of rows [B, shape.width] (`CandidateEpisodes.observe`)."""
        shape, most = self.shape, self.shape.candidates
        sizes = [*shape.parts.values(), most * shape.words, most * FEATURES, most]
        *texts, commands, features, mask = rows.split(sizes, dim=-1)
        tables = self.embedding
        pairs = zip(shape.parts, texts, strict=True)
        state = self.state(torch.cat([tables[name](ids.long()) for name, ids in pairs], -1))
        # Only the candidates that exist are scored: a third of the places in most texts.
        row, place = (mask > 0.5).nonzero(as_tuple=True)
        ids = commands.reshape(-1, most, shape.words)[row, place].long()
        command = self.command(tables["candidate"](ids))
        features = features.reshape(-1, most, FEATURES)[row, place]
        context = state[row]
        joined = torch.cat([context, command, context * command, features], -1)
        logits = rows.new_full((len(rows), most), MASKED)
        logits = logits.index_put((row, place), self.score(joined).squeeze(-1))
        return logits, self.value(state).squeeze(-1)

    def start_even(self) -> None:
        """Scale the last layer, so that all candidates begin almost equally likely
        (Andrychowicz et al., arXiv 2006.05990, section 3.2).
        """
        last: Any = self.score[-1]
        with torch.no_grad():
            last.weight.mul_(0.01)
            last.bias.zero_()


class CandidatePolicy:
    """A scorer between texts and commands.

    It remembers each episode's first text and commands. Call `reset` before the first step of
    environments that step together, and `restart` where they began new episodes.
    """

    def __init__(
        self,
        algo: str,
        observation_space: gym.Space[Any],
        action_space: spaces.Text,
        source: CandidateSource,
        shape: CandidateShape,
    ):
        """A policy with random weights.

        Args:
            algo: The algorithm that trains it.
            observation_space: A Text.
            action_space: A Text.
            source: Lists the candidates.
            shape: The layout of the network's rows.
        """
        self.algo, self.observation_space, self.action_space = algo, observation_space, action_space
        self.source, self.shape = source, shape
        with torch.random.fork_rng([]):  # the weights are replaced
            self.network = CandidateScorer(shape)
        self.explores = False
        """True if it draws where it acts in one environment at a time (`__call__`)."""
        self.noise = 0.0
        """The probability of a random candidate in place of its choice"""
        self._listed: list[Any] | None
        self.reset()

    @property
    def identity(self) -> list[Any]:
        """The facts, apart from the weights, that decide its actions: the function that lists the
        candidates, a hash of its code, the layout of the rows and the noise.
        """
        return [*self.source.identity, self.shape.to_json(), self.noise]

    def noisy(self, noise: float) -> CandidatePolicy:
        """The same network with this probability of random candidates, and a memory of its own."""
        other = copy.copy(self)
        other.noise = noise
        other.reset()
        return other

    def reset(self, num_envs: int = 1, seed: int = 0) -> None:
        """Begin new episodes in `num_envs` environments. `seed` is not used: draws take `rng`."""
        self._episodes = CandidateEpisodes(self.source, self.shape, self.action_space, num_envs)
        self._listed = None

    def restart(self, mask: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Mark the environments whose episodes began since the last action, `mask` [B]."""
        self._episodes.restart(np.asarray(mask, np.bool_))

    def start(self, k: int, rng: Rng) -> None:
        """Begin episode k of one environment (`envs.episode.EpisodeAct`)."""
        self.reset()

    def read_info(self, info: Mapping[str, Any]) -> None:
        """Take the candidates of the next action from an info (`envs.episode.ReadsInfos`)."""
        self._listed = [info.get(COMMANDS)]

    def act(self, observations: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map B texts to B commands.

        Args:
            observations: The texts, as a tuple.
            explore: Draw by the scores. Otherwise take the candidate with the highest one.
            rng: The generator of the draws, which noise needs too.
        """
        return self._act(observations, explore, rng, self.noise)

    def _act(self, observations: Any, explore: bool, rng: Rng | None, noise: float) -> Any:
        assert rng is not None or not (explore or noise), "explore and noise need rng"
        if len(self._episodes) != len(observations):
            self.reset(len(observations))
        rows = self._episodes.observe(observations, self._listed)
        with torch.no_grad():
            logits = self.network(torch.from_numpy(rows))[0].double().numpy()
        if explore and rng is not None:
            logits = logits + rng.gumbel(size=logits.shape)
        chosen = logits.argmax(-1)
        if noise and rng is not None:
            counts = np.array([len(commands) for commands in self._episodes.commands])
            randomly = rng.random(len(chosen)) < noise
            chosen = np.where(randomly, rng.integers(counts), chosen)
        return self._episodes.take(chosen)

    def act_one(self, observation: Any, explore: bool = False, rng: Rng | None = None) -> Any:
        """Map one text to one command."""
        return self.act((observation,), explore, rng)[0]

    def random_action(self, observation: Any, rng: Rng) -> Any:
        """A random candidate of one environment (`behaviours.DrawsActions`)."""
        return self._act((observation,), False, rng, noise=1.0)[0]

    def __call__(self, observation: Any, rng: Rng) -> Any:
        """The command of one environment (`envs.episode.Act`)."""
        return self.act_one(observation, self.explores, rng)

    def save(self, folder: Path) -> None:
        """Write policy.json and policy.safetensors into an existing folder."""
        description = {
            "schema": SCHEMA,
            "algo": self.algo,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "candidates": self.source.name,
            "shape": self.shape.to_json(),
        }
        (folder / POLICY_JSON).write_text(json.dumps(description, indent=1))
        save_weights(self.network, folder / WEIGHTS)

    @staticmethod
    def load(folder: Path) -> CandidatePolicy:
        """Read a policy.

        Raises:
            ArtifactError: It is missing or has another schema.
            UsageError: Its function of candidates is not here.
        """
        data, weights = read_files(folder)
        spaces_ = [space_from_json(data[f"{name}_space"]) for name in ("observation", "action")]
        source = load_source(data["candidates"], f"{folder / POLICY_JSON}: candidates")
        if not isinstance(spaces_[1], spaces.Text):
            raise UsageError(f"{folder / POLICY_JSON}: candidates need text actions")
        shape = CandidateShape(**data["shape"])
        policy = CandidatePolicy(data["algo"], spaces_[0], spaces_[1], source, shape)
        policy.network.load_state_dict(weights)
        return policy
