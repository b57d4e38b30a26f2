"""Messages between a world's client and its replicas, as bytes without pickle.

A message is a flat dict of JSON scalars and numpy arrays (float32, int64, bool). Parts travel as
two arrays, `<name>.numbers` and `<name>.categories`. A world of texts has lists of strings in their
place, `<name>.texts`, and a context of `clock`, `member`, `task`, `start` and `steps`: for each
environment the list of [action, observation] since its episode's start.

    b"MSC2" | uint32 header length | header: JSON {"values": {...}, "arrays": [[name, dtype, shape],
    ...]} | arrays, each 8-byte aligned

Requests (`op`) and their replies, for B environments:

    describe  world                                    -> world, codec (JSON), memory, members,
                                                       planner (its size, or None)
    begin     session, world, seed, first_env, replaces, episode [B], start
                                                       -> observation, task
    step      session, clock, mode, episode [B], step [B], action, cut [B], disagreement,
              max_disagreement, start                  -> observation, reward, terminated, duration,
                                                       diverged (+ disagreement, task, final,
                                                       tokens)
    restore   session, world, seed, first_env, context.*
                                                       -> clock
    end       session                                  -> nothing
    plan      world, context.*, plan.*                 -> action, plan.*

The reply of a text world's step has `tokens` [B], the number that it generated.

A step's reply has `disagreement` [B] only if the request's `disagreement` is true. The members are
asked for it at several times the cost of the step, which is the same either way. With a finite
`max_disagreement` it must be true.

MSC1 had no field `disagreement`, and every step's reply had the array. A message of another version
is refused.

A request through Serve or its line also has a `number`, which its reply repeats.

Any reply may be {"error": message, "kind": "usage" | "failed" | "bug"}. A step's reply may be
{"missing": true}: the replica lacks the session at that clock, or took another step from it. The
client then sends `restore`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mesocosm.model.language.session import Texts
from mesocosm.model.tensors import Parts

Message = dict[str, Any]
AnyStarts = tuple[Parts, Parts] | tuple[Texts, Texts]
"""(task, observation) of logged starts."""
MAGIC = b"MSC2"
START = -1
"""The step in the random key of an episode's start; transitions count from 0."""
CONTEXT = "context."
"""Prefix of a context's arrays (`model.world.Context.to_numpy`) in a message."""
PLAN = "plan."
"""Prefix of a planner's state (`policies.planner.PlanState.to_numpy`) in a message."""
DTYPES: dict[str, np.dtype[Any]] = {"f": np.dtype("<f4"), "i": np.dtype("<i8"), "b": np.dtype("?")}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def pack(message: Mapping[str, Any]) -> bytes:
    """Encode a message.

    Raises:
        TypeError: An array has another dtype, or JSON has no such value.
    """
    values: dict[str, Any] = {}
    arrays: list[tuple[str, str, tuple[int, ...]]] = []
    chunks: list[bytes] = []
    for name, value in message.items():
        if not isinstance(value, np.ndarray):
            values[name] = value
            continue
        code = CODES.get(value.dtype)
        if code is None:
            raise TypeError(f"array {name!r} must be float32, int64 or bool, got {value.dtype}")
        arrays.append((name, code, value.shape))
        chunks += [value.tobytes(), bytes(-value.nbytes % 8)]
    header = json.dumps({"values": values, "arrays": arrays}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *chunks])


def unpack(data: bytes | bytearray) -> Message:
    """Decode a message. Its arrays are views of one writable copy.

    Raises:
        ValueError: `data` is not a message, or is damaged.
    """
    if len(data) >= 8 and data[:3] == MAGIC[:3] and data[:4] != MAGIC:
        fix = "use the same version of Mesocosm on both sides"
        raise ValueError(f"a message must have version {MAGIC!r}, got {bytes(data[:4])!r}; {fix}")
    if len(data) < 8 or data[:4] != MAGIC:
        raise ValueError(f"a message must begin with {MAGIC!r}, got {bytes(data[:4])!r}")
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    (length,) = struct.unpack_from("<I", buffer, 4)
    offset = 8 + length
    try:
        if offset > len(buffer):
            raise ValueError(f"its header alone has {length} bytes")
        header = json.loads(buffer[8:offset])
        message: Message = header["values"]
        if not isinstance(message, dict):
            raise ValueError(f"its values must be an object, got {type(message).__name__}")
        for name, code, shape in header["arrays"]:
            dtype: np.dtype[Any] = DTYPES[code]
            whole = all(type(size) is int and size >= 0 for size in shape)
            if not isinstance(name, str) or not whole:
                raise ValueError(f"array {name!r} has the shape {shape!r}")
            count = math.prod(shape)
            message[name] = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
            offset += -offset % 8
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"a damaged message of {len(buffer)} bytes: {error}") from error
    return message


def put(message: Message, name: str, parts: Parts | Texts) -> None:
    """Write parts (on any device) or texts into a message."""
    if isinstance(parts, Texts):
        message[f"{name}.texts"] = list(parts)
        return
    message[f"{name}.numbers"] = parts.numbers.numpy(force=True)
    message[f"{name}.categories"] = parts.categories.numpy(force=True)


def get(message: Message, name: str) -> Any:
    """The `Parts` of that name, which share memory with the message, or the `Texts`."""
    if f"{name}.texts" in message:
        return Texts(message[f"{name}.texts"])
    numbers, categories = message[f"{name}.numbers"], message[f"{name}.categories"]
    return Parts(torch.from_numpy(numbers), torch.from_numpy(categories))


def batch_rows(batch: Parts | Texts) -> int:
    """The number of rows of parts or texts."""
    return len(batch) if isinstance(batch, Texts) else len(batch.numbers)
