"""`mesocosm storage gc`: what may go from a root, and its removal. Light to import; what it needs
it imports when run.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mesocosm import output
from mesocosm.errors import MesocosmError, UsageError

EPILOG = """\
examples:
  mesocosm storage gc --dry-run                                    what may go from .mesocosm, its size, and why
  mesocosm storage gc storage.root=s3://bucket/prefix --dry-run --json
  mesocosm storage gc storage.root=s3://bucket/prefix --yes        remove it
"""


def add(commands: Any) -> None:
    """Add the command, and its own, to argparse's `commands`."""
    from mesocosm.cli.main import common

    said = "look after a storage root"
    actions = commands.add_parser("storage", help=said, description=said).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    said = (
        "remove what interrupted jobs left, and damaged artifacts: never a whole artifact, a run, a"
        " checkpoint, a ledger or a cell"
    )
    gc = actions.add_parser(
        "gc",
        help=said,
        description=said,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common(gc)
    gc.add_argument(
        "--older-than",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="only what has not changed for so long (24); a job may be at work on the rest",
    )
    gc.add_argument("--dry-run", action="store_true", help="list it, and do nothing")
    gc.add_argument("--yes", action="store_true", help="do not ask")


def run(options: argparse.Namespace) -> int:
    """Exit status 0; 1 where something listed could not be removed."""
    from mesocosm import config, faults
    from mesocosm.cluster import session_gc
    from mesocosm.store import gc
    from mesocosm.store.artifacts import Storage
    from mesocosm.store.files import use_cache

    if options.older_than < 0:
        raise UsageError(f"--older-than {options.older_than:g} must not be negative")
    given = config.load(config.JobConfig, options.config, options.overrides).storage
    use_cache(given.cache)
    storage = Storage(given.root)
    storage.check_readable()
    remarks: list[str] = []
    every = [*gc.find(storage, remarks.append), *session_gc.find()]
    found = [garbage for garbage in every if garbage.age_s >= options.older_than * 3600]
    total = sum(garbage.bytes for garbage in found)
    for remark in remarks:
        print(f"mesocosm: {remark}", file=sys.stderr)
    if not options.json:
        for garbage in found:
            print(
                f"{size(garbage.bytes):>10}  {_age(garbage.age_s):>6}  {garbage.category:<19} "
                f" {garbage.path}  ({garbage.why})"
            )
        print(
            f"{len(found)} may go from {storage.root}, {size(total)}; nothing that changed within"
            f" {options.older_than:g} hours was looked at"
        )
    removed, failed = 0, []
    if found and not options.dry_run:
        output.confirm(
            f"remove {'it' if len(found) == 1 else f'these {len(found)}'}?", yes=options.yes
        )
        for garbage in found:
            try:
                removed += garbage.remove() is not False
            except Exception as error:  # a remote filesystem's errors are its own
                failed.append(f"{garbage.path} ({faults.first_line(error)})")
    if options.json:
        rows = [garbage.to_json() for garbage in found]
        facts = {
            "root": storage.root,
            "older_than_hours": options.older_than,
            "remains": rows,
            "bytes": total,
            "removed": removed,
            "remarks": remarks,
        }
        output.write(json.dumps(facts, indent=1))
    elif not options.dry_run and found:
        print(
            f"{removed} removed"
            + (
                f"; {kept} needed by now, and kept"
                if (kept := len(found) - removed - len(failed))
                else ""
            )
        )
    if failed:
        raise MesocosmError(
            f"{len(failed)} could not be removed, first {failed[0]}; the rest of the list is gone,"
            " run the same again for these"
        )
    return 0


def size(bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if bytes < 1024:
            return f"{bytes:.0f} {unit}" if unit == "B" else f"{bytes:.1f} {unit}"
        bytes /= 1024
    return f"{bytes:.1f} GiB"


def _age(seconds: int) -> str:
    return (
        f"{seconds // 86400} d"
        if seconds >= 2 * 86400
        else f"{seconds // 3600} h"
        if seconds >= 7200
        else f"{seconds // 60} min"
    )
