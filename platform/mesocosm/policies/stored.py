"""Policies in storage: networks of numbers or images, and scorers of candidate commands."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mesocosm.errors import UsageError
from mesocosm.policies.image_policy import ENCODER, ImagePolicy
from mesocosm.policies.policy import POLICY_JSON, SNAPSHOTS, Policy
from mesocosm.policies.scorer import CandidatePolicy
from mesocosm.store.artifacts import Storage

StoredPolicy = Policy | CandidatePolicy | ImagePolicy


def load_policy(folder: Path) -> StoredPolicy:
    """Read a policy of any kind. Raises ArtifactError where it is missing or damaged."""
    file = folder / POLICY_JSON
    data = json.loads(file.read_text()) if file.is_file() else {}
    if ENCODER in data:
        return ImagePolicy.load(folder)
    return CandidatePolicy.load(folder) if "candidates" in data else Policy.load(folder)


def policy_of(storage: Storage, ref: str) -> StoredPolicy:
    """Load the policy `agents/ID`, or its snapshot `agents/ID@ITERATION`.

    Raises:
        UsageError: There is no such agent or snapshot.
    """
    return load_policy(policy_folder(storage, ref))


def candidates_of(storage: Storage, refs: Iterable[str | None]) -> list[Any]:
    """The identities of the policies among `refs` that choose among candidates
    (`CandidatePolicy.identity`), sorted by reference. The code that lists candidates runs in its
    present version, so it is not part of the policy's own id.

    Args:
        storage: The storage.
        refs: As of `policy_of`; None is left out.

    Raises:
        UsageError: There is no such policy.
    """
    policies = [policy_of(storage, ref) for ref in sorted({ref for ref in refs if ref})]
    return [policy.identity for policy in policies if isinstance(policy, CandidatePolicy)]


def policy_folder(storage: Storage, ref: str) -> Path:
    """The folder of the policy `agents/ID`, or of its snapshot `agents/ID@ITERATION`.

    Raises:
        UsageError: There is no such agent or snapshot.
    """
    name, _, iteration = ref.partition("@")
    agent = storage.artifact("agents", name)
    if not iteration:
        return agent.path
    snapshots = sorted((path.name for path in (agent.path / SNAPSHOTS).glob("*")), key=int)
    if iteration not in snapshots:
        raise UsageError(
            f"{agent.name} has no snapshot at iteration {iteration!r}; it has"
            f" {', '.join(snapshots) or 'none'}"
        )
    return agent.path / SNAPSHOTS / iteration
