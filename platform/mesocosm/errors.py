"""Errors for users: one sentence with the key, the value and the fix.

The command line prints only the sentence and exits with `exit_code`. The run's log has a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MesocosmError(Exception):
    """A job failed for a known reason. Exit status 1."""

    exit_code = 1


class UsageError(MesocosmError):
    """A wrong key or value, or a missing artifact, before the job starts. Exit status 2."""

    exit_code = 2


class BudgetSpent(MesocosmError):
    """The ledger's budget of real steps is spent. No step was taken beyond it."""


class ArtifactError(MesocosmError):
    """An artifact is missing, unfinished or damaged."""


class StorageError(MesocosmError):
    """A storage root cannot be read or written: the disk is full, or S3 does not answer."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the one of `names` nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
