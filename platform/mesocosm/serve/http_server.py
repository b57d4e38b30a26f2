"""An HTTP server on this machine's loopback, in a thread of the process that starts it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from mesocosm.errors import UsageError
from mesocosm.serve.connection import LOOPBACK
from mesocosm.serve.http_connection import HttpConnection, serve
from mesocosm.serve.http_guard import LARGEST_JSON

PING_S = 20.0
"""Seconds between two pings of a WebSocket, and in which a client must answer one"""


class LoopbackServer:
    """A bound port of the loopback address. It answers no requests until `start`.

    Args:
        port: 0 for any free one.
        key: The config key of the port, for messages.

    Raises:
        UsageError: The port is not available.
    """

    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None

    def __init__(self, port: int, key: str):
        try:
            self._socket = socket.create_server((LOOPBACK, port), backlog=128)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is taken" if taken else f"cannot be opened ({error.strerror})"
            fix = f"set {key} to another one, or to 0 for any free one"
            raise UsageError(f"{key}={port}: the port {reason} on {LOOPBACK}; {fix}") from error
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"

    @property
    def alive(self) -> bool:
        """True while the server answers."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, app: ASGIApp) -> None:
        """Answer by `app`."""
        # The log level: uvicorn would log bugs twice, and the broken requests of strangers.
        options: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        options |= {"http": HttpConnection, "lifespan": "off", "server_header": False}
        options |= {"ws": "websockets-sansio", "ws_max_size": LARGEST_JSON}
        options |= {"ws_ping_interval": PING_S, "ws_ping_timeout": PING_S}
        options["ws_per_message_deflate"] = False
        config = uvicorn.Config(app, timeout_graceful_shutdown=5, **options)
        self._server = uvicorn.Server(config)
        running = serve(self._server, self._socket)
        self._thread = threading.Thread(target=asyncio.run, args=(running,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Requests that are being answered have a few seconds to finish."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(10.0)
        with contextlib.suppress(OSError):
            self._socket.close()
