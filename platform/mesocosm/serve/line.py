"""The replica's end of a line: a TCP socket for clients that know its token.

A client sends the token as its first frame. The server acknowledges it with an empty frame, and
then answers request frames one at a time until the client closes the socket.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable

from mesocosm.serve.connection import receive_frame, send_frame

logger = logging.getLogger(__name__)
TOKEN = 32
"""Bytes of the token, and the most that a client may send before it is authenticated"""
TOKEN_S = 10.0
"""Seconds in which a client must send its whole token"""
PAUSE_S = 1.0
"""Seconds between attempts to accept while no file descriptor or thread is free"""


class LineServer:
    """Listens on a free port until `close`, with one thread per client."""

    def __init__(self, host: str, answer: Callable[[bytearray], bytes]):
        """`answer` maps a request to its reply and must not raise."""
        self.token = secrets.token_bytes(TOKEN)
        self._answer = answer
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._closed = False
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    def close(self) -> None:
        """Accept no more clients. Connected clients stay."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        """Accept clients. Without a free file descriptor or thread, wait; clients then call through
        Serve.
        """
        while not self._closed:
            line: socket.socket | None = None
            try:
                line, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(line,), name="line", daemon=True).start()
            except (OSError, RuntimeError) as error:
                if line is not None:
                    line.close()
                if not self._closed:
                    logger.warning("a line cannot be accepted (%s); raise ulimit -n or -u", error)
                    time.sleep(PAUSE_S)

    def _serve(self, line: socket.socket) -> None:
        with line, contextlib.suppress(OSError):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            token = receive_frame(line, TOKEN, time.monotonic() + TOKEN_S)
            if token is None or not hmac.compare_digest(token, self.token):
                return
            line.settimeout(None)
            send_frame(line, b"")
            while (data := receive_frame(line)) is not None:
                send_frame(line, self._answer(data))
