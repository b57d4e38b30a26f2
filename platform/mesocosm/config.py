"""The whole configuration system: dataclass defaults <- YAML files <- `key=value`, unknown keys
refused.

A job's schema is a dataclass that extends `JobConfig`. `load` composes it with OmegaConf and leaves
OmegaConf behind at the edge: what a job receives is a plain dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import (
    BooleanNode,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    OmegaConf,
    StringNode,
)
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mesocosm.errors import UsageError, nearest

T = TypeVar("T")


@dataclass
class StorageConfig:
    root: str = ".mesocosm"
    """A folder, or `s3://bucket/prefix`."""
    cache: str | None = None
    """The folder in which this machine keeps copies of a remote root, in a subfolder that only you
    may read. Defaults to the temporary folder."""

    def __post_init__(self) -> None:
        self.root = os.path.expanduser(self.root)


@dataclass
class TrackingConfig:
    uri: str | None = None
    """An MLflow tracking URI; None is a sqlite file under `storage.root`."""
    experiment: str = "mesocosm"


@dataclass
class RayConfig:
    address: str | None = None
    """None starts a private local Ray; otherwise an address as `ray.init` takes it."""
    cpus: int | None = None
    """Logical CPUs of a local Ray; None is the machine's own count."""


@dataclass
class StopConfig:
    grace_s: float = 120.0
    """Seconds that `mesocosm jobs stop` gives a job on a cluster to keep a checkpoint and end by
    itself.
    """


@dataclass
class JobConfig:
    """What every job's config holds. `storage`, `tracking`, `ray`, `stop` and `wait` say where and
    how, and are no part of an artifact's id.
    """

    seed: int = 0
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    force: bool = False
    """Make the artifact again though it is there."""
    wait: bool = False
    """Where another process makes the same artifact, wait for it instead of failing."""


WHERE = ("storage", "tracking", "ray", "stop", "force", "wait")
"""Top-level keys that say where a job runs rather than what it makes."""


def load(schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> T:
    """Compose `schema`'s defaults, then `files` in order, then `overrides` (`a.b=value`); later
    ones win.

    Raises UsageError naming the file or override, the key, its value and the nearest known key.
    """
    merged = cast(DictConfig, OmegaConf.structured(schema))
    known = _known_keys(schema)
    for path in files:
        try:
            layer = OmegaConf.load(path)
        except OSError as error:
            raise UsageError(
                f"config file {str(path)!r} cannot be read ({error.strerror}); check the path given"
                " to -c"
            ) from error
        except Exception as error:
            raise UsageError(
                f"config file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(layer, DictConfig):
            raise UsageError(
                f"config file {str(path)!r} holds a {type(OmegaConf.to_container(layer)).__name__},"
                " not `key: value` lines"
            )
        merged = _merge(merged, layer, f"config file {str(path)!r}", known)
    _check_spaces(overrides, known)
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise UsageError(
                f"override {override!r} is not of the form key=value{nearest(override, known)}"
            )
        try:
            layer = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise UsageError(
                f"override {override!r} cannot be parsed: {' '.join(str(error).split())}"
            ) from error
        merged = _merge(merged, layer, f"override {override!r}", known)
    try:
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UsageError(
            f"config key {getattr(error, 'full_key', '')!r}: {_first_line(error)}"
        ) from error


def _check_spaces(overrides: Sequence[str], known: Sequence[str]) -> None:
    """Raise UsageError for `key = value`, `key= value` and `key =value`, which a shell splits."""
    for first, second in itertools.pairwise(overrides):
        key, value = first.removesuffix("="), second.removeprefix("=")
        if key not in known or (not first.endswith("=") and not second.startswith("=")):
            continue
        if first.endswith("=") and "=" in second:
            continue  # an empty value, and another override
        if second == "=":
            value = next(iter(overrides[overrides.index("=") + 1 :]), "VALUE")
        raise UsageError(f"override {key!r} has spaces around its =; write {key}={value}")


def structured(schema: type[T], values: Mapping[str, Any], source: str) -> T:
    """`schema` with `values` in place of its defaults. Raises UsageError as `load` does; `source`
    says where they stand.
    """
    known = [f.name for f in dataclasses.fields(cast(Any, schema))]
    return cast(
        T,
        OmegaConf.to_object(
            _merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)), source, known)
        ),
    )


def _merge(base: DictConfig, layer: Any, source: str, known: Sequence[str]) -> DictConfig:
    _check_kinds(base, layer, source)
    try:
        return cast(DictConfig, OmegaConf.merge(base, layer))
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UsageError(
            f"{source}: unknown config key {key!r}{_suggestion(key, layer, known)}"
        ) from error
    except OmegaConfBaseException as error:
        value, reason = getattr(error, "value", None), _first_line(error)
        if isinstance(value, float) and value.is_integer() and "Integer" in reason:
            reason = f"a whole number is wanted; write {int(value)} instead of {value!r}"
        elif converted := re.fullmatch(
            r"Value (.*) of type '\w+' could not be converted to (\w+)", reason
        ):
            reason = f"must be a {'whole ' * (converted[2] == 'Integer')}number, got {converted[1]}"
        elif reason.startswith("Incompatible value 'None'") or reason.endswith("is not Optional"):
            reason = "has no value; give one, as in key=VALUE"
        elif boolean := re.fullmatch(r"Value (.*) is not a valid bool .*", reason):
            reason = f"must be true or false, got {boolean[1]}"
        raise UsageError(f"{source}: config key {error.full_key!r}: {reason}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{source}: {_first_line(error)}") from error


