"""`make bench-sac`: updates a CPU second of SAC inside a world over plain torch's, in one run.

    python benchmarks/bench_sac.py [--rounds N] [--save]

Both do the same work on the same batches of the same replay buffer (observations of 11 numbers,
actions of 3): two critics as one batched product, Huber loss, fused Adam, Polyak averaging at each
update, the actor and the temperature every second update. Rounds alternate between the two, so that
a noisy machine disturbs both equally; the ratio is the median over rounds. --save keeps the table
in benchmarks/results/bench_sac.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.agents.mbpo import configure
from mesocosm.agents.replay import Columns, Replay

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_sac.json"
OBSERVATION, ACTION = 11, 3
SPACES = (
    spaces.Box(-np.inf, np.inf, (OBSERVATION,), np.float32),
    spaces.Box(-1.0, 1.0, (ACTION,), np.float32),
)
SIZES = ((256, 256), (128, 128))
"""(width of both hidden layers, batch)"""
GAMMA, TAU, RATE, ALPHA = 0.99, 5e-3, 3e-4, 0.1
CPU_S = 1.0
"""CPU seconds of one measurement"""


class PlainCritics(nn.Module):
    """Two MLPs with layer normalization, as batched products."""

    def __init__(self, hidden: int):
        super().__init__()
        sizes = (OBSERVATION + ACTION, hidden, hidden, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i in range(3):
            bound = 1 / math.sqrt(sizes[i])
            self.weights.append(torch.empty(2, sizes[i], sizes[i + 1]).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, sizes[i + 1]).uniform_(-bound, bound))
        self.gains = nn.ParameterList(torch.ones(2, 1, hidden) for _ in range(2))
        self.shifts = nn.ParameterList(torch.zeros(2, 1, hidden) for _ in range(2))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """[2, N]"""
        x = torch.cat((observation, action), -1).expand(2, -1, -1)
        for i in range(2):
            x = torch.baddbmm(self.biases[i], x, self.weights[i])
            x = F.layer_norm(x, x.shape[-1:])
            x = F.relu(torch.addcmul(self.shifts[i], self.gains[i], x))
        return torch.baddbmm(self.biases[2], x, self.weights[2]).squeeze(-1)


class PlainSAC:
    """SAC without any framework."""

    def __init__(self, hidden: int):
        self.actor = nn.Sequential(
            *(nn.Linear(OBSERVATION, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, 2 * ACTION),
        )
        self.critics, self.targets = PlainCritics(hidden), PlainCritics(hidden)
        self.targets.load_state_dict(self.critics.state_dict())
        self.targets.requires_grad_(False)
        self.log_alpha = torch.full((1,), math.log(ALPHA), requires_grad=True)
        self.parameters = list(self.actor.parameters()), list(self.critics.parameters())
        self.of_actor = torch.optim.Adam(self.parameters[0], lr=RATE, fused=True)
        self.of_critics = torch.optim.Adam(self.parameters[1], lr=RATE, fused=True)
        self.of_alpha = torch.optim.Adam([self.log_alpha], lr=RATE, fused=True)
        self.target_parameters = list(self.targets.parameters())
        self.updates = 0

    def act(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """(actions [N, a], log-probabilities [N])."""
        mean, log_std = self.actor(observation).chunk(2, -1)
        log_std = log_std.clamp(-20.0, 2.0)
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        jacobian = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))
        return torch.tanh(x), (normal - jacobian).sum(-1)

    def update(self, batch: Columns) -> None:
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            action, log_p = self.act(batch.following)
            value = self.targets(batch.following, action).amin(0) - alpha * log_p
            target = batch.reward + batch.discount * value
        values = self.critics(batch.observation, batch.action)
        loss = 2.0 * F.huber_loss(values, target.expand_as(values))
        self.of_critics.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.of_critics.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.parameters[1], TAU)
        if self.updates % 2 == 0:
            self.critics.requires_grad_(False)
            action, log_p = self.act(batch.observation)
            loss = (alpha * log_p - self.critics(batch.observation, action).amin(0)).mean()
            loss = loss - (self.log_alpha * (log_p.detach().mean() - ACTION)).sum()
            self.of_actor.zero_grad(set_to_none=True)
            self.of_alpha.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.of_actor.step()
            self.of_alpha.step()
            self.critics.requires_grad_(True)
        self.updates += 1


def learner(hidden: int, batch: int) -> Any:
    """The learner of SAC inside a world."""
    config = SACConfig()
    config.environment(observation_space=SPACES[0], action_space=SPACES[1])
    config.learners(num_learners=0)
    config.rl_module(
        model_config=DefaultModelConfig(fcnet_hiddens=[hidden] * 2, fcnet_activation="relu")
    )
    rates = dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr"), RATE)
    config.training(train_batch_size_per_learner=batch, initial_alpha=ALPHA, tau=TAU, **rates)
    configure(config)
    return config.build_learner(spaces={DEFAULT_MODULE_ID: SPACES})


def transitions(count: int) -> Replay:
    """Random transitions."""
    replay, generator = Replay(count), torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    action = torch.rand(count, ACTION, generator=generator) * 2 - 1
    discount = torch.full((count,), GAMMA)
    observations = normal(count, OBSERVATION), normal(count, OBSERVATION)
    replay.add(Columns(observations[0], action, normal(count), observations[1], discount))
    return replay


def rate(update: Callable[[int], object]) -> float:
    """Updates a CPU second."""
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < CPU_S:
        update(20)
        count += 20
    return count / spent


def compare(hidden: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one size: the learner against plain torch."""
    replay, plain = transitions(100_000), PlainSAC(hidden)
    ours = learner(hidden, batch)

    def update_plain(count: int) -> None:
        for _ in range(count):
            plain.update(replay.sample(batch))

    def update_ours(count: int) -> None:
        ours.update_many(replay.sample, count)

    rates: dict[str, list[float]] = {"plain torch": [], "SAC in a world": []}
    update_plain(20)
    for _ in range(rounds):
        rates["plain torch"].append(rate(update_plain))
        rates["SAC in a world"].append(rate(update_ours))
    rows = []
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["plain torch"], strict=True)]
        row: dict[str, Any] = {"hidden": hidden, "batch": batch, "learner": name}
        row |= {"updates_per_cpu_s": round(statistics.median(values))}
        row |= {"ratio": round(statistics.median(ratios), 3)}
        rows.append(row | {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for hidden, batch in SIZES:
        for row in compare(hidden, batch, options.rounds):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.save:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, cwd=HERE).stdout.strip()
        result = {"commit": commit, "command": "python " + " ".join(sys.argv), "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
