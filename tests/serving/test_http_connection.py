"""The HTTP server's limits without Ray: clients that are slow, many or not HTTP, against a small application behind the same guard."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import requests
import uvicorn
from fastapi import FastAPI, Request

from mesocosm.serving import http_connection, ingress
from mesocosm.serving.http_connection import CONNECTIONS, Connection

TOKEN = "planted-token-4f1c9a0b7d"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
KNOWN = f"Host: x\r\nAuthorization: Bearer {TOKEN}\r\n"


class Server:
    """A running server, whose route /wait answers when `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        app = FastAPI()

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/wait")
        def wait() -> dict[str, bool]:
            return {"waited": self.go.wait(120)}

        @app.post("/body")
        async def body(request: Request) -> int:
            return len(await request.body())

        ingress.say_errors(app)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(ingress.Guard(app, TOKEN.encode()), http=Connection, ws="none", lifespan="off", log_config=None, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()

    def connect(self, data: str) -> socket.socket:
        line = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        line.sendall(data.encode())
        return line

    def close(self) -> None:
        self.go.set()
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def reply(line: socket.socket) -> tuple[int, str]:
    """(status, the error's sentence) of what comes until the server closes; (0, "") where it closes without a word."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while chunk := line.recv(4096):
            data += chunk
    if not data:
        return 0, ""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["detail"]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_heads_without_an_end_keep_nobody_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """More unfinished heads than there are places: health and a request with the token are answered before any head is late."""
    monkeypatch.setattr(http_connection, "HEAD_S", 600.0)
    held = [server.connect("GET /v1/world HTTP/1.1\r\nX-a: ") for _ in range(CONNECTIONS + 20)]
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert requests.post(f"{server.url}/body", data=b"abc", headers=AUTHORIZED, timeout=60).json() == 3
    assert reply(held[0]) == (503, "the server has too many connections; send the whole request at once"), "the oldest went"
    for each in held:
        each.close()


@pytest.mark.parametrize("head", ["GET /health HTTP/1.1\r\nX-a: ", ""], ids=["a part of a head", "nothing"])
def test_a_slow_head(server: Server, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    monkeypatch.setattr(http_connection, "HEAD_S", 1.0)
    with server.connect(head) as line:
        assert reply(line) == ((408, "the request's head did not arrive within 1 s; send it at once") if head else (0, ""))


def test_more_bytes_win_no_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that comes byte by byte, and the body of a request that was refused already."""
    monkeypatch.setattr(http_connection, "HEAD_S", 1.0)
    for start in ("GET /health HTTP/1.1\r\nX-a: ", "POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"):
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
    with server.connect(f"POST /body HTTP/1.1\r\n{KNOWN}Connection: close\r\nContent-Length: 9\r\n\r\n1234") as line:
        assert reply(line) == (408, "the body did not arrive within 0.5 s; send it at once")


def test_too_many_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place is a request in work: the next one gets 503 in JSON, health an answer, and a place that is free again is given."""
    monkeypatch.setattr(http_connection, "CONNECTIONS", 3)
    monkeypatch.setattr(ingress, "CONNECTIONS", 3)
    held = [server.connect(f"GET /wait HTTP/1.1\r\n{KNOWN}Connection: close\r\n\r\n") for _ in range(3)]
    wait_for(lambda: requests.post(f"{server.url}/body", headers=AUTHORIZED, timeout=60).status_code == 503)
    refused = requests.post(f"{server.url}/body", headers=AUTHORIZED, timeout=60)
    assert refused.json() == {"detail": "3 requests are in work; send this one again later"}
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    server.go.set()
    for each in held:
        assert each.recv(4096).startswith(b"HTTP/1.1 200")
        each.close()
    assert requests.post(f"{server.url}/body", data=b"abc", headers=AUTHORIZED, timeout=60).json() == 3


def test_no_http_is_answered_in_json(server: Server) -> None:
    for data in ("\x16\x03\x01\r\n\r\n", "POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n"):
        with server.connect(data) as line:
            status, detail = reply(line)
        assert status == 400 and detail.startswith("the request is not valid HTTP/1.1")


def test_a_connection_is_used_again(server: Server) -> None:
    with requests.Session() as session:
        for size in (3, 5, 0):
            assert session.post(f"{server.url}/body", data=b"x" * size, headers=AUTHORIZED, timeout=60).json() == size