SCALARS = (BooleanNode, FloatNode, IntegerNode, StringNode)


def _check_kinds(base: DictConfig, layer: DictConfig, source: str, prefix: str = "") -> None:
    """Raise UsageError where a list, a block of keys or a single value is wanted and `layer` has
    another kind."""
    for name in layer:
        node, value = base._get_node(name, validate_access=False), layer._get_node(name)
        if node is None or value is None or value._is_interpolation() or value._is_none():
            continue  # unknown keys, references and nulls are OmegaConf's to judge
        key = prefix + str(name)
        block, listed = isinstance(value, DictConfig), isinstance(value, ListConfig)
        plain: Any = OmegaConf.to_container(value) if block or listed else value._value()
        if isinstance(node, ListConfig):
            element = node._metadata.element_type
            first = (
                dataclasses.fields(element)[0].name if dataclasses.is_dataclass(element) else None
            )
            if not listed:
                item = f"{{{first}: VALUE}}" if first else "VALUE" if block else plain
                example = f"write '{key}=[{item}]'"
                raise UsageError(f"{source}: {key} must be a list, got {plain!r}; {example}")
            for i, item in enumerate(plain if first else []):
                if not isinstance(item, dict):
                    problem = f"{key}[{i}] must be a block of keys, got {item!r}"
                    raise UsageError(f"{source}: {problem}; write '{key}=[{{{first}: {item}}}]'")
        elif isinstance(node, DictConfig) and not block:
            keys = [str(k) for k in node] if _is_block(node) else ["NAME"]
            shown = ", ".join(f"{key}.{k}" for k in keys[:3]) + ", ..." * (len(keys) > 3)
            raise UsageError(f"{source}: {key} is a block of keys, got {plain!r}; set {shown}")
        elif isinstance(node, DictConfig) and _is_block(node):
            _check_kinds(node, cast(DictConfig, value), source, f"{key}.")
        elif isinstance(node, SCALARS) and (block or listed):
            raise UsageError(f"{source}: {key} must be a single value, got {plain!r}")


def _is_block(node: DictConfig) -> bool:
    """Whether the keys of `node` are those of a dataclass."""
    return not node._is_none() and dataclasses.is_dataclass(node._metadata.object_type)


def _suggestion(key: str, layer: Any, known: Sequence[str]) -> str:
    """The known keys that end as the unknown one does (`train.steps` in a loop is
    `pretrain.train.steps`), else the nearest."""
    node = OmegaConf.select(layer, key)
    while isinstance(node, DictConfig) and len(node) == 1:
        name = str(next(iter(node)))
        key, node = f"{key}.{name}", node._get_node(name)
    ending = [name for name in known if name.endswith(f".{key}")]
    ending.sort(key=lambda name: name.count("."))
    if not ending:
        return nearest(key, known)
    *others, last = [repr(name) for name in ending[:3]]
    return f"; did you mean {', '.join(others)}{' or ' * bool(others)}{last}?"


def describe(config: Any, prefix: str = "", without: Sequence[str] = ()) -> list[str]:
    """One line a key of a dataclass, `key = value`, under the lines that say what it is for: the
    docstrings beside its fields.

    A job inside a job (the loop's stages) is shown without what it gets from the outer one.
    """
    lines: list[str] = []
    plain = to_dict(config)
    for field_name, text in _documented(type(config)).items():
        name, value = f"{prefix}{field_name}", getattr(config, field_name)
        if field_name in without:
            continue
        lines += textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="# ")
        if dataclasses.is_dataclass(value):
            shared = (*_documented(JobConfig), "reality") if isinstance(value, JobConfig) else ()
            lines += describe(value, f"{name}.", shared)
        else:
            lines.append(f"{name} = {json.dumps(plain[field_name])}")
    return lines


def _documented(schema: type[Any]) -> dict[str, str]:
    """Each field's name, with the string literal that follows it in the source of its class."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                comments[node.target.id] = " ".join(str(after.value.value).split())
    return {f.name: comments.get(f.name, "") for f in dataclasses.fields(schema)}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _known_keys(schema: type[Any]) -> list[str]:
    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key in node:
            full = f"{prefix}{key}"
            yield full
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                yield from walk(child, full + ".")
            elif isinstance(child, ListConfig) and dataclasses.is_dataclass(
                element := child._metadata.element_type
            ):
                yield from (
                    f.name for f in dataclasses.fields(element)
                )  # OmegaConf names a key inside a list by its last part

    return list(walk(OmegaConf.structured(schema), ""))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass config as plain JSON-able dicts and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: Any, only: Sequence[str] = ()) -> str:
    """The config as YAML; with `only`, those of its top-level keys."""
    plain = to_dict(config)
    return OmegaConf.to_yaml(OmegaConf.create({key: plain[key] for key in only or plain}))


def identity(config: JobConfig, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The part of a config that says *what* is made: without `storage`, `tracking`, `ray` and the
    keys in `without` (dotted where nested).
    """
    found = to_dict(config)
    for key in (*WHERE, *without):
        *blocks, last = key.split(".")
        node = found
        for block in blocks:
            node = node[block]
        node.pop(last, None)
    return found


def fingerprint(*parts: Any) -> str:
    """16 hex digits that identify plain values (None, bool, int, float, str, lists, dicts,
    dataclasses).

    Raises TypeError on anything without a stable identity, rather than hashing its `repr`.
    """
    text = json.dumps(
        [_stable(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False
    )
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
