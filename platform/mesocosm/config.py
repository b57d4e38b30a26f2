"""Configuration: dataclass defaults <- YAML files <- `key=value`. Unknown keys are errors.

A job's schema is a dataclass that extends `JobConfig`. OmegaConf composes it, and a job receives a
plain dataclass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mesocosm.errors import UsageError, nearest

T = TypeVar("T")
ADDED: Any = {"added": True}
"""Metadata of keys that ids leave out at their defaults (`identity`)."""


@dataclass
class StorageConfig:
    root: str = ".mesocosm"
    """A folder, or `s3://bucket/prefix`."""
    cache: str | None = None
    """The folder for this machine's copies of a remote root, in a subfolder that only you may read.
    Defaults to the temporary folder."""

    def __post_init__(self) -> None:
        self.root = os.path.expanduser(self.root)


@dataclass
class TrackingConfig:
    uri: str | None = None
    """An MLflow tracking URI, or `none` to disable MLflow. Defaults to a sqlite file under
    `storage.root`.
    """
    experiment: str = "mesocosm"


@dataclass
class RayConfig:
    address: str | None = None
    """An address for `ray.init`. By default a private local Ray starts."""
    cpus: int | None = None
    """Logical CPUs of a local Ray. Defaults to this machine's CPU count."""


@dataclass
class StopConfig:
    grace_s: float = 120.0
    """Seconds that `mesocosm jobs stop` gives a job to write a checkpoint and end."""


@dataclass
class JobConfig:
    """The keys of every job's config."""

    seed: int = 0
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    force: bool = False
    """Make the artifact again if it exists."""
    wait: bool = False
    """Wait for a process that makes the same artifact, instead of failing."""


WHERE = ("storage", "tracking", "ray", "stop", "force", "wait")
"""Top-level keys that decide where and how a job runs. They are not part of an artifact's id."""

EXPECTED = {
    "to Integer": "a whole number",
    "to Float": "a number",
    "to string": "text",
    "valid bool": "true or false",
    "Union[bool, str]": "true, false or text",
    "a ListConfig": "a list",
    "a subclass": "a block of keys",
    "to Dict": "a block of keys",
    "Optional": "set",
    "'None'": "set",
}
"""The type that a key must have, by a part of OmegaConf's message."""


def load(schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> T:
    """Compose the defaults of `schema`, `files` in order and `overrides` (`a.b=value`).

    Raises:
        UsageError: A file or override is wrong. It names the key, the value and the fix.
    """
    return cast(T, _compose(OmegaConf.structured(schema), files, overrides))


def override(config: T, overrides: Sequence[str]) -> T:
    """`config` with `overrides` (`a.b=value`). Raises UsageError as `load` does."""
    return cast(T, _compose(OmegaConf.structured(config), (), overrides))


def _compose(merged: DictConfig, files: Sequence[str | Path], overrides: Sequence[str]) -> Any:
    known = list(_known_keys(merged))
    _check_form(overrides, known)
    for path in files:
        merged = _merge(merged, read(path), f"config file {str(path)!r}", known)
    for override in overrides:
        source = f"override {override!r}"
        try:
            layer = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise UsageError(f"{source} cannot be parsed: {_one_line(error)}") from error
        merged = _merge(merged, layer, source, known)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "")
        raise UsageError(f"config key {key!r}: {_first_line(error)}") from error


def structured(schema: type[T], values: Mapping[str, Any], source: str) -> T:
    """`schema` with `values` in place of its defaults; `source` names their origin in errors."""
    base = OmegaConf.structured(schema)
    layer = OmegaConf.create(dict(values))
    return cast(T, OmegaConf.to_object(_merge(base, layer, source, list(_known_keys(base)))))


def read(path: str | Path) -> DictConfig:
    """A YAML file of keys. Raises UsageError where it cannot be read."""
    name = f"config file {str(path)!r}"
    try:
        layer = OmegaConf.load(path)
    except OSError as error:
        problem = f"{name} cannot be read ({error.strerror}); check the path given to -c"
        raise UsageError(problem) from error
    except Exception as error:
        raise UsageError(f"{name} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        kind = type(OmegaConf.to_container(layer)).__name__
        raise UsageError(f"{name} must hold `key: value` lines, got a {kind}")
    return layer


def _check_form(overrides: Sequence[str], known: Sequence[str]) -> None:
    """Raise UsageError for an override without =, or with spaces around it, which split it."""
    for i, override in enumerate(overrides):
        if "=" in override.lstrip("="):
            continue
        words = " ".join(overrides[max(i - 1, 0) : i + 3])
        for word in re.sub(" *= *", "=", words).split():
            if word not in words.split() and override.strip("=") in word:
                key = word.partition("=")[0]
                raise UsageError(f"override {key!r} has spaces around its =; write {word}")
        problem = f"override {override!r} is not of the form key=value"
        raise UsageError(f"{problem}{nearest(override, known)}")


def _merge(base: DictConfig, layer: Any, source: str, known: Sequence[str]) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, layer))
    except ConfigKeyError as error:
        key = str(error.full_key)
        problem = f"unknown config key {key!r}{_suggestion(key, layer, known)}"
        raise UsageError(f"{source}: {problem}") from error
    except OmegaConfBaseException as error:
        key, text = str(error.full_key), _first_line(error)
        value = getattr(error, "value", None)
        if not key:  # a value of another kind than the key's
            key, node, value = _mismatch(base, layer)
            expected = "a list" if isinstance(node, ListConfig) else "a block of keys"
        else:
            expected = next((EXPECTED[part] for part in EXPECTED if part in text), text)
        shown = repr(value).replace("None", "null") if expected == "set" else repr(value)
        fix = _example(base, key, expected, value, known)
        problem = f"config key {key!r} must be {expected}, got {shown}{fix}"
        raise UsageError(f"{source}: {problem}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source}: {_first_line(error)}") from error


