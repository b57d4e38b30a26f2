"""What goes wrong, said to a user: one sentence with the name, the value and the fix.

The command line prints the sentence alone and exits with `exit_code`; a traceback goes to the run's
log.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MesocosmError(Exception):
    """A job that failed for a reason we can name. Exit status 1."""

    exit_code = 1


class UsageError(MesocosmError):
    """Wrong use, found before anything started: a key, a value, a missing artifact. Exit status 2."""

    exit_code = 2


class BudgetSpent(MesocosmError):
    """The ledger's budget of real steps is spent; nothing was stepped beyond it."""


class ArtifactError(MesocosmError):
    """An artifact is missing, unfinished or damaged."""


class StorageError(MesocosmError):
    """A storage root cannot be read or written: the disk is full, or S3 does not answer."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
