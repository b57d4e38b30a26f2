"""A client of `/ws`, and openenv's own client where that package is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect


class Socket:
    """One connection to the `/ws` of an ingress, message by message."""

    def __init__(self, client: Any):
        address = client.url.replace("http://", "ws://") + "/ws"
        headers = {"Authorization": f"Bearer {client.token}"}
        self.connection = connect(address, additional_headers=headers, open_timeout=300)

    def send(self, message: Any) -> Any:
        """The reply to a message, or to the text itself."""
        text = message if isinstance(message, str) else json.dumps(message)
        self.connection.send(text)
        return self.receive()

    def receive(self) -> Any:
        return json.loads(self.connection.recv(timeout=300))

    def reset(self, **data: Any) -> Any:
        return self.answered("observation", {"type": "reset", "data": data})

    def step(self, text: Any) -> Any:
        return self.answered("observation", {"type": "step", "data": {"text": text}})

    def state(self) -> Any:
        return self.answered("state", {"type": "state"})

    def answered(self, kind: str, message: Any) -> Any:
        reply = self.send(message)
        assert reply["type"] == kind, reply
        return reply["data"]

    def error(self, message: Any) -> tuple[str, str]:
        """The code and the message of the error that a message gets."""
        reply = self.send(message)
        assert list(reply) == ["type", "data"] and reply["type"] == "error", reply
        return reply["data"]["code"], reply["data"]["message"]

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: Any) -> None:
        self.connection.close()


@lru_cache
def own_client() -> Any:
    """The module `openenv.core.generic_client` of the package openenv, unchanged.

    The package's __init__ modules import its server, and with it fastmcp and gradio, which the
    client does not use: packages without them take their place. Skips the test where openenv is not
    installed (`pip install --no-deps openenv==0.10.0`).
    """
    spec = importlib.util.find_spec("openenv")
    if spec is None or spec.origin is None:
        pytest.skip("openenv is not installed")
    folder = Path(spec.origin).parent
    for name, path in (("openenv", folder), ("openenv.core", folder / "core")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    return importlib.import_module("openenv.core.generic_client")
