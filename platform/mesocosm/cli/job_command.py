"""`mesocosm JOB`: load the job's config, then run it here or submit it to a cluster."""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import click

from mesocosm import config, faults, output, shipped
from mesocosm.cli import options
from mesocosm.cli.keys import config_class, describe, field_names
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs.registry import JOBS, JobEntry
from mesocosm.store.files import use_cache

FLAGS = {
    "plan": {"law": "law", "flops": "flops", "money": "money"},
    "import": {"env": "reality.env"},
    "propose": {"out": "out"},
}
"""Options of a job that set a key: `--env X` is `reality.env=X`."""

WORDS = {"import": ("paths", "[PATH|key=value]...")}
"""The list key to which a job adds its words that are not `key=value`, and their metavar."""


RUN_OPTIONS = (
    click.Option(["--force"], is_flag=True, help="Make the artifact again if it exists."),
    click.Option(["--wait"], is_flag=True, help="Wait for a process that makes the same artifact."),
    click.Option(
        ["--cluster"],
        metavar="NAME",
        shell_complete=options.complete_clusters,
        help="Submit to clusters/NAME.yaml. Repeated: attach to the job, or start a new attempt.",
    ),
    click.Option(["--follow"], is_flag=True, help="With --cluster: print the log until the end."),
    options.YES,
    options.INSECURE,
)


class JobCommand(click.Command):
    """A job. Its help ends with an example and the keys, read from its config only when asked."""

    def __init__(self, name: str, job: JobEntry):
        self.job = job
        flags = [
            click.Option([f"--{flag}"], metavar=flag.upper(), help=f"Set {key}.")
            for flag, key in FLAGS.get(name, {}).items()
        ]
        words = options.overrides(WORDS[name][1]) if name in WORDS else options.overrides()
        params = [*flags, words, options.CONFIG, options.DRY_RUN, *RUN_OPTIONS, options.JSON]
        super().__init__(
            name, params=params, callback=functools.partial(_run_job, name), help=job.help
        )

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\nExample:\n  mesocosm {self.name} {self.job.example}\n")
        formatter.write("\nConfig keys and their defaults, by section:\n")
        schema = config_class(self.job.module)
        for section, lines in describe(str(self.name), schema).items():
            if lines:
                keys = "\n  ".join(lines)
                formatter.write(f"\n{section}:\n  {keys}\n")


def _run_job(
    name: str,
    files: Sequence[str],
    overrides: Sequence[str],
    dry_run: bool,
    as_json: bool,
    force: bool,
    wait: bool,
    cluster: str | None,
    follow: bool,
    yes: bool,
    insecure: bool,
    **flags: str | None,
) -> int:
    from mesocosm.jobs import preflight
    from mesocosm.runs import tracking
    from mesocosm.runs.upload import JOB
    from mesocosm.store.artifacts import Storage

    paths = [shipped.config_path(file, name) for file in files]  # importing a job takes seconds
    loaded = _load(name, config_class(JOBS[name].module), paths, overrides, flags)
    job = importlib.import_module(JOBS[name].module).JOB
    use_cache(loaded.storage.cache)
    loaded.force |= force
    loaded.wait |= wait
    if cluster is None and (warning := preflight.check(loaded)):
        tracking.console.print(f"warning: {warning}")
    if cluster is not None and not dry_run:
        from mesocosm.cluster.submit import submit

        facts = submit(
            cluster, name, loaded, follow=follow, yes=yes, insecure=insecure, quiet=as_json
        )
        if as_json:
            output.facts(facts, as_json)
        return 1 if follow and facts["state"] != "SUCCEEDED" else 0
    if dry_run:
        facts, resources = job.preview(loaded)
        if cluster is None and resources:
            preflight.check_resources(loaded, resources)
        output.facts(facts, as_json)
        return 0
    plan = job.resolve(loaded, Storage(loaded.storage.root))
    with tracking.start(name, loaded, id=os.environ.get(JOB), quiet=as_json) as run:
        tracking.replay_in_background(loaded)
        try:
            artifact = job.execute(plan, run)
        except MesocosmError:
            raise
        except (Exception, SystemExit) as error:
            log = run.folder / "log.txt"
            raise MesocosmError(f"{describe_error(error)}; the traceback is in {log}") from error
        facts = {"run": f"{run.job}/{run.id}", **run.facts}
    if artifact is not None:
        facts |= {"artifact": artifact.name, "path": str(artifact.path)}
    if as_json:
        output.facts(facts, as_json)
    elif artifact is not None:
        tracking.console.print(f"{artifact.name}  {artifact.path}")
    return 0


def _load(
    name: str,
    schema: type[config.JobConfig],
    files: Sequence[Path],
    overrides: Sequence[str],
    flags: dict[str, str | None],
) -> config.JobConfig:
    """The job's config, composed of files, overrides, flags and further words."""
    words: list[str] = []
    if name in WORDS:
        if "=" in overrides:
            raise UsageError("an override has spaces around its =; write key=value")
        words = [word for word in overrides if not _is_override(word)]
    overrides = [word for word in overrides if word not in words]
    overrides += [f"{FLAGS[name][k]}={value}" for k, value in flags.items() if value is not None]
    try:
        loaded = config.load(schema, files, overrides)
    except UsageError as error:
        raise _of_another_job(name, files) or error from error
    if words:
        key = WORDS[name][0]
        setattr(loaded, key, [*getattr(loaded, key), *words])
    return loaded


def _of_another_job(name: str, files: Sequence[Path]) -> UsageError | None:
    """An error for the first file whose keys are those of another job only; None if all fit."""
    top_level = {job: {*field_names(entry.module)} for job, entry in JOBS.items()}
    for file in files:
        keys = {*config.read(file)}
        others = [job for job, fields in top_level.items() if keys <= fields]
        if others and name not in others:
            jobs = " or ".join(map(repr, others))
            problem = f"config file {str(file)!r} looks like a config of {jobs}, not of {name!r}"
            return UsageError(f"{problem}; try mesocosm {others[0]} -c {file}")
    return None


def _is_override(word: str) -> bool:
    """True if a word is `key=value` rather than the path of a file with = in its name."""
    return re.match(r"[A-Za-z_][\w.\[\]]*=", word) is not None and not os.path.exists(word)


def describe_error(error: BaseException) -> str:
    """One sentence for an unexpected error; for an error of a Ray worker, its cause."""
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, BaseException) else error
    if (reason := faults.reason(error)) is not None:
        return reason
    line = " ".join(str(error).split())[:300]
    return f"the command failed with {': '.join(filter(None, (type(error).__name__, line)))}"
