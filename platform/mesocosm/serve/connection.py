"""How a client reaches a world: in its own process, or on Ray Serve, where replicas die and
sessions move.

Serve chooses the replica (by consistent hash of the client's id) and gives out its *line*: a TCP
address and a token. Steps then ride the line, a plain socket: 0.03 ms a call where a Serve handle
takes 4 to 8 ms, which is several times what a small world needs for 256 environments. A broken
line, or one that cannot be opened, sends the client back to Serve.

Every request has a number, which its reply repeats: a client that was interrupted, or whose line is
out of step, never takes one request's reply for another's.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import time
import uuid
from typing import Any, Protocol

from mesocosm.cluster import ray_session
from mesocosm.config import RayConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.protocol import Message, pack, unpack
from mesocosm.serve.session import Sessions

FRAME = struct.Struct("<Q")
LARGEST = 1 << 28
"""Bytes of the largest frame: Humanoid's 348 numbers over a context of 64 steps for 3000
environments.
"""
LOOPBACK = "127.0.0.1"
DIAL_S = 5.0
REDIAL_S = 60.0
"""For so long a line that could not be opened is not tried again: where a firewall drops packets
each try costs DIAL_S.
"""


def packed(message: Message) -> bytes:
    """The message as bytes. Raises UsageError where they are more than a frame may hold."""
    data = pack(message)
    if len(data) > LARGEST:
        raise UsageError(
            f"a message of {len(data) / 2**20:.0f} MiB is beyond the limit of {LARGEST >> 20} MiB;"
            " lower num_envs, and use more clients"
        )
    return data


def send_frame(line: socket.socket, data: bytes) -> None:
    line.sendall(FRAME.pack(len(data)) + data)


def receive_frame(
    line: socket.socket, limit: int = LARGEST, deadline: float | None = None
) -> bytearray | None:
    """The next frame, or None where the other side has closed.

    Args:
        line: The socket. With a `deadline`, its timeout is changed.
        limit: The most bytes that the frame may have.
        deadline: When the whole frame must be there, by `time.monotonic`. None: the socket's
            timeout holds for each read.

    Raises:
        OSError: The line is broken or late, or the frame has more than `limit` bytes.
    """
    head = _receive(line, FRAME.size, deadline)
    if head is None:
        return None
    (size,) = FRAME.unpack(head)
    if size > limit:
        raise ConnectionError(f"a frame of {size} bytes is beyond the limit of {limit}")
    return _receive(line, size, deadline)


def _receive(line: socket.socket, size: int, deadline: float | None) -> bytearray | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        if deadline is not None:
            line.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = line.recv_into(view[got:])
        if count == 0:
            return None
        got += count
    return data


class NotServed(UsageError):
    """No application of that name is on this Ray."""


class ReplicaFailed(MesocosmError):
    """A bug of ours, on a replica: its log has more."""


def reply_of(reply: Message) -> Message:
    """A reply that is no error. Raises UsageError, ReplicaFailed or MesocosmError with the sentence
    of one that is.
    """
    if "error" in reply:
        raise {"usage": UsageError, "bug": ReplicaFailed}.get(reply["kind"], MesocosmError)(
            reply["error"]
        )
    return reply


class Connection(Protocol):
    """One client's way to its sessions."""

    def call(self, request: Message) -> Message:
        """The reply to a request. Raises MesocosmError when nobody answers within the deadline."""

    def close(self, last: Message | None = None) -> None:
        """Let go of what the connection holds, after one request that nobody need answer."""


class InProcess:
    """The world in the client's own process: the same sessions, no bytes and no copies between."""

    def __init__(self, sessions: Sessions):
        self.sessions = sessions

    def call(self, request: Message) -> Message:
        return self.sessions.handle(request)

    def close(self, last: Message | None = None) -> None:
        if last is not None:
            self.sessions.handle(last)


