"""HTTP connections with a time limit: uvicorn 0.54 waits forever for a request's head.

A connection is waiting until a request with the token is in it, and again after that request's reply.
A waiting connection has `HEAD_S` seconds. Where `CONNECTIONS` are open, the one that has waited longest
gives its place to a new one. So whoever has no token holds no place for long, however slowly it sends.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

CONNECTIONS = 256
"""Connections at once, and requests with the token at once"""
HEAD_S = 10.0
"""Seconds from the opening of a connection, or from its last reply, until the head of a request with the token is there"""


def admit(scope: Scope) -> None:
    """Mark the request as one with the token: its connection is not waiting before it is answered."""
    scope.setdefault("state", {})["admitted"] = True


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with the limits of this module and errors in JSON."""

    _deadline: asyncio.TimerHandle | None = None
    _since = 0.0

    @property
    def waiting(self) -> bool:
        """Whether no request with the token is in it."""
        return self.cycle is None or self.cycle.response_complete or not self.scope["state"].get("admitted")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self and other.waiting]
        if len(self.connections) > CONNECTIONS and others:
            min(others, key=lambda other: other._since).drop(503, "the server has too many connections; send the whole request at once")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        """Begin the seconds in which the next request must come."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(HEAD_S, self._expire)

    def _expire(self) -> None:
        if self.waiting:
            self.drop(408, f"the request's head did not arrive within {HEAD_S:g} s; send it at once")

    def drop(self, status: int, detail: str) -> None:
        """Close the connection now. A client that has sent a part of a head is told why."""
        self.connections.discard(self)
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(status, detail)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what h11 does not read as a request."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, "the request is not valid HTTP/1.1, or its head is too large; send a shorter, valid one")
        self.transport.close()

    def _refuse(self, status: int, detail: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        headers: list[tuple[str, Any]] = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = (h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
