"""Users' modules and functions by name: environments, behaviours and known parts of a world."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesocosm.errors import UsageError, nearest
from mesocosm.extras import fix_missing

IMPORTS = "MESOCOSM_IMPORTS"
"""The environment variable with the user's folder, from which their modules are imported."""


def import_module(name: str, setting: str) -> Any:
    """Import a user's module; the current directory is importable.

    Args:
        name: The module's dotted name.
        setting: The config key and value, for the UsageError.

    Raises:
        UsageError: There is no such module, or it fails on import.
    """
    _add_folders()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _missing(error.name, setting) from error
        problem = f"module {name!r} needs {error.name!r}, which is not installed"
        raise UsageError(f"{setting}: {problem}") from error
    except (Exception, SystemExit) as error:
        problem = f"module {name!r} fails on import ({type(error).__name__}: {one_line(error)})"
        raise UsageError(f"{setting}: {problem}") from error


def module_path(name: str, setting: str) -> Path:
    """The Python file of a user's module, which is not imported (the packages that hold it are).

    Raises:
        UsageError: There is no such module, or it is not a Python file.
    """
    _add_folders()
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise _missing(name, setting) from error
    if spec is None:
        raise _missing(name, setting)
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UsageError(f"{setting}: module {name!r} must be a Python file, got {spec.origin}")
    return Path(spec.origin)


def _add_folders() -> None:
    here = os.getcwd()
    for folder in (here, os.environ.get(IMPORTS, here)):
        if folder not in sys.path:
            sys.path.append(folder)  # last: a user's http.py must not replace Python's own module


def _missing(name: str, setting: str) -> UsageError:
    return UsageError(
        f"{setting}: there is no module {name!r} in {os.getcwd()!r} or among the installed"
        f" packages; {fix_missing(name) or 'check its name'}"
    )


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function `module:function` of a user.

    Args:
        name: `module:function`.
        setting: The config key and value, for the UsageError.

    Raises:
        UsageError: The name has another form, or there is no such function.
    """
    module_name, attribute = split_name(name, setting)
    module = import_module(module_name, setting)
    function = getattr(module, attribute, None)
    if not callable(function):
        hint = nearest(attribute, [name for name, value in vars(module).items() if callable(value)])
        raise UsageError(f"{setting}: module {module_name!r} has no function {attribute!r}{hint}")
    result: Callable[..., Any] = function
    return result


def split_name(name: str, setting: str) -> tuple[str, str]:
    """(module, function) of `module:function`. Raises UsageError for another form."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{setting} must have the form module:function")
    return module_name, attribute


def source_hash(definition: Any) -> str:
    """16 hexadecimal digits of the sha256 of the file that defines a class or function; "unknown"
    where there is no such file.
    """
    try:
        path = inspect.getsourcefile(definition)
        data = None if path is None else Path(path).read_bytes()
    except (OSError, TypeError):
        data = None
    return "unknown" if data is None else bytes_hash(data)


def bytes_hash(data: bytes) -> str:
    """16 hexadecimal digits of the sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def one_line(error: BaseException) -> str:
    """The error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
