"""Policies that attend to the slots of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents.test_policy import built
from gymnasium import spaces

from mesocosm.agents import rllib
from mesocosm.agents.export import save_agent
from mesocosm.agents.settings import Setup
from mesocosm.datasets.masks import MASK
from mesocosm.envs.items import Items
from mesocosm.policies.attention import TableNetwork, attends
from mesocosm.policies.heads import ActionMap, flatten_batch, stack
from mesocosm.policies.policy import Layout, Policy
from mesocosm.policies.value import ValueFunction

ITEMS = Items(slots=5)
SPACES = ITEMS.observation_space, ITEMS.action_space
PLAIN = spaces.Dict({name: SPACES[0][name] for name in ("goal", "items")})
ORDER = np.array([3, 0, 4, 1, 2])


def observations(count: int = 8) -> list[Any]:
    return [ITEMS.reset(seed=seed)[0] for seed in range(count)]


def moved(observation: Any) -> Any:
    items = {name: values[ORDER] for name, values in observation["items"].items()}
    mask = observation[MASK].reshape(2, -1)[:, ORDER].reshape(-1)
    return observation | {"items": items, MASK: mask}


def flat(space: Any, rows: list[Any]) -> torch.Tensor:
    return torch.from_numpy(
        flatten_batch(space, stack(space, [{k: row[k] for k in space} for row in rows]))
    )


@pytest.mark.parametrize(
    ("observation", "action", "sizes"),
    [
        (SPACES[0], SPACES[1], (5, 5)),
        (PLAIN, SPACES[1], (2, 5)),
        (PLAIN, spaces.Discrete(5), (5,)),
        (PLAIN, spaces.MultiDiscrete([3, 2]), (3, 2)),
    ],
    ids=["points", "without a mask", "directions", "elsewhere"],
)
def test_a_permutation_of_the_slots_permutes_the_scores(
    observation: Any, action: Any, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network = TableNetwork(observation, action, 16)
    rows = observations()
    with torch.no_grad():
        (before, value), (after, same) = (
            network(flat(observation, chosen)) for chosen in (rows, list(map(moved, rows)))
        )
    assert before.shape[-1] == sum(sizes) and before.std() > 0.01
    torch.testing.assert_close(value, same)
    for a, b in zip(before.split(sizes, -1), after.split(sizes, -1), strict=True):
        points = observation is SPACES[0]  # it has a mask: others' scores stay where they are
        order = torch.from_numpy(ORDER) if points else torch.arange(a.shape[-1])
        torch.testing.assert_close(a[:, order], b)


def test_what_is_absent_does_not_count() -> None:
    network = TableNetwork(PLAIN, SPACES[1], 16)
    rows, other = observations(), observations()
    for row in other:
        row["items"]["price"][row["items"]["present"] == 0] = 0.7
    with torch.no_grad():
        values = [network(flat(PLAIN, chosen))[1] for chosen in (rows, other)]
    torch.testing.assert_close(*values)


def test_who_attends() -> None:
    assert attends(*SPACES) and attends(PLAIN, spaces.Discrete(3))
    assert not attends(PLAIN, spaces.Box(-1, 1)) and not attends(spaces.Box(-1, 1), SPACES[1])
    setup = Setup("PPO", {}, {}, 1, 8, 0, runners=0, gamma=0.99, seed=0, spaces=SPACES)
    assert setup.attends


def test_ppo_trains_it_and_exports_it(ray_local: None, tmp_path: Path) -> None:
    with built(Items(slots=5), "PPO", tmp_path / "rllib") as algorithm:
        rllib.train(algorithm)
        save_agent(algorithm, SPACES, tmp_path)
        module = algorithm.env_runner.module
        rows = flat(SPACES[0], observations())
        with torch.no_grad():
            logits = module.forward_inference({"obs": rows})["action_dist_inputs"]
            values = module.compute_values({"obs": rows})
    policy, value = Policy.load(tmp_path), ValueFunction.load(tmp_path)
    assert policy.layout.table_width == 16 and not policy.layout.trunk
    torch.testing.assert_close(policy.network(rows), logits)
    torch.testing.assert_close(value(policy, rows), values)
    batch = stack(SPACES[0], observations())
    numbers = ActionMap(SPACES[1], True).to_head(policy.act(batch))
    assert batch[MASK][np.arange(len(numbers)), numbers].all()


def test_policies_without_a_table_are_written_as_before(tmp_path: Path) -> None:
    box = spaces.Box(-1, 1, (2,))
    Policy("PPO", box, spaces.Discrete(2), Layout("categorical", [])).save(tmp_path)
    assert "table_width" not in (tmp_path / "policy.json").read_text()
