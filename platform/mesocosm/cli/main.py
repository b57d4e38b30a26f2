"""The command line: `mesocosm JOB -c FILE key=value ...`. Exit status 0 done, 1 failed, 2 wrong
use.

A job is a module with a config dataclass, `run(config, run)`, and `plan(config)`, which says what a
run would do, its size and its price, and does nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from mesocosm import __version__, config, faults, output, signals
from mesocosm.cli import completion
from mesocosm.cluster import ray_session
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.jobs.registry import JOBS, Job
from mesocosm.store.files import use_cache

TOOLS = {
    "fit": "mesocosm.cli.fit",
    "cluster": "mesocosm.cli.cluster",
    "jobs": "mesocosm.cli.jobs",
    "data": "mesocosm.cli.data",
    "storage": "mesocosm.cli.storage",
    "completion": "mesocosm.cli.completion",
}
"""Commands that are no config job: a module, light to import, with `add(commands)` and
`run(options)`, which returns the exit status.
"""


FLAGS = {
    "plan": {"law": "law", "flops": "flops", "money": "money"},
    "import": {"env": "reality.env"},
    "propose": {"out": "out"},
}
"""Options of a job that stand for a key: `--law X` is `law=X`."""

WORDS = {"import": ("paths", "PATH")}
"""The key to whose list a job adds the words that are no `key=value`, and what such a word is
called.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: The words of the command line. By default those of this process, which is then taken
            to end with the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings(
        "ignore", message=".*WARN: "
    )  # Gymnasium's advice to authors of environments
    with signals.end_like_interrupt(), _imports_from_here():
        try:
            options = _parse(arguments)
            as_json = getattr(options, "json", False)
            with output.results_only(for_good=argv is None) if as_json else nullcontext():
                try:
                    return _run(options)
                finally:
                    _end_ray()
                    _flush()
        except MesocosmError as error:
            print(f"mesocosm: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("mesocosm: interrupted; run the same command again to go on", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `mesocosm data list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except Exception as error:
            print(f"mesocosm: {_unexpected(error)}{_traceback_file()}", file=sys.stderr)
            return 1


def job(name: str) -> NoReturn:
    """The entry point of `jobs/<name>.py`."""
    sys.argv.insert(1, name)
    sys.exit(main())


@contextmanager
def _imports_from_here() -> Iterator[None]:
    """The folder where the user stands is importable, here and in Ray's workers, after all that is
    installed: a file `http.py` there must not replace Python's own module."""
    before = os.environ.get(ray_session.IMPORTS)
    with suppress(FileNotFoundError):  # the folder was removed
        os.environ[ray_session.IMPORTS] = os.getcwd()
    if "" not in sys.path:
        sys.path.append("")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(ray_session.IMPORTS, None)
        else:
            os.environ[ray_session.IMPORTS] = before


def _end_ray() -> None:
    ray_session.shutdown()


def _flush() -> None:
    """Meet a closed pipe here, where it is handled, and not at the exit of the process."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _unexpected(error: BaseException) -> str:
    """One sentence for an error that Mesocosm does not know; of what a Ray worker raised, its
    cause.
    """
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, BaseException) else error
    if (why := faults.reason(error)) is not None:
        return why
    line = " ".join(str(error).split())
    reason = f"{type(error).__name__}: {line[:300]}" if line else type(error).__name__
    return f"the command failed with {reason}"


def _traceback_file() -> str:
    """Write the traceback of the exception being handled to a file; returns words that name it."""
    try:
        handle, path = tempfile.mkstemp(prefix="mesocosm-traceback-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f"; the traceback is in {path}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    completion.answer(parser)
    known = [*JOBS, *TOOLS, "doctor"]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        raise UsageError(
            f"unknown command {arguments[0]!r}{nearest(arguments[0], known)}; see mesocosm --help"
        )
    options, rest = parser.parse_known_args(arguments)
    if strange := [word for word in rest if word.startswith("-")]:
        raise UsageError(
            f"unknown option {strange[0]!r}; see mesocosm {options.command or ''} --help"
        )
    if options.command is None:
        parser.print_help()
        sys.exit(2)
    if hasattr(options, "overrides"):
        options.overrides += rest  # overrides may stand before and after options
    elif rest:
        raise UsageError(
            f"{rest[0]!r} is more than {options.command} takes; see mesocosm {options.command}"
            " --help"
        )
    return options


def _run(options: argparse.Namespace) -> int:
    if options.command in TOOLS:
        return importlib.import_module(TOOLS[options.command]).run(options)
    if options.command == "doctor":
        from mesocosm.cli.doctor import doctor

        given = config.load(config.JobConfig, options.config, options.overrides)
        use_cache(given.storage.cache)
        return doctor(
            given, as_json=options.json, cluster=options.cluster, insecure=options.insecure
        )
    return _run_job(JOBS[options.command], options)


def _run_job(job: Job, options: argparse.Namespace) -> int:
    module = importlib.import_module(job.module)
    flags = [
        f"{key}={value}"
        for flag, key in FLAGS.get(options.command, {}).items()
        if (value := getattr(options, flag)) is not None
    ]
    if options.command in WORDS and "=" in options.overrides:
        raise UsageError("an override has spaces around its =; write key=value")
    words = [
        word for word in options.overrides if options.command in WORDS and not _is_override(word)
    ]
    overrides = [word for word in options.overrides if word not in words]
    loaded: config.JobConfig = config.load(
        getattr(module, job.schema), options.config, [*overrides, *flags]
    )
    if words:
        key = WORDS[options.command][0]
        setattr(loaded, key, [*getattr(loaded, key), *words])
    use_cache(loaded.storage.cache)
    if options.force:
        loaded.force = True
    if options.wait:
        loaded.wait = True
    if options.cluster is None:
        _preflight(loaded)
    if options.dry_run:
        plan = module.plan(loaded)
        if options.cluster is None and hasattr(module, "resources"):
            from mesocosm.jobs import preflight

            preflight.check_resources(loaded, module.resources(loaded))
        _show(plan, options.json)
        return 0
    if options.cluster is not None:
        return _submit(loaded, options)
    from mesocosm.runs import tracking
    from mesocosm.runs.upload import JOB

    with tracking.start(options.command, loaded, id=os.environ.get(JOB), quiet=options.json) as run:
        tracking.replay_in_background(loaded)
        try:
            made = module.run(loaded, run)
        except MesocosmError:
            raise
        except (Exception, SystemExit) as error:
            log = run.folder / "log.txt"
            raise MesocosmError(f"{_unexpected(error)}; the traceback is in {log}") from error
        facts = {"run": f"{run.job}/{run.id}", **run.facts}
        if made is not None:
            facts.update(artifact=made.name, path=str(made.path))
    if options.json:
        _show(facts, as_json=True)
    elif made is not None:
        tracking.console.print(f"{made.name}  {made.path}")
    return 0


def _preflight(loaded: config.JobConfig) -> None:
    """Check the storage and the tracking that the job needs until its end."""
    from mesocosm.jobs import preflight
    from mesocosm.runs import tracking

    for warning in preflight.check(loaded):
        tracking.console.print(f"warning: {warning}")


def _is_override(word: str) -> bool:
    """`key=value`, rather than the path of a file with = in its name."""
    return re.match(r"[A-Za-z_][\w.\[\]]*=", word) is not None and not os.path.exists(word)


def _submit(loaded: config.JobConfig, options: argparse.Namespace) -> int:
    """`JOB ... --cluster NAME`: exit status 0 where it was submitted, runs or has succeeded; with
    --follow 1 where it did not.
    """
    from mesocosm.cluster.submit import Asked, submit

    asked = Asked(
        follow=options.follow, yes=options.yes, insecure=options.insecure, as_json=options.json
    )
    found = submit(options.cluster, options.command, loaded, asked)
    if options.json:
        _show(found, as_json=True)
    return 1 if options.follow and found["state"] != "SUCCEEDED" else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mesocosm",
        description="The platform on which world models are scaled and put to work.",
        epilog="mesocosm JOB --help shows a job's keys and examples.",
    )
    parser.add_argument("--version", action="version", version=f"mesocosm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_JobParser)
    for name, job in JOBS.items():
        sub = commands.add_parser(name, help=job.help, description=job.help)
        sub.job = (name, job)
        common(sub, WORDS[name][1] if name in WORDS else None)
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="print what would happen, its size and its price, and do nothing",
        )
        for flag, key in FLAGS.get(name, {}).items():
            sub.add_argument(f"--{flag}", metavar=flag.upper(), help=f"the same as {key}=...")
        sub.add_argument(
            "--force", action="store_true", help="make the artifact again though it is there"
        )
        sub.add_argument(
            "--wait",
            action="store_true",
            help="wait for a process that makes the same artifact, instead of failing",
        )
        sub.add_argument(
            "--cluster",
            metavar="NAME",
            help=(
                "submit to clusters/NAME.yaml instead of running here; again: attach, or the next"
                " attempt"
            ),
        )
        sub.add_argument(
            "--follow",
            action="store_true",
            help="with --cluster: print what the job says until it is over",
        )
        sub.add_argument(
            "--yes", action="store_true", help="with --cluster: agree to what it costs"
        )
        sub.add_argument(
            "--insecure",
            action="store_true",
            help="with --cluster: talk to one that answers without a token",
        )
    for module in TOOLS.values():
        importlib.import_module(module).add(commands)
    looked = commands.add_parser(
        "doctor", help="is this machine ready, and its storage; with --cluster, is that cluster"
    )
    common(looked)
    looked.add_argument(
        "--cluster", metavar="NAME", help="look at clusters/NAME.yaml from inside, too"
    )
    looked.add_argument(
        "--insecure",
        action="store_true",
        help="with --cluster: talk to one that answers without a token",
    )
    return parser


def common(parser: argparse.ArgumentParser, word: str | None = None) -> None:
    """Arguments of whatever reads a config; `word`: what is taken beside its keys."""
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="a YAML config; may be repeated, later files win",
    )
    taken = (
        ("key=value", "override a config key")
        if word is None
        else (f"{word}|key=value", "a file, folder or pattern; or override a config key")
    )
    parser.add_argument("overrides", nargs="*", metavar=taken[0], help=taken[1])
    parser.add_argument("--json", action="store_true", help="machine-readable result on stdout")


class _JobParser(argparse.ArgumentParser):
    """Help ends with an example and the job's keys, read from its schema only when asked."""

    job: tuple[str, Job] | None = None

    def format_help(self) -> str:
        text = super().format_help()
        if self.job is None:
            return text
        name, job = self.job
        schema = getattr(importlib.import_module(job.module), job.schema)
        keys = "".join(f"  {line}\n" for line in config.describe(schema()))
        return f"{text}\nexample:\n  mesocosm {name} {job.example}\n\nkeys and defaults:\n{keys}"


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.write(json.dumps(facts, indent=1, default=str))
        return
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else None
        print(f"{key:<{width}}  {value}" if rows is None else _table(rows))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the same keys, in columns."""
    lines = [
        list(rows[0]),
        *(
            [f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()]
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return (
        "\n".join(
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in lines
        )
        + "\n"
    )
