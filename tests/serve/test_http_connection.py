"""The HTTP server's limits without Ray: a small application behind the same guard.

Its clients are slow, many or not HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from factories import wait_until
from fastapi import FastAPI, Request

from mesocosm.serve import http_connection, http_guard, ingress
from mesocosm.serve.http_connection import CONNECTIONS, HttpConnection

pytestmark = pytest.mark.integration

TOKEN = "planted-token-4f1c9a0b7d"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
KNOWN = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\n"
WAIT = f"GET /wait HTTP/1.1\r\n{KNOWN}Connection: close\r\n\r\n"
FEW_DESCRIPTORS = """
import resource, sys, time
sys.path.insert(0, "tests")
from tests.serve.test_http_connection import Server

server = Server()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(server.port, flush=True)
sys.stdin.read()
server.stop()
time.sleep(float(sys.argv[1]))
server.close()
"""
NO_DESCRIPTOR = ["the HTTP ingress has no free file descriptor; raise ulimit -n"]


def connected(port: int, data: str = "") -> socket.socket:
    line = socket.create_connection(("127.0.0.1", port), timeout=60)
    line.sendall(data.encode())
    return line


def health(port: int, timeout: float = 60) -> int:
    return requests.get(f"http://127.0.0.1:{port}/health", timeout=timeout).status_code


class Server:
    """A running server, whose route /wait answers when `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        app = FastAPI()

        @app.get("/health")
        async def health() -> str:
            return "ok"

        @app.get("/wait")
        def wait() -> bool:
            self.begun.release()
            return self.go.wait(120)

        @app.post("/body")
        async def body(request: Request) -> int:
            return len(await request.body())

        ingress.handle_errors(app)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._socket.getsockname()[1]
        guarded = ingress.Guard(app, TOKEN.encode())
        options: dict[str, Any] = {"log_config": None, "log_level": "critical", "ws": "none"}
        config = uvicorn.Config(guarded, http=HttpConnection, lifespan="off", **options)
        self._server = uvicorn.Server(config)
        run = partial(asyncio.run, http_connection.serve(self._server, self._socket))
        self._thread = threading.Thread(target=run)
        self._thread.start()

    def connect(self, data: str) -> socket.socket:
        return connected(self.port, data)

    def post(self, body: bytes) -> requests.Response:
        url = f"http://127.0.0.1:{self.port}/body"
        return requests.post(url, data=body, headers=AUTHORIZED, timeout=60)

    def stop(self) -> None:
        """Accept no more. Requests in work keep the event loop alive until `close`."""
        self._server.should_exit = True

    def close(self) -> None:
        self.stop()
        self.go.set()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def reply(line: socket.socket) -> tuple[int, str]:
    """(status, detail) of the error that comes before the server closes; (0, "") for none."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := line.recv(4096):
            data += chunk
    if not data:
        return 0, ""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["detail"]


def test_unfinished_heads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are places: others are answered before any head is late."""
    monkeypatch.setattr(http_connection, "HEAD_S", 600.0)
    held = [server.connect("GET /v1/world HTTP/1.1\r\nX-a: ") for _ in range(CONNECTIONS + 20)]
    assert health(server.port) == 200
    assert server.post(b"abc").json() == 3
    status, detail = reply(held[0])
    assert status == 503 and detail.startswith("all 256 connections are taken"), "the oldest went"
    for line in held:
        line.close()


@pytest.mark.parametrize("head", ["GET /health HTTP/1.1\r\nX-a: ", ""], ids=["a part", "nothing"])
def test_a_slow_head(server: Server, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    late = (408, "the head did not arrive within 1 s; send it at once")
    monkeypatch.setattr(http_connection, "HEAD_S", 1.0)
    with server.connect(head) as line:
        assert reply(line) == (late if head else (0, ""))


def test_more_bytes_win_no_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that comes byte by byte, and the body of a request that was refused already."""
    monkeypatch.setattr(http_connection, "HEAD_S", 1.0)
    refused = "POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    for start in ("GET /health HTTP/1.1\r\nX-a: ", refused):
        with server.connect(start) as line, pytest.raises(ConnectionError):
            for _ in range(200):
                line.sendall(b"x")
                time.sleep(0.1)


def test_a_request_in_work_is_not_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit of a head ends with the head, however long the answer takes."""
    monkeypatch.setattr(http_connection, "HEAD_S", 0.5)
    with server.connect(f"GET /wait HTTP/1.1\r\n{KNOWN}\r\n") as line:
        time.sleep(1.5)
        server.go.set()
        assert line.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_thinking_client_keeps_its_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next request cannot meet a connection that the server is closing: a step would be lost.

    A request without the token wins no time.
    """
    monkeypatch.setattr(http_connection, "HEAD_S", 0.5)

    def answers(line: socket.socket) -> bytes:
        return b"".join(iter(lambda: line.recv(4096), b""))  # until the server closes

    with server.connect(f"POST /body HTTP/1.1\r\n{KNOWN}\r\n") as line:
        time.sleep(6.0)  # uvicorn's own limit is 5 s
        line.sendall(f"POST /body HTTP/1.1\r\n{KNOWN}Connection: close\r\n\r\n".encode())
        assert answers(line).count(b"HTTP/1.1 200") == 2
    with server.connect("GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as line:
        assert answers(line).count(b"HTTP/1.1 200") == 1


def test_a_slow_body(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_S", 0.5)
    head = f"POST /body HTTP/1.1\r\n{KNOWN}Connection: close\r\nContent-Length: 9\r\n\r\n"
    with server.connect(f"{head}1234") as line:
        assert reply(line) == (408, "the body did not arrive within 0.5 s; send it at once")


def test_too_many_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place is a request in work: the next one gets 503 in JSON, and health an answer.

    A place that is free again is given.
    """
    monkeypatch.setattr(http_guard, "CONNECTIONS", 3)
    held = [server.connect(WAIT) for _ in range(3)]
    assert all(server.begun.acquire(timeout=60) for _ in held)
    refused = server.post(b"")
    assert refused.status_code == 503
    assert refused.json() == {"detail": "3 requests are in work; send this one again later"}
    assert health(server.port) == 200
    server.go.set()
    for line in held:
        assert line.recv(4096).startswith(b"HTTP/1.1 200")
        line.close()
    wait_until(lambda: server.post(b"abc").status_code == 200)


def test_more_whole_requests_than_places(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a burst each request is answered, with 503 in JSON beyond the limit: none is cut."""
    for module in (http_guard, http_connection):
        monkeypatch.setattr(module, "CONNECTIONS", 3)
    monkeypatch.setattr(http_connection, "GRACE_S", 2.0)
    held = [server.connect(WAIT) for _ in range(30)]
    assert all(server.begun.acquire(timeout=60) for _ in range(3))
    server.go.set()
    assert {int(line.recv(4096).split()[1]) for line in held} == {200, 503}
    for line in held:
        line.close()


def test_no_http_is_answered_in_json(server: Server) -> None:
    strange_length = "POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n"
    for data in ("\x16\x03\x01\r\n\r\n", strange_length):
        with server.connect(data) as line:
            status, detail = reply(line)
        assert status == 400 and detail.startswith("the request is not valid HTTP/1.1")


def test_a_connection_is_used_again(server: Server) -> None:
    with requests.Session() as session:
        session.headers.update(AUTHORIZED)
        for size in (3, 5, 0):
            reply = session.post(f"http://127.0.0.1:{server.port}/body", b"x" * size, timeout=60)
            assert reply.json() == size


@contextlib.contextmanager
def few_descriptors(seconds: float) -> Iterator[tuple[int, list[socket.socket]]]:
    """The port of a server with 40 file descriptors, and 60 connections to it, which it cannot
    all accept. At the end the server stops, ends `seconds` later, and has logged one line.
    """
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(seconds)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        held = [connected(port) for _ in range(60)]
        yield port, held
        _, errors = process.communicate(timeout=600)
        for line in held:
            line.close()
    assert errors.decode().splitlines() == NO_DESCRIPTOR


@pytest.mark.slow
def test_survives_without_free_descriptors() -> None:
    """EMFILE: the server answers again as soon as a slow client has gone, and logs one line."""
    with few_descriptors(0) as (port, held):
        with pytest.raises(requests.Timeout):
            health(port, timeout=2)
        for line in held:
            line.close()
        assert health(port) == 200


@pytest.mark.slow
def test_stops_without_free_descriptors() -> None:
    """asyncio's next attempt to accept fails on the closed listener: nothing is logged about it."""
    with few_descriptors(3) as (port, held):
        held[0].sendall(f"GET /wait HTTP/1.1\r\n{KNOWN}\r\n".encode())
        with pytest.raises(requests.Timeout):
            health(port, timeout=2)
