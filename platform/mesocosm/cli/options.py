"""Options that several commands share, and what Tab completes for them.

Completion must be fast: it imports nothing that a job runs on.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from mesocosm import config, shipped
from mesocosm.cli.keys import config_keys, config_of
from mesocosm.cluster import records, spec
from mesocosm.jobs.registry import JOBS
from mesocosm.store.files import use_cache

if TYPE_CHECKING:
    from mesocosm.store.artifacts import Storage

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem] | list[str]]


def _complete(names: Callable[[], Iterable[str]]) -> Complete:
    return lambda context, parameter, word: [name for name in names() if name.startswith(word)]


def _yaml_files(context: click.Context, parameter: click.Parameter, word: str) -> list[str]:
    paths = [Path(path) for path in sorted(glob.glob(f"{glob.escape(word)}*"))]
    folders = [f"{path}/" for path in paths if path.is_dir()]
    files = [str(path) for path in paths if path.suffix in (".yaml", ".yml")]
    folder = f"{(context.command.name or '').removeprefix('train-')}/"
    names = [name.removeprefix(folder) for name in shipped.configs() if name.startswith(folder)]
    return folders + files + [name for name in names if name.startswith(word)]


def _config_keys(context: click.Context, parameter: click.Parameter, word: str) -> list[str]:
    if (context.params.get("overrides") or ())[-1:] == ("=",):
        return []  # bash splits key=value at its =
    job = JOBS.get(context.command.name or "")
    schema = ("mesocosm.config", "JobConfig") if job is None else config_of(job.module)
    keys = [key for key, _, is_block in config_keys(*schema) if not is_block]
    return [f"{key}=" for key in keys if key.startswith(word)]


def _datasets() -> list[str]:
    """The datasets of the default root; a bucket is not read at every Tab."""
    return [file.parent.name for file in sorted(Path(".mesocosm/datasets").glob("*/COMMIT.json"))]


complete_clusters = _complete(spec.names)
complete_configs = _complete(shipped.configs)
complete_datasets = _complete(_datasets)
complete_jobs = _complete(lambda: [record.id for record in records.every()])


def overrides(metavar: str = "[key=value]...") -> click.Argument:
    """The `key=value` words of a command."""
    return click.Argument(["overrides"], nargs=-1, metavar=metavar, shell_complete=_config_keys)


CONFIG = click.Option(
    ["-c", "--config", "files"],
    multiple=True,
    metavar="FILE",
    shell_complete=_yaml_files,
    help="A YAML file, or a shipped config. May be repeated; later ones win.",
)
JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON.")
CLUSTER = click.Option(
    ["--cluster"], metavar="NAME", shell_complete=complete_clusters, help="Use clusters/NAME.yaml."
)
INSECURE = click.Option(
    ["--insecure"], is_flag=True, help="Accept a cluster that answers without a token."
)
YES = click.Option(["--yes"], is_flag=True, help="Do not ask for confirmation.")
DRY_RUN = click.Option(
    ["--dry-run"], is_flag=True, help="Print what would happen, its size and price; do nothing."
)


def open_storage(files: Sequence[str], overrides: Sequence[str]) -> Storage:
    """The storage that a config names. Raises UsageError where it cannot be read."""
    from mesocosm.store.artifacts import Storage

    loaded = config.load(config.JobConfig, files, overrides).storage
    use_cache(loaded.cache)
    storage = Storage(loaded.root)
    storage.check_readable()
    return storage
