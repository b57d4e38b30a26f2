"""`mesocosm storage`: the care of a storage root."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from mesocosm import faults, output
from mesocosm.cli import options
from mesocosm.errors import MesocosmError, UsageError


@click.group()
def storage() -> None:
    """Look after a storage root."""


@storage.command(
    params=[options.overrides(), options.CONFIG, options.DRY_RUN, options.YES, options.JSON]
)
@click.option(
    "--older-than",
    type=float,
    default=24.0,
    metavar="HOURS",
    help="Only files unchanged for this long (24); a job may still use younger ones.",
)
def gc(
    files: Sequence[str],
    overrides: Sequence[str],
    as_json: bool,
    dry_run: bool,
    yes: bool,
    older_than: float,
) -> None:
    """Remove the files of interrupted jobs, and damaged artifacts.

    Whole artifacts, runs, checkpoints, ledgers and cells are never removed.

    \b
    Examples:
      mesocosm storage gc --dry-run                                 the files, their sizes, and why
      mesocosm storage gc storage.root=s3://bucket/prefix --dry-run --json
      mesocosm storage gc storage.root=s3://bucket/prefix --yes     remove them
    """
    from mesocosm.cluster import session_folder
    from mesocosm.store import gc

    if older_than < 0:
        raise UsageError(f"--older-than must be >= 0, got {older_than:g}")
    root = options.open_storage(files, overrides)
    remarks: list[str] = []
    every = [*gc.find(root, remarks.append), *session_folder.garbage()]
    garbage = [item for item in every if item.age_s >= older_than * 3600]
    total = sum(item.bytes for item in garbage)
    for remark in remarks:
        print(f"mesocosm: {remark}", file=sys.stderr)
    if not as_json:
        for item in garbage:
            print(
                f"{output.size(item.bytes):>10}  {_age(item.age_s):>6}  {item.category:<19} "
                f" {item.path}  ({item.why})"
            )
        print(
            f"{len(garbage)} may be removed from {root.root}, {output.size(total)}; files that"
            f" changed within {older_than:g} hours were not examined"
        )
    removed, failed = 0, []
    if garbage and not dry_run:
        output.confirm(f"remove {len(garbage)} item{'s' * (len(garbage) != 1)}?", yes=yes)
        for item in garbage:
            try:
                removed += item.remove() is not False
            except Exception as error:  # a remote filesystem raises its own types
                failed.append(f"{item.path} ({faults.first_line(error)})")
    if as_json:
        facts = {
            "root": root.root,
            "older_than_hours": older_than,
            "remains": [item.to_json() for item in garbage],
            "bytes": total,
            "removed": removed,
            "remarks": remarks,
        }
        output.write_json(facts)
    elif garbage and not dry_run:
        skipped = len(garbage) - removed - len(failed)
        print(f"{removed} removed" + (f"; {skipped} in use again, and kept" if skipped else ""))
    if failed:
        raise MesocosmError(
            f"{len(failed)} could not be removed, first {failed[0]}; run the same command again"
        )


def _age(seconds: int) -> str:
    for unit, name in ((86400, "d"), (3600, "h")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{seconds // 60} min"
