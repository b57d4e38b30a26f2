"""A client's connection to a world: in its own process, or on Ray Serve.

Serve chooses the replica (by consistent hash of the client's id) and returns the address and token
of its *line*, a plain TCP socket. A call on the line takes 0.03 ms, through a Serve handle 4 to 8
ms, which is several times what a small world needs for 256 environments. If the line breaks or
cannot be opened, the client calls through Serve.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import threading
import time
import uuid
from typing import Any, Protocol

from mesocosm.cluster import ray_session
from mesocosm.config import RayConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.line import open_line, packed, receive_frame, send_frame
from mesocosm.serve.protocol import Message, pack, unpack

LOOPBACK = "127.0.0.1"
REROUTE_S = 10.0
"""Seconds between two questions to Serve which replica is this client's: one may have been added"""
DIAL_S, REDIAL_S = 5.0, 60.0
"""Seconds to open a line, and before one that could not be opened is tried again (a firewall that
drops packets makes each attempt take DIAL_S)
"""
CLOSE_S = 5.0
"""The longest wait for the end of a handle's reports."""


class NotServed(UsageError):
    """This Ray has no application of that name."""


class ReplicaFailed(MesocosmError):
    """A bug on a replica; its log has the traceback."""


def reply_of(reply: Message) -> Message:
    """Return a reply, or raise UsageError, ReplicaFailed or MesocosmError for its error."""
    if "error" in reply:
        kinds = {"usage": UsageError, "bug": ReplicaFailed}
        raise kinds.get(reply["kind"], MesocosmError)(reply["error"])
    return reply


class Connection(Protocol):
    """One client's connection to its sessions: `Served`, or `Sessions` in its own process."""

    def call(self, request: Message) -> Message:
        """Return the reply to a request. Raises MesocosmError after the deadline."""

    def close(self, last: Message | None = None) -> None:
        """Release the connection, after a last request whose reply is optional."""


class Served:
    """The Serve application `app` on the Ray at `address`, or on this process's Ray."""

    replica: dict[str, Any] | None = None
    """Host, port, node and pid of the replica at the other end of the line"""
    _line: socket.socket | None = None
    _no_line_until = 0.0
    _routed_at = 0.0
    _number = 0
    """The last request's number, which its reply repeats: no reply is taken for another one's"""

    def __init__(self, app: str, address: str | None, deadline_s: float):
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        ray_session.refuse_fork()
        if address is not None:
            ray_session.ensure(RayConfig(address=address))
        elif not ray.is_initialized():
            fix = "give the address=... that `mesocosm serve` prints"
            message = "this process is not connected to Ray"
            raise UsageError(f"world application {app!r}: {message}; {fix}")
        try:
            handle = serve.get_app_handle(app)
        except (RayServeException, ValueError) as error:
            raise NotServed(
                f"no world application {app!r} is served on this Ray; run `mesocosm serve"
                f" world=ID name={app}` and give the ray.address that it prints (in Python:"
                " address=...), or set backend=local"
            ) from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self.app, self.deadline_s = app, deadline_s
        self._handle = handle.options(session_id=uuid.uuid4().hex, _by_reference=False)
        self._node = ray.get_runtime_context().get_node_id()
        self._lost = (ray.exceptions.RayActorError, RayServeException, TimeoutError, OSError)

    def call(self, request: Message) -> Message:
        ray_session.refuse_fork()
        self._number += 1
        data = packed(request | {"number": self._number})
        deadline, pause = time.monotonic() + self.deadline_s, 0.05
        while True:
            try:
                reply = unpack(self._send(data, max(1.0, deadline - time.monotonic())))
                number = reply.pop("number")
                if number != self._number:
                    raise ConnectionError(f"request {self._number} got the reply to {number}")
                return reply
            except self._lost as error:
                self._hang_up()
                self._no_line_until = 0.0
                if time.monotonic() > deadline:
                    lines = str(error).strip().splitlines() or ["no reason given"]
                    reason = f"{type(error).__name__}: {lines[0]}"
                    raise MesocosmError(
                        f"world application {self.app!r}: no replica answered for"
                        f" {self.deadline_s:g} s ({reason}); see `serve status`, or raise"
                        " deadline_s"
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except BaseException:  # Ctrl-C: the line still carries this request's reply
                self._hang_up()
                raise

    def _send(self, data: bytes, timeout: float) -> bytes | bytearray:
        if self._line is not None and time.monotonic() > self._routed_at + REROUTE_S:
            self._reroute()
        line = self._line or self._dial(timeout)
        if line is None:
            return self._handle.call.remote(data).result(timeout_s=timeout)
        line.settimeout(timeout)
        send_frame(line, data)
        reply = receive_frame(line)
        if reply is None:
            raise ConnectionError("the replica closed the line")
        return reply

    def _dial(self, timeout: float) -> socket.socket | None:
        """Open the line of the replica that Serve chooses, if it can be opened.

        A replica that began while the cluster was one machine listens on loopback, which from
        another node leads elsewhere. One without a free file descriptor serves no
        connection: its port accepts, and does not acknowledge the token.
        """
        if time.monotonic() < self._no_line_until:
            return None
        replica = self._handle.connect.remote().result(timeout_s=timeout)
        self._routed_at = time.monotonic()
        token = replica.pop("token")
        if replica["host"] != LOOPBACK or replica["node"] == self._node:
            seconds = min(timeout, DIAL_S)
            self._line = open_line(replica["host"], replica["port"], token, seconds)
        if self._line is None:
            self._no_line_until = time.monotonic() + REDIAL_S
        else:
            self.replica = replica
        return self._line

    def _reroute(self) -> None:
        """Close the line if Serve now chooses another replica, as after it has added one. The
        session is restored there.
        """
        self._routed_at = time.monotonic()
        with contextlib.suppress(*self._lost):
            replica = self._handle.connect.remote().result(timeout_s=DIAL_S)
            current = self.replica
            if current is None or any(replica[key] != current[key] for key in ("host", "port")):
                self._hang_up()

    def _hang_up(self) -> None:
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.close()
            self._line = self.replica = None

    def close(self, last: Message | None = None) -> None:
        if not ray_session.forked():  # the line and the handle of a fork belong to its parent
            if last is not None and self._line is not None:
                with contextlib.suppress(OSError):
                    self._line.settimeout(1.0)
                    send_frame(self._line, pack(last | {"number": 0}))
                    receive_frame(self._line)
            self._shut_down_router()
        self._hang_up()

    def _shut_down_router(self) -> None:
        """End the handle's reports to the autoscaler, for which Ray would be started again.

        Its thread has ended where Python is finalizing, and may be the one that collects a
        connection: neither is waited for without end.
        """
        if not sys.is_finalizing():
            ending = threading.Thread(target=self._handle.shutdown, daemon=True)
            ending.start()
            ending.join(CLOSE_S)