class Served:
    """A Serve application `app` on the Ray at `address` (None: the one this process is connected
    to).
    """

    def __init__(self, app: str, address: str | None, deadline_s: float):
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        ray_session.refuse_fork()
        if address is not None:
            ray_session.ensure(RayConfig(address=address))
        elif not ray.is_initialized():
            raise UsageError(
                f"world application {app!r}: this process is not connected to Ray; give"
                " address=..., as `mesocosm serve` prints it"
            )
        try:
            handle = serve.get_app_handle(app)
        except (RayServeException, ValueError) as error:
            raise NotServed(
                f"no world application {app!r} is served on this Ray; run `mesocosm serve"
                f" world=<id> name={app}` and give the ray.address that it prints (in Python:"
                " address=...), or set backend=local"
            ) from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self.app = app
        self.deadline_s = deadline_s
        self.replica: dict[str, Any] | None = None
        """Host, port and pid of the replica that the line leads to"""
        self._handle = handle.options(session_id=uuid.uuid4().hex, _by_reference=False)
        self._line: socket.socket | None = None
        self._no_line_until = 0.0
        self._node = ray.get_runtime_context().get_node_id()
        self._number = 0
        self._lost = (ray.exceptions.RayActorError, RayServeException, TimeoutError, OSError)

    def call(self, request: Message) -> Message:
        ray_session.refuse_fork()
        self._number += 1
        data = packed(request | {"number": self._number})
        deadline = time.monotonic() + self.deadline_s
        pause = 0.05
        while True:
            try:
                reply = unpack(self._send(data, max(1.0, deadline - time.monotonic())))
                if (answers := reply.pop("number")) != self._number:
                    raise ConnectionError(
                        f"the line is out of step: request {self._number} got the reply to"
                        f" {answers}"
                    )
                return reply
            except self._lost as error:
                self._hang_up()
                self._no_line_until = 0.0
                if time.monotonic() > deadline:
                    reason = (
                        f"{type(error).__name__}:"
                        f" {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
                    )
                    raise MesocosmError(
                        f"world application {self.app!r}: no replica answered for"
                        f" {self.deadline_s:g} s ({reason}); see `serve status`, or raise"
                        " deadline_s"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except (
                BaseException
            ):  # Ctrl-C while a reply is on its way: the line would be one reply behind from now on
                self._hang_up()
                raise

    def _send(self, data: bytes, timeout: float) -> bytes | bytearray:
        if self._line is None and not self._dial(timeout):
            return self._handle.call.remote(data).result(timeout_s=timeout)
        assert self._line is not None
        self._line.settimeout(timeout)
        send_frame(self._line, data)
        reply = receive_frame(self._line)
        if reply is None:
            raise ConnectionError("the replica hung up")
        return reply

    def _dial(self, timeout: float) -> bool:
        """Ask Serve for a replica and open its line; False where the replica lives and its port
        cannot be reached from here.

        A replica that began while the cluster was one machine listens on loopback, which leads
        nowhere from another node, or to somebody else. One without a free file descriptor accepts
        nobody: its port connects, and does not acknowledge the token.
        """
        if time.monotonic() < self._no_line_until:
            return False
        replica = self._handle.connect.remote().result(timeout_s=timeout)
        token = replica.pop("token")
        line: socket.socket | None = None
        if replica["host"] != LOOPBACK or replica["node"] == self._node:
            line = open_line(replica["host"], replica["port"], token, min(timeout, DIAL_S))
        if line is None:
            self._no_line_until = time.monotonic() + REDIAL_S
            return False
        self._line, self.replica = line, replica
        return True

    def _hang_up(self) -> None:
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.close()
            self._line = self.replica = None

    def close(self, last: Message | None = None) -> None:
        mine = not ray_session.forked()  # the line of a fork is its parent's
        if mine and last is not None and self._line is not None:
            with contextlib.suppress(OSError):
                self._line.settimeout(1.0)
                send_frame(self._line, pack(last | {"number": 0}))
                receive_frame(self._line)
        self._hang_up()


def open_line(host: str, port: int, token: bytes, timeout: float) -> socket.socket | None:
    """A line on which the replica has acknowledged the token within `timeout` seconds, or None."""
    line: socket.socket | None = None
    try:
        line = socket.create_connection((host, port), timeout=timeout)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_frame(line, token)
        if receive_frame(line, 0, time.monotonic() + timeout) is not None:
            return line
    except OSError:
        pass
    if line is not None:
        line.close()
    return None
