"""HTTP connections with a time limit: uvicorn 0.54 waits forever for a request's head.

A connection waits while it has no request with the token: for at most `HEAD_S` seconds, or
`KEEP_ALIVE_S` after a request with the token, since an agent may think long between two steps. When
`CONNECTIONS` are open, a new one replaces the one that has waited longest.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

logger = logging.getLogger(__name__)
CONNECTIONS = 256
"""Connections at once, and requests with the token at once"""
HEAD_S = 10.0
"""Seconds from a connection's opening, or its last refusal, to a request with the token"""
KEEP_ALIVE_S = 300.0
"""Seconds from the reply to a request with the token to the connection's next request"""
REPORT_S = 60.0
"""Seconds between log lines about a lack of file descriptors"""
GRACE_S = 0.1
"""Seconds after which a connection beyond `CONNECTIONS` replaces the longest waiting one: by then a
client that sent its whole head at once is not waiting
"""


def admit(scope: Scope) -> None:
    """Mark a request as one with the token: its connection is not waiting until the reply."""
    scope.setdefault("state", {})["admitted"] = True


async def serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """Answer on `listener` until `server.should_exit`, also through a lack of file descriptors.

    asyncio retries to accept and reports each attempt with a traceback, hundreds of them a second
    (python/cpython#151615). Here they are one line in `REPORT_S` seconds.
    """
    reported = -REPORT_S

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal reported
        error = context.get("exception")
        if isinstance(error, ValueError) and listener.fileno() < 0:
            return  # asyncio retries once more after the listener is closed
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - reported >= REPORT_S:
            reported = loop.time()
            logger.warning("the HTTP ingress has no free file descriptor; raise ulimit -n")

    asyncio.get_running_loop().set_exception_handler(report)
    await server.serve(sockets=[listener])


class HttpConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with the limits of this module and errors in JSON."""

    _deadline: asyncio.TimerHandle | None = None
    _since = 0.0

    @property
    def _admitted(self) -> bool:
        """True if the latest request has the token."""
        return self.cycle is not None and bool(self.scope["state"].get("admitted"))

    @property
    def waiting(self) -> bool:
        """True if the connection has no request with the token."""
        return not self._admitted or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > CONNECTIONS:
            self.loop.call_later(GRACE_S, self._make_room)

    def _make_room(self) -> None:
        """Drop the connection that has waited longest, if there are still too many."""
        connections = [each for each in self.connections if isinstance(each, HttpConnection)]
        waiting = [each for each in connections if each.waiting]
        if len(connections) > CONNECTIONS and waiting:
            oldest = min(waiting, key=lambda each: each._since)
            oldest.drop(503, f"all {CONNECTIONS} connections are taken; send the request again")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Leave the connection to the WebSocket's protocol, which has its own limits."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # uvicorn's own limit, the same for every connection
        self._wait()

    def _wait(self) -> None:
        """Start the time limit of the next request."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._since = self.loop.time()
        limit = KEEP_ALIVE_S if self._admitted else HEAD_S
        self._deadline = self.loop.call_later(limit, self._expire, limit)

    def _expire(self, limit: float) -> None:
        if self.waiting:
            self.drop(408, f"the head did not arrive within {limit:g} s; send it at once")

    def drop(self, status: int, detail: str) -> None:
        """Close the connection, with an error for a client that has sent part of a head."""
        self.connections.discard(self)
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(status, detail)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 does not parse as a request."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, "the request is not valid HTTP/1.1, or its head is too large; fix it")
        self.transport.close()

    def _refuse(self, status: int, detail: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers["connection"] = "close"
        reason = STATUS_PHRASES[status]
        response = h11.Response(status_code=status, headers=[*headers.items()], reason=reason)
        events = (response, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
