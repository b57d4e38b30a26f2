"""The messages between a world's client and its replicas: plain numbers and arrays, as bytes, never
pickle.

A message is a flat dict of JSON scalars and numpy arrays (float32, int64, bool). Parts travel as
two arrays, `<name>.numbers` and `<name>.categories`.

    b"MSC1" | uint32 header length | header: JSON {"values": {...}, "arrays": [[name, dtype, shape],
    ...]} | arrays, each 8-byte aligned

Requests (`op`) and their replies, for B environments:

    describe  world                                    -> world, codec (JSON), memory, members
    begin     session, world, seed, first_env, replaces, episode [B], start
                                                       -> observation, task
    step      session, clock, mode, episode [B], step [B], action, cut [B], max_disagreement, start
                                                       -> observation, reward, terminated, duration,
                                                       disagreement (+ task, final)
    restore   session, world, seed, first_env, context.*
                                                       -> clock
    end       session                                  -> nothing

A request through Serve or its line carries `number` besides, which its reply repeats.

Any reply may be {"error": sentence, "kind": "usage" | "failed" | "bug"} or, to a step, {"missing":
true}: this replica has no such session at that clock, or took another step from there: restore it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mesocosm.model.spec import Parts

Message = dict[str, Any]
MAGIC = b"MSC1"
CONTEXT = "context."
"""Prefix of a context's arrays (`model.world.Context.to_numpy`) in a message."""
DTYPES: dict[str, np.dtype[Any]] = {"f": np.dtype("<f4"), "i": np.dtype("<i8"), "b": np.dtype("?")}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def pack(message: Mapping[str, Any]) -> bytes:
    """The message as bytes. Raises TypeError on an array of another dtype, or a value that JSON
    does not know.
    """
    values: dict[str, Any] = {}
    arrays: list[tuple[str, str, tuple[int, ...]]] = []
    chunks: list[bytes] = []
    for name, value in message.items():
        if isinstance(value, np.ndarray):
            code = CODES.get(value.dtype)
            if code is None:
                raise TypeError(
                    f"array {name!r} has dtype {value.dtype}; a message carries float32, int64 and"
                    " bool"
                )
            arrays.append((name, code, value.shape))
            data = value.tobytes()
            chunks.append(data)
            if len(data) % 8:
                chunks.append(bytes(-len(data) % 8))
        else:
            values[name] = value
    header = json.dumps({"values": values, "arrays": arrays}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *chunks])


def unpack(data: bytes | bytearray) -> Message:
    """The message in `data`; its arrays are views of one writable copy. Raises ValueError on
    anything else.
    """
    if len(data) < 8 or data[:4] != MAGIC:
        raise ValueError(
            f"not a message of this protocol: it begins with {bytes(data[:4])!r} instead of"
            f" {MAGIC!r}"
        )
    buffer = data if isinstance(data, bytearray) else bytearray(data)
    (length,) = struct.unpack_from("<I", buffer, 4)
    if 8 + length > len(buffer):
        raise ValueError(f"a damaged message of {len(buffer)} bytes: its header alone is {length}")
    try:
        header = json.loads(buffer[8 : 8 + length])
        message: Message = header["values"]
        if not isinstance(message, dict):
            raise ValueError(f"its values are a {type(message).__name__}, not an object")
        offset = 8 + length
        for name, code, shape in header["arrays"]:
            dtype: np.dtype[Any] = DTYPES[code]
            count = 1
            for size in shape:
                if type(size) is not int or size < 0 or not isinstance(name, str):
                    raise ValueError(f"array {name!r} has the shape {shape!r}")
                count *= size
            message[name] = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
            offset += -offset % 8
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"a damaged message of {len(buffer)} bytes: {error}") from error
    return message


def put(message: Message, name: str, parts: Parts) -> None:
    """Write parts (on any device) into a message."""
    message[f"{name}.numbers"] = parts.numbers.numpy(force=True)
    message[f"{name}.categories"] = parts.categories.numpy(force=True)


def get(message: Message, name: str) -> Parts:
    """The parts of that name, sharing memory with the message."""
    return Parts(
        torch.from_numpy(message[f"{name}.numbers"]),
        torch.from_numpy(message[f"{name}.categories"]),
    )
