"""The replica's line without Ray: its token, its time limit, and no free file descriptors."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from mesocosm.serve import line as lines
from mesocosm.serve.line import FRAME, LineServer, open_line, receive_frame, send_frame

pytestmark = pytest.mark.integration

FEW_DESCRIPTORS = """
import os, resource, sys
from mesocosm.serve.line import LineServer

server = LineServer("127.0.0.1", bytes)
used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, used + 4))
print(server.address[1], server.token.hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> LineServer:
    """A server that returns each request."""
    return LineServer("127.0.0.1", bytes)


def assert_echo(line: socket.socket | None, data: bytes) -> None:
    assert line is not None
    send_frame(line, data)
    assert receive_frame(line) == data


def test_answers_clients_with_the_token(server: LineServer) -> None:
    line = open_line(*server.address, server.token, 60.0)
    for _ in range(3):
        assert_echo(line, secrets.token_bytes(1000))
    assert line is not None
    line.close()
    assert open_line(*server.address, secrets.token_bytes(32), 60.0) is None
    with socket.create_server(("127.0.0.1", 0)) as free:
        unused = free.getsockname()
    assert open_line(*unused, server.token, 60.0) is None


def test_a_slow_token_is_cut(server: LineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is for the whole token, however often a byte of it comes."""
    monkeypatch.setattr(lines, "TOKEN_S", 1.0)
    sent = 0
    connected = socket.create_connection(server.address, timeout=60)
    with connected as line, pytest.raises(ConnectionError):
        for byte in FRAME.pack(32) + server.token * 100:
            line.sendall(bytes([byte]))
            sent += 1
            time.sleep(0.2)
    assert sent < FRAME.size + len(server.token)


@pytest.mark.slow
def test_survives_without_free_descriptors() -> None:
    """EMFILE: clients beyond the limit get no line, and get one when others have hung up."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", FEW_DESCRIPTORS], **pipes) as process:
        assert process.stdout is not None
        port, token = process.stdout.readline().split()
        endpoint = "127.0.0.1", int(port), bytes.fromhex(token.decode())
        held: list[socket.socket] = []
        while (line := open_line(*endpoint, 3.0)) is not None:
            held.append(line)
        assert held
        time.sleep(2 * lines.PAUSE_S)  # it meets the limit more than once
        for line in held:
            line.close()
        last = open_line(*endpoint, 60.0)
        assert_echo(last, b"still here")
        assert last is not None
        last.close()
        _, errors = process.communicate(timeout=600)
    assert b"Too many open files" in errors and b"ulimit -n" in errors
    assert b"Traceback" not in errors