def _example(base: DictConfig, key: str, expected: str, value: Any, known: Sequence[str]) -> str:
    """A value that the key accepts, for the end of an error message; "" if none is known."""
    if expected == "set":
        return f"; try {key}=VALUE"
    if isinstance(value, float) and value.is_integer():
        return f"; try {int(value)}"
    name = key.partition("[")[0]
    node = OmegaConf.select(base, name)
    if expected in ("a list", "a block of keys") and isinstance(node, ListConfig):
        has_blocks = dataclasses.is_dataclass(node._metadata.element_type)
        return f"; try '{name}=[{'{KEY: VALUE}' if has_blocks else value}]'"
    if expected == "a block of keys":
        first = next((other for other in known if other.startswith(f"{key}.")), f"{key}.NAME")
        return f"; try {first}=VALUE"
    return ""


def _mismatch(base: DictConfig, layer: DictConfig) -> tuple[str, Any, Any]:
    """The key at which `layer` cannot be merged into `base`, the node there, and the value."""
    for name, value in layer.items():
        name = str(name)
        node = base._get_node(name)
        try:
            OmegaConf.merge(base, {name: value})
        except OmegaConfBaseException:
            if isinstance(node, DictConfig) and isinstance(value, DictConfig):
                key, node, value = _mismatch(node, value)
                return f"{name}.{key}", node, value
            return name, node, value
    raise AssertionError("the layer can be merged")


def _suggestion(key: str, layer: Any, known: Sequence[str]) -> str:
    """The known keys that end as the unknown one does (`train.steps` in a loop is
    `pretrain.train.steps`), else the nearest.
    """
    node = OmegaConf.select(layer, key)
    while isinstance(node, DictConfig) and len(node) == 1:
        ((name, node),) = node.items()
        key = f"{key}.{name!s}"
    matches = sorted((n for n in known if n.endswith(f".{key}")), key=lambda n: n.count("."))
    if not matches:
        return nearest(key, known)
    return f"; did you mean {' or '.join(map(repr, matches[:3]))}?"


def _known_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """All keys of a schema. OmegaConf names a key inside a list by its last part."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _known_keys(child, f"{prefix}{key}.")
        elif isinstance(child, ListConfig):
            element = child._metadata.element_type
            if dataclasses.is_dataclass(element):
                yield from (f.name for f in dataclasses.fields(element))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass config as plain JSON-able dicts and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: Any, only: Sequence[str] = ()) -> str:
    """The config as YAML, or only those top-level keys."""
    plain = to_dict(config)
    return OmegaConf.to_yaml(OmegaConf.create({key: plain[key] for key in only or plain}))


def identity(config: JobConfig, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The config without the keys of WHERE and those in `without`, which may be dotted."""
    plain = to_dict(config)
    _drop_added(config, plain)
    for key in (*WHERE, *without):
        *blocks, last = key.split(".")
        node = plain
        for block in blocks:
            node = node[block]
        node.pop(last, None)
    return plain


def _drop_added(config: Any, plain: dict[str, Any]) -> None:
    """Drop the keys with the metadata ADDED that are at their defaults: ids are older."""
    for each in dataclasses.fields(config):
        value, default = getattr(config, each.name), each.default
        if each.default_factory is not dataclasses.MISSING:
            default = each.default_factory()
        if each.metadata.get("added") and value == default:
            del plain[each.name]
        elif dataclasses.is_dataclass(value):
            _drop_added(value, plain[each.name])


def fingerprint(*parts: Any) -> str:
    """16 hex digits that identify plain values: None, bool, int, float, str, lists, dicts and
    dataclasses.

    Raises:
        TypeError: A value has no stable identity.
    """
    stable = [_stable(part) for part in parts]
    text = json.dumps(stable, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _stable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"a mapping with non-string keys has no stable identity: {value!r}")
        return {key: _stable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no stable identity: {value!r}")
