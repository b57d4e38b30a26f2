"""The gate before text worlds: an agent trains only in a world that ranks policies as reality does.

A half-trained text world gives its agents too high returns, and its losses do not show it.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesocosm.errors import UsageError
from mesocosm.store.artifacts import Artifact, Storage

RANKS, REGRET = 0.9, 0.05
"""Least Pearson's r and greatest regret@1 of a world that ranks policies. WorldGym reports r = .78
on robots (arXiv 2506.00613).
"""
POLICIES = 15
"""Fewest policies in such a ranking."""


def check_passed(storage: Storage, world: Artifact) -> None:
    """Raise UsageError unless an evaluation of the world shows that it ranks policies.

    Args:
        storage: Its evaluations are read: the figures of their policy values.
        world: A text world.
    """
    for id in storage.list("evaluations"):
        if storage.is_damaged("evaluations", id):
            continue
        commit = storage.commit_of("evaluations", id)
        meta = {} if commit is None else commit["meta"]
        if meta.get("inputs", {}).get("worlds") == [world.id] and ranks(meta.get("figures", {})):
            return
    raise UsageError(
        f"world={world.name} must have an evaluation of at least {POLICIES} policies, three in"
        f" each fifth of their returns, with r >= {RANKS:g} and regret@1 <= {REGRET:g}, since a"
        " poor text world flatters its agents; got none: mesocosm evaluate it with policies, or"
        " train in it nevertheless with --force"
    )


def ranks(figures: Mapping[str, float]) -> bool:
    """True if the figures of an evaluation show that its world ranks policies."""
    names = ("policies", "pearson", "regret", "firm")
    values = [figures.get(f"policy_value/{name}") for name in names]
    if None in values:
        return False
    policies, pearson, regret, firm = (float(value) for value in values if value is not None)
    return policies >= POLICIES and pearson >= RANKS and regret <= REGRET and firm == 1.0
