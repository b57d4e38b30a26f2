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

from mesocosm.serve import http_connection, ingress
from mesocosm.serve.http_connection import CONNECTIONS, HttpConnection

pytestmark = pytest.mark.integration

TOKEN = "planted-token-4f1c9a0b7d"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
KNOWN = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\n"


FEW_DESCRIPTORS = """
import resource, sys, time
sys.path.insert(0, "tests")
from tests.serve.test_http_connection import Server

server = Server()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(server.url, flush=True)
sys.stdin.read()
server.stop()
time.sleep(float(sys.argv[1]))
server.close()
"""


class Server:
    """A running server, whose route /wait answers when `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        app = FastAPI()

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/wait")
        def wait() -> dict[str, bool]:
            self.begun.release()
            return {"waited": self.go.wait(120)}

        @app.post("/body")
        async def body(request: Request) -> int:
            return len(await request.body())

        ingress.handle_errors(app)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        guarded = ingress.Guard(app, TOKEN.encode())
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical"}
        config = uvicorn.Config(guarded, http=HttpConnection, ws="none", lifespan="off", **quiet)
        self._server = uvicorn.Server(config)
        run = partial(asyncio.run, http_connection.serve(self._server, self._socket))
        self._thread = threading.Thread(target=run)
        self._thread.start()

    def connect(self, data: str) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        line.sendall(data.encode())
        return line

    def post(self, body: bytes) -> requests.Response:
        return requests.post(f"{self.url}/body", data=body, headers=AUTHORIZED, timeout=60)

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
    """(status, sentence) of the error that comes before the server closes; (0, "") for none."""
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
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert server.post(b"abc").json() == 3
    status, detail = reply(held[0])
    assert status == 503 and detail.startswith("all 256 connections are taken"), "the oldest went"
    for each in held:
        each.close()


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
    """The time for a head is over when the head is there, however long the answer takes."""
    monkeypatch.setattr(http_connection, "HEAD_S", 0.5)
    with server.connect(f"GET /wait HTTP/1.1\r\n{KNOWN}\r\n") as line:
        time.sleep(1.5)
        server.go.set()
        assert line.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_slow_body(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "BODY_S", 0.5)
    head = f"POST /body HTTP/1.1\r\n{KNOWN}Connection: close\r\nContent-Length: 9\r\n\r\n"
    with server.connect(f"{head}1234") as line:
        assert reply(line) == (408, "the body did not arrive within 0.5 s; send it at once")


def test_too_many_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place is a request in work: the next one gets 503 in JSON, and health an answer.

    A place that is free again is given.
    """
    monkeypatch.setattr(ingress, "CONNECTIONS", 3)
    head = f"GET /wait HTTP/1.1\r\n{KNOWN}Connection: close\r\n\r\n"
    held = [server.connect(head) for _ in range(3)]
    assert all(server.begun.acquire(timeout=60) for _ in held)
    refused = server.post(b"")
    assert refused.status_code == 503
    assert refused.json() == {"detail": "3 requests are in work; send this one again later"}
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    server.go.set()
    for each in held:
        assert each.recv(4096).startswith(b"HTTP/1.1 200")
        each.close()
    wait_until(lambda: server.post(b"abc").status_code == 200)


def test_more_whole_requests_than_places(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a burst each request is answered, with 503 in JSON beyond the limit: none is cut."""
    monkeypatch.setattr(ingress, "CONNECTIONS", 3)
    monkeypatch.setattr(http_connection, "CONNECTIONS", 3)
    monkeypatch.setattr(http_connection, "GRACE_S", 2.0)
    head = f"GET /wait HTTP/1.1\r\n{KNOWN}Connection: close\r\n\r\n"
    held = [server.connect(head) for _ in range(30)]
    assert all(server.begun.acquire(timeout=60) for _ in range(3))
    server.go.set()
    statuses = []
    for each in held:
        statuses.append(int(each.recv(4096).split()[1]))
        each.close()
    assert set(statuses) == {200, 503}


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
            assert session.post(f"{server.url}/body", data=b"x" * size, timeout=60).json() == size


@contextlib.contextmanager
def few_descriptors(seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """A server with 40 file descriptors, its port, and `seconds` between its stop and its end."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(seconds)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        yield process, url, int(url.split(":")[-1])


NO_DESCRIPTOR = ["the HTTP ingress has no free file descriptor; raise ulimit -n"]


def test_survives_without_free_descriptors() -> None:
    """EMFILE: the server answers again as soon as a slow client has gone, and logs one line."""
    with few_descriptors(0) as (process, url, port):
        held = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(60)]
        with pytest.raises(requests.Timeout):
            requests.get(f"{url}/health", timeout=2)
        for each in held:
            each.close()
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
        _, errors = process.communicate(timeout=60)
    assert errors.decode().splitlines() == NO_DESCRIPTOR


def test_stops_without_free_descriptors() -> None:
    """asyncio's next attempt to accept finds the listener closed: nothing is logged about it."""
    with few_descriptors(3) as (process, url, port):
        head = f"GET /wait HTTP/1.1\r\n{KNOWN}\r\n"
        held = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(60)]
        held[0].sendall(head.encode())
        with pytest.raises(requests.Timeout):
            requests.get(f"{url}/health", timeout=2)
        _, errors = process.communicate(timeout=60)
        for each in held:
            each.close()
    assert errors.decode().splitlines() == NO_DESCRIPTOR
