"""Lines: TCP sockets between clients and replicas, which carry messages in frames.

A client sends the token as its first frame. The server acknowledges it with an empty frame, and
then answers request frames one at a time until the client closes the socket.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

from mesocosm.errors import UsageError
from mesocosm.serve.protocol import Message, pack

logger = logging.getLogger(__name__)
FRAME = struct.Struct("<Q")
LARGEST = 1 << 28
"""Bytes of the largest frame: Humanoid's 348 numbers, 64 steps of context, 3000 environments"""
TOKEN = 32
"""Bytes of the token, and the most that a client may send before it is authenticated"""
TOKEN_S = 10.0
"""Seconds in which a client must send its whole token"""
PAUSE_S = 1.0
"""Seconds between attempts to accept while no file descriptor or thread is free"""


def packed(message: Message) -> bytes:
    """Encode a message. Raises UsageError where it is larger than a frame."""
    data = pack(message)
    if len(data) > LARGEST:
        size, fix = f"{len(data) / 2**20:.0f} MiB", "lower num_envs and use more clients"
        raise UsageError(f"a message must be at most {LARGEST >> 20} MiB, got {size}; {fix}")
    return data


def send_frame(line: socket.socket, data: bytes) -> None:
    line.sendall(FRAME.pack(len(data)) + data)


def receive_frame(
    line: socket.socket, limit: int = LARGEST, deadline: float | None = None
) -> bytearray | None:
    """Receive a frame of at most `limit` bytes, or None where the other side has closed.

    The whole frame must arrive before the `deadline` by `time.monotonic`, which changes the
    socket's timeout; without one that timeout applies to each read.

    Raises:
        OSError: The line is broken or late, or the frame has more than `limit` bytes.
    """
    head = _receive(line, FRAME.size, deadline)
    if head is None:
        return None
    (size,) = FRAME.unpack(head)
    if size > limit:
        raise ConnectionError(f"a frame must have at most {limit} bytes, got {size}")
    return _receive(line, size, deadline)


def _receive(line: socket.socket, size: int, deadline: float | None) -> bytearray | None:
    data = bytearray(size)
    view, received = memoryview(data), 0
    while received < size:
        if deadline is not None:
            line.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = line.recv_into(view[received:])
        if count == 0:
            return None
        received += count
    return data


def open_line(host: str, port: int, token: bytes, timeout: float) -> socket.socket | None:
    """Open a line whose replica acknowledges the token within `timeout` seconds, or return None."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        line = stack.enter_context(socket.create_connection((host, port), timeout=timeout))
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_frame(line, token)
        if receive_frame(line, 0, time.monotonic() + timeout) is not None:
            stack.pop_all()
            return line
    return None


class LineServer:
    """Listens on a free port, with one thread per client. `answer` must not raise."""

    def __init__(self, host: str, answer: Callable[[bytearray], bytes]):
        self.token = secrets.token_bytes(TOKEN)
        self._answer = answer
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        threading.Thread(target=self._accept, name="line", daemon=True).start()

    def _accept(self) -> None:
        """Accept clients; without a free file descriptor or thread they call through Serve."""
        while True:
            line: socket.socket | None = None
            try:
                line, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(line,), name="line", daemon=True).start()
            except (OSError, RuntimeError) as error:
                if line is not None:
                    line.close()
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
