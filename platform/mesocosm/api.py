"""The functions of `import mesocosm`. The package's `__getattr__` loads this module when used."""

from __future__ import annotations

from pathlib import Path

import torch

from mesocosm.data import planners
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import MANIFEST
from mesocosm.errors import UsageError
from mesocosm.model.any_world import AnyWorld, load_any
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.policies.policy import POLICY_JSON
from mesocosm.policies.stored import StoredPolicy, policy_of
from mesocosm.policies.stored import load_policy as read_policy
from mesocosm.scaling import fit
from mesocosm.scaling.law import Law
from mesocosm.scaling.table import CellTable
from mesocosm.serve.worlds import find_world
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import Partial, open_partial

ROOT = ".mesocosm"
"""The default storage root, as `storage.root` of the jobs."""


def load_world(
    ref: str | Path, root: str = ROOT, *, device: torch.device | str = "cpu"
) -> AnyWorld:
    """Load a world into this process.

    Args:
        ref: An id, `worlds/ID`, a unique prefix of an id, or a folder with a `world.json`.
        root: The storage root: a folder, or `s3://bucket/prefix`.
        device: Where its networks compute.

    Returns:
        The world, a `TextWorld` where its family is `language`. `WorldVectorEnv(num_envs, world)`
        steps in it.

    Raises:
        UsageError: There is no such world, or the prefix is ambiguous.
        ArtifactError: The world is damaged.
    """
    _, folder = find_world(Storage(root), str(ref))
    return load_any(folder, device)


def load_dataset(*refs: str | Path, root: str = ROOT) -> Dataset:
    """Open one or several datasets as one. Shards are fetched and verified when they are read.

    Args:
        refs: For each dataset an id, `datasets/ID`, a unique prefix of an id, or a folder with a
            `manifest.json`.
        root: The storage root: a folder, or `s3://bucket/prefix`.

    Raises:
        UsageError: There is no such dataset, or the datasets are of different environments.
        ArtifactError: A dataset is damaged.
    """
    storage = Storage(root)
    paths: list[str | Path | Partial] = []
    for ref in refs:
        folder = (Path(ref) / MANIFEST).is_file()
        paths.append(Path(ref) if folder else open_partial(storage, "datasets", str(ref)))
    return Dataset(paths)


def load_policy(ref: str | Path, root: str = ROOT) -> StoredPolicy:
    """Load a trained policy. It acts without Ray.

    Args:
        ref: An id, `agents/ID`, a unique prefix of an id, each with `@ITERATION` for a
            snapshot, or a folder with a `policy.json`.
        root: The storage root: a folder, or `s3://bucket/prefix`.

    Raises:
        UsageError: There is no such agent or snapshot, or the prefix is ambiguous.
        ArtifactError: The policy is damaged.
    """
    if (Path(ref) / POLICY_JSON).is_file():
        return read_policy(Path(ref))
    return policy_of(Storage(root), str(ref))


def load_planner(
    agent: str | None = None, world: str | None = None, root: str = ROOT
) -> PlannerPolicy:
    """Load a planner: iCEM in a world, with an agent's proposals and value function.

    Call `reset(num_envs, seed)`, then `act(observations)` at each step of the real environments,
    and `restart(mask)` before it where environments began new episodes.

    Args:
        agent: `agents/ID`, or a snapshot `agents/ID@ITERATION`. None plans without an agent.
        world: `worlds/ID`. Defaults to the world in which the agent was trained.
        root: The storage root: a folder, or `s3://bucket/prefix`.

    Raises:
        UsageError: Neither is given, one of them does not exist, the spaces differ, or the world's
            actions hold text.
        ArtifactError: The agent has no value function: train it again.
    """
    if agent is None and world is None:
        raise UsageError("agent or world must be set; try agent='agents/ID'")
    return PlannerPolicy(planners.load_planner(Storage(root), agent, world))


def fit_law(table: str | Path, *, drop_outliers: bool = False, seed: int = 0) -> Law:
    """Fit a scaling law to a table of trained cells.

    The result is deterministic in the arguments. docs/scaling.md explains it.

    Args:
        table: A CSV file, one row a trained cell, with the columns params, data, loss [, unique,
            flops, seed, lr, trunk, weight].
        drop_outliers: Leave out rows more than 5 robust standard deviations from the law. The law
            lists them under `dropped`.
        seed: Seed of the bootstrap resamples, from which the intervals come.

    Returns:
        The law: `params`, `interval`, `optimal`, and `predict(params, data)`.

    Raises:
        UsageError: The table cannot be read or determines no law.
    """
    cells = CellTable.read(table)
    command = f"mesocosm.fit_law({str(table)!r}, drop_outliers={drop_outliers}, seed={seed})"
    return fit.fit(cells, drop_outliers=drop_outliers, seed=seed, command=command)
