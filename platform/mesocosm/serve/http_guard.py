"""The token and the limits of every request to the HTTP ingress."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections import Counter
from collections.abc import Collection
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from mesocosm.serve.http_connection import CONNECTIONS, admit

BINARY = "/v1/call"
LARGEST_JSON, LARGEST_BINARY = 1 << 20, 1 << 24
"""Bytes of a body"""
BODY_S = 60.0
"""Seconds in which a request's whole body must arrive"""


class Guard:
    """ASGI middleware for the token and the limits.

    A body without a length is counted while it is read, and never stored beyond its limit. The
    size of a WebSocket's messages is limited by the server.

    Args:
        app: The application.
        token: The bearer token.
        public: Paths that anybody may GET.
    """

    def __init__(self, app: ASGIApp, token: bytes, public: Collection[str] = ("/health",)):
        self.app = app
        self._token, self._public = token, frozenset(public)
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            return
        if kind == "http" and scope["path"] in self._public and scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        limit = LARGEST_BINARY if scope["path"] == BINARY else LARGEST_JSON
        refusal = self._refusal(scope, limit)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._running[kind] += 1
        try:
            await self.app(scope, _limited(receive, limit) if kind == "http" else receive, send)
        finally:
            self._running[kind] -= 1

    def _refusal(self, scope: Scope, limit: int) -> Response | None:
        """The reply that refuses a request without the token or beyond the limits, or None."""
        if not hmac.compare_digest(_secret(_headers(scope, b"authorization")), self._token):
            fix = "send the header 'Authorization: Bearer TOKEN'"
            detail = f"this route requires the world's token; {fix}"
            return problem_reply(401, detail, {"WWW-Authenticate": "Bearer"})
        if self._running[scope["type"]] >= CONNECTIONS:
            detail = f"{CONNECTIONS} requests are in work; send this one again later"
            return problem_reply(503, detail)
        admit(scope)
        if any(int(length) > limit for length in _headers(scope, b"content-length")):
            return problem_reply(413, _too_large(limit))
        return None


def _headers(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _secret(headers: list[bytes]) -> bytes:
    """The token of a request's authorization: after `Bearer`, or the password of `Basic`, which is
    what clients send that have it in their address (http://USER:TOKEN@HOST:PORT).
    """
    scheme, _, value = headers[0].partition(b" ") if len(headers) == 1 else (b"", b"", b"")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` with a limit of a body's bytes and time."""
    size = 0
    deadline = asyncio.get_running_loop().time() + BODY_S

    async def limited() -> Event:
        nonlocal size
        try:
            async with asyncio.timeout_at(deadline):
                event = await receive()
        except TimeoutError as error:
            detail = f"the body did not arrive within {BODY_S:g} s; send it at once"
            raise HTTPException(408, detail) from error
        size += len(event.get("body", b""))
        if size > limit:
            raise HTTPException(413, _too_large(limit))
        return event

    return limited


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit >> 20} MiB; send fewer environments at once"


def problem_reply(status: int, detail: str, headers: Any = None) -> Response:
    """An error reply: {"detail": message}."""
    text = detail.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"detail": text}, status, headers)
