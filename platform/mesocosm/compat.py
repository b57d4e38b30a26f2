"""Changes to Ray's internals, each with its reason and the tested versions of Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

TESTED_RAY = "2.60."


@contextmanager
def private_start() -> Iterator[None]:
    """Around the `ray.init` that starts a private Ray.

    Ray's daemons get process groups of their own: `timeout`, Slurm and terminals signal the whole
    group of a job, and a job cannot end its Ray well once the daemons are gone. They still die with
    this process (PR_SET_PDEATHSIG). Ray's Python handler of SIGTERM is not installed: it calls
    `sys.exit` in the middle of `ray.init`, which leaves daemons behind.
    """
    import ray
    from ray._private import services, utils

    if not ray.__version__.startswith(TESTED_RAY) or sys.platform == "win32":
        yield
        return
    popen, set_handler = services.ConsolePopen, utils.set_sigterm_handler
    modules: Any = (services, utils)
    modules[0].ConsolePopen = partial(popen, process_group=0)
    modules[1].set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        modules[0].ConsolePopen, modules[1].set_sigterm_handler = popen, set_handler


def job_config_of_command_line() -> Any:
    """A JobConfig with which Ray's workers do not put the driver's folder first in `sys.path`.

    With Ray's default a file `http.py` beside the user replaces Python's own module in every
    worker. `mesocosm.user_code.import_module` appends the folder instead.
    """
    from ray.job_config import JobConfig

    class CommandLineJobConfig(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return CommandLineJobConfig()
