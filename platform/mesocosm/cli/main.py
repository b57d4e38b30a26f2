"""The command line: `mesocosm JOB -c FILE key=value ...`.

Exit status: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn

import click

from mesocosm import __version__, output, signals, user_code
from mesocosm.cli.cluster import cluster
from mesocosm.cli.completion import complete, completion
from mesocosm.cli.configs import configs
from mesocosm.cli.data import data
from mesocosm.cli.doctor import doctor
from mesocosm.cli.fit import fit
from mesocosm.cli.job_command import JobCommand, describe_error
from mesocosm.cli.jobs import jobs
from mesocosm.cli.storage import storage
from mesocosm.cluster import ray_session
from mesocosm.errors import MesocosmError
from mesocosm.extras import fix_missing
from mesocosm.jobs.registry import JOBS


class Commands(click.Group):
    """Commands in the order in which they were added."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="mesocosm JOB --help shows a job's keys and an example.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """The platform on which world models are scaled and put to work."""


for name, registered in JOBS.items():
    commands.add_command(JobCommand(name, registered))
for tool in (fit, cluster, jobs, data, storage, configs, doctor, completion):
    commands.add_command(tool)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, and return the exit status.

    Without `argv` the words are those of this process, which is assumed to end with the command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Gymnasium's advice to authors of environments.
    warnings.filterwarnings("ignore", message=".*WARN: ")
    with signals.end_like_interrupt(), _import_from_here():
        try:
            # An environment may print while the command starts.
            as_json = "--json" in words and not {"-h", "--help"} & {*words}
            with output.results_only(for_good=argv is None) if as_json else nullcontext():
                try:
                    complete(commands)
                    with commands.make_context("mesocosm", words) as context:
                        return commands.invoke(context) or 0
                finally:
                    ray_session.shutdown()
                    if sys.stdout is not None:
                        sys.stdout.flush()  # a closed pipe raises here, not at exit
        except click.exceptions.Exit as end:  # --help, --version
            return end.exit_code
        except click.exceptions.NoArgsIsHelpError as error:
            print(error.format_message())
            return 2
        except BrokenPipeError:  # `mesocosm data list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 1
        except (Exception, KeyboardInterrupt) as error:
            status, message = _explain(error)
            print(message, file=sys.stderr)
            return status


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the message of an error."""
    if isinstance(error, click.UsageError):
        message = " ".join(error.format_message().split())
        command = error.ctx.command_path if error.ctx else "mesocosm"
        return 2, f"mesocosm: {message} See {command} --help."
    if isinstance(error, MesocosmError):
        return error.exit_code, f"mesocosm: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "mesocosm: interrupted; run the same command again to continue"
    if isinstance(error, ModuleNotFoundError) and (fix := fix_missing(error.name)):
        return 2, f"mesocosm: the package {error.name} is not installed; {fix}"
    return 1, f"mesocosm: {describe_error(error)}{_write_traceback(error)}"


def job(name: str) -> NoReturn:
    """The entry point of `jobs/NAME.py`."""
    sys.argv.insert(1, name)
    sys.exit(main())


@contextmanager
def _import_from_here() -> Iterator[None]:
    """Make the user's folder importable, here and in Ray's workers.

    It comes after everything installed: a file `http.py` there must not replace Python's module.
    """
    before = os.environ.get(user_code.IMPORTS)
    with suppress(FileNotFoundError):  # the folder was removed
        os.environ[user_code.IMPORTS] = os.getcwd()
    if "" not in sys.path:
        sys.path.append("")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(user_code.IMPORTS, None)
        else:
            os.environ[user_code.IMPORTS] = before


def _write_traceback(error: BaseException) -> str:
    """Write an error's traceback to a file; returns the end of the message."""
    try:
        handle, path = tempfile.mkstemp(prefix="mesocosm-traceback-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return ""
    return f"; the traceback is in {path}"


if __name__ == "__main__":
    sys.exit(main())
