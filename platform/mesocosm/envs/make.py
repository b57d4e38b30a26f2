"""Environments of reality by name, their properties and tasks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from mesocosm.config import fingerprint
from mesocosm.datasets.bounds import Clipped
from mesocosm.datasets.manifest import current_id
from mesocosm.datasets.masks import has_mask
from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.envs.api import Env, close
from mesocosm.envs.config import RealityConfig, check
from mesocosm.envs.masked import MaskedEnv
from mesocosm.envs.remote import PREFIX, RemoteEnv
from mesocosm.envs.shared_names import SharedNames
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.store.files import cache_folder, make_folder, write_whole
from mesocosm.user_code import import_module, one_line, source_hash

SLOW_S = 2.0
"""Seconds from which an environment counts as slow to make."""


def make_env(config: RealityConfig) -> Env:
    """The environment of `reality.env`, with its kwargs and horizon.

    `module:Id` imports the module (the current directory is importable) and uses the id that it
    registers, or else the class or function of that name. `openenv:URL` is the environment at that
    address.

    Raises:
        UsageError: The environment does not exist, its module cannot be imported, it does not take
            the keyword arguments, or it does not have the task.
    """
    check(config)
    setting = f"reality.env={config.env!r}"
    module_name, _, name = current_id(config.env).rpartition(":")
    remote = config.env.startswith(PREFIX)
    module = import_module(module_name, setting) if module_name and not remote else None
    registered = name in gymnasium.registry
    if not remote and not registered and (module is None or not hasattr(module, name)):
        raise _unknown(config.env, name, module)
    try:
        env: Any
        if registered:
            limit: dict[str, Any] = {
                "max_episode_steps": config.horizon,
                "disable_env_checker": True,
            }
            env = gymnasium.make(name, **limit, **config.kwargs)
        else:
            if remote:
                env = RemoteEnv(config.env.removeprefix(PREFIX), **config.kwargs)
            else:
                env = getattr(module, name)(**config.kwargs)
            if not isinstance(env, gymnasium.Env):
                raise UsageError(
                    f"{setting} gave a {type(env).__name__}, not a gymnasium.Env; name a class or"
                    " function that makes one"
                )
            if config.horizon is not None:
                env = gymnasium.wrappers.TimeLimit(env, config.horizon)
    except UsageError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        problem = f"{setting} needs a package that is not installed"
        raise UsageError(f"{problem}: {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{setting} cannot be made with reality.kwargs={dict(config.kwargs)!r}"
            f" ({type(error).__name__}: {one_line(error)}); correct them"
        ) from error
    keys = task_keys(config, env.observation_space)
    if shared := [name for name in keys if name in config.task_options]:
        env = SharedNames(env, shared)
    if has_mask(env.observation_space):
        env = MaskedEnv(env)
    return Clipped(env) if config.bounds == "clip" else env


@dataclass(frozen=True)
class EnvFacts:
    """The properties of an environment that are known without a step."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    version: str
    """`environment_version`: part of the id of whatever was measured in it."""
    max_episode_steps: int | None
    """The time limit of an episode; None if neither the config nor the environment sets one."""

    @property
    def spaces(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        """(observation space, action space)"""
        return self.observation_space, self.action_space

    def to_json(self) -> dict[str, Any]:
        """Raises UsageError where a space has no JSON."""
        return {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "version": self.version,
            "max_episode_steps": self.max_episode_steps,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> EnvFacts:
        """The inverse of `to_json`."""
        observation, action = (
            space_from_json(data[f"{name}_space"]) for name in ("observation", "action")
        )
        return EnvFacts(observation, action, data["version"], data["max_episode_steps"])


def facts_of(config: RealityConfig) -> EnvFacts:
    """Make the environment, inspect it and close it. Raises UsageError as `make_env` does.

    One that takes SLOW_S or longer (it starts a simulator or a browser) is made once on this
    machine: its facts stay in the user's cache folder, for its version, the Python files of its
    folder, and its arguments.
    """
    check(config)
    path = _cached_facts(config)
    if path is not None and (facts := _read_facts(path)) is not None:
        task_keys(config, facts.observation_space)
        return facts
    began = time.monotonic()
    env = make_env(config)
    try:
        limit = config.horizon
        if limit is None and env.spec is not None:
            limit = env.spec.max_episode_steps
        facts = EnvFacts(env.observation_space, env.action_space, environment_version(env), limit)
    finally:
        close(env)
    if path is not None and time.monotonic() - began >= SLOW_S:
        with suppress(OSError, UsageError):  # the facts are known; the next job makes it again
            make_folder(path.parent)
            write_whole(path, json.dumps(facts.to_json()).encode())
    return facts


def _cached_facts(config: RealityConfig) -> Path | None:
    """The file with the facts of an environment. None if its class, and so its version, is known
    only after it is made.
    """
    module_name, _, name = current_id(config.env).rpartition(":")
    if config.env.startswith(PREFIX):
        return None
    module = import_module(module_name, f"reality.env={config.env!r}") if module_name else None
    kind: Any = getattr(module, name, None)
    registered: Any = None
    if name in gymnasium.registry:
        spec = gymnasium.registry[name]
        kind, registered = spec.entry_point, (spec.max_episode_steps, spec.kwargs)
        if isinstance(kind, str):
            module_name, _, attribute = kind.partition(":")
            try:
                kind = getattr(importlib.import_module(module_name), attribute, None)
            except Exception:
                return None  # `make_env` reports it
    if not inspect.isclass(kind) or issubclass(kind, gymnasium.Wrapper):
        return None
    try:
        sources = sorted(Path(inspect.getfile(kind)).parent.glob("*.py"))
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
        settings = config.env, dict(config.kwargs), config.horizon, config.bounds, registered
        plain = json.loads(json.dumps([*settings, _version(kind), digests]))
        return cache_folder() / "spaces" / f"{fingerprint('spaces', plain)}.json"
    except (TypeError, ValueError, OSError, UsageError):
        return None  # a class without a file, an argument without a stable identity, or no cache
    except gymnasium.error.DependencyNotInstalled:
        return None  # `make_env` reports it


def _read_facts(path: Path) -> EnvFacts | None:
    """The facts in a file; None if this version can read none."""
    try:
        return EnvFacts.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, MesocosmError):
        return None


def _unknown(env: str, name: str, module: Any) -> UsageError:
    if module is not None:
        values = vars(module).items()
        classes = [n for n, v in values if inspect.isclass(v) and issubclass(v, gymnasium.Env)]
        where = f" ({path})" if (path := getattr(module, "__file__", None)) else ""
        return UsageError(
            f"reality.env={env!r}: module {module.__name__!r}{where} neither registers nor defines"
            f" {name!r}{nearest(name, [*classes, *gymnasium.registry])}"
        )
    base = name.rsplit("-v", 1)[0].lower()
    versions = [id for id in gymnasium.registry if id.rsplit("-v", 1)[0].lower() == base]
    hint = nearest(versions[-1] if versions else name, gymnasium.registry)
    problem = f"reality.env={env!r} does not exist: no environment of that id is registered"
    return UsageError(f"{problem}{hint}")


def environment_version(env: Env) -> str:
    """The version of the environment's package, or the hash of a single module's source, the hashes
    of those files of its classes that are Mesocosm's own, and the versions of the programs that its
    class lists (`program_versions`). A server at an address names its version.
    """
    if isinstance(env.unwrapped, RemoteEnv):
        return env.unwrapped.environment_version
    return _version(type(env.unwrapped))


def _version(kind: type) -> str:
    names = [kind.__module__.partition(".")[0]]
    classes = [f"{base.__module__}.{base.__qualname__}".lower() for base in kind.__mro__]
    if any("mujoco" in name for name in classes) and names != ["mujoco"]:
        names.append("mujoco")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{kind.__module__} {source_hash(kind)}")
    ours = [base for base in kind.__mro__ if base.__module__.startswith("mesocosm.")]
    versions += [f"{base.__module__} {source_hash(base)}" for base in ours]
    programs = kind.program_versions() if hasattr(kind, "program_versions") else []
    return ", ".join([*versions, *programs])


def task_keys(config: RealityConfig, observation_space: gymnasium.Space[Any]) -> list[str]:
    """The names of `reality.task` that are keys of the observation (dotted where nested).

    The other names are reset options. A name may be both, with one value (`SharedNames`). Raises
    UsageError on a name that is neither.
    """
    keys = _keys(observation_space)
    for name in config.task:
        if name not in keys and name not in config.task_options:
            raise UsageError(
                f"reality.task names {name!r}, which must be a key of the observation ({keys})"
                f" or have reality.task_options.{name} to draw it"
                f" from{nearest(name, [*keys, *config.task_options])}; draw it, or leave it out and"
                " set reality.env, whose own task is then drawn"
            )
    return [name for name in config.task if name in keys]


def _keys(space: gymnasium.Space[Any], prefix: str = "") -> list[str]:
    children: Any = ()
    if isinstance(space, gymnasium.spaces.Dict):
        children = space.spaces.items()
    elif isinstance(space, gymnasium.spaces.Tuple) and prefix:
        children = enumerate(space.spaces)
    keys = []
    for name, child in children:
        keys += [f"{prefix}{name}", *_keys(child, f"{prefix}{name}.")]
    return keys


def draw_options(config: RealityConfig, rng: np.random.Generator) -> dict[str, Any]:
    """The reset options of one episode, in the order of `reality.task`.

    A float among the choices makes all of them floats: the kind of an option does not depend on the
    draw.
    """
    options: dict[str, Any] = {}
    for name in config.task:
        option = config.task_options.get(name)
        if option is None:
            continue
        if option.choices is not None:
            value = option.choices[int(rng.integers(len(option.choices)))]
            real = any(isinstance(choice, float) for choice in option.choices)
            options[name] = float(value) if real else value
        else:
            assert option.low is not None and option.high is not None
            options[name] = float(rng.uniform(option.low, option.high))
    return options
