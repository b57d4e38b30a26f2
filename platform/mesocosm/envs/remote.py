"""Environments of reality behind OpenEnv's wire protocol (of openenv 0.10), by their address:
`reality.env=openenv:http://HOST:PORT`.

An episode is a sequence of messages on the WebSocket `/ws`; `/schema` says which fields an action
and an observation have. `mesocosm serve http=PORT` speaks the same protocol.
"""

from __future__ import annotations

import json
import os
import string
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import gymnasium
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.spaces import Text

from mesocosm.errors import UsageError

PREFIX = "openenv:"
TOKEN = "MESOCOSM_OPENENV_TOKEN"
"""The environment variable with the server's bearer token, where it wants one"""
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n\t"
CONNECT_S, ANSWER_S = 10.0, 600.0
"""Seconds to connect, and to wait for an answer where nothing else ends a step that hangs"""
LARGEST = 1 << 24
"""Bytes of an answer"""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RemoteEnv(gymnasium.Env[str, str]):
    """An environment at an address. Observations and actions are texts.

    An action is the one required field of the server's action schema: the text itself where the
    field is a string, otherwise its JSON. Where the schema has several required fields, or none, an
    action is the JSON of an object. A reset sends `seed`, the keys of `reset` and the options.

    `done` terminates an episode, unless the answer's metadata say `truncated`. `info` has
    `admissible_commands` where an observation has a list of texts `commands`, and `success` where
    the metadata have it.

    Args:
        url: Its address, such as http://127.0.0.1:8000.
        field: The observation's field that is its text. Defaults to `text`; where the server's
            schema has none, the whole observation as JSON, without its metadata.
        reset: Further arguments of every reset, such as {"split": "train"}.
        longest: The most characters of a text; longer observations are cut.
        characters: Characters of texts, beside those of printable ASCII; an observation's others
            become "?".

    Raises:
        UsageError: No server answers there, it refuses the token, or its schema is not OpenEnv's.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        url: str,
        field: str | None = None,
        reset: Mapping[str, Any] | None = None,
        longest: int = 4000,
        characters: str = "",
    ):
        if longest < 1:
            raise UsageError(f"reality.kwargs.longest must be >= 1, got {longest}")
        self._url, self._token = url.rstrip("/"), os.environ.get(TOKEN, "")
        self._setting = f"reality.env='{PREFIX}{self._url}'"
        self._check_url()
        self._connection: Any = None
        schema = self._schema()
        self._arguments = dict(reset or {})
        self._field = self._observation_field(schema, field)
        self._required = self._action_field(schema)
        charset = "".join(sorted({*CHARACTERS, *characters}))
        self.observation_space = Text(longest, min_length=0, charset=charset)
        self.action_space = Text(longest, charset=charset)
        self.environment_version = self._version()
        self._connect()

    def _check_url(self) -> None:
        """Raise UsageError where the address is none, or a token must not travel to it."""
        if "@" in self._url:
            raise UsageError(
                "reality.env must not name a user or password, which its artifacts would show; set"
                f" the environment variable {TOKEN}"
            )
        try:
            url = urlsplit(self._url)
            host, _ = url.hostname, url.port
        except ValueError:
            host = None
        if not host or url.scheme not in ("http", "https") or url.query or url.fragment:
            rule = f"{PREFIX}http://HOST:PORT or {PREFIX}https://HOST"
            raise UsageError(f"reality.env must be {rule}, got {PREFIX + self._url!r}")
        self._local = host in LOOPBACK
        if self._token and url.scheme == "http" and not self._local:
            raise UsageError(
                f"{self._setting} must be https, or the near end of a tunnel (ssh -NL"
                f" 8000:127.0.0.1:8000 {host}): {TOKEN} would travel unencrypted"
            )

    # -- what the server says of itself

    def _get(self, path: str) -> Any:
        """The JSON at a path. Raises UsageError where there is none."""
        request = urllib.request.Request(self._url + path)
        if self._token:  # not to where a redirect leads
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        handlers = [urllib.request.ProxyHandler({})] if self._local else []
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=CONNECT_S) as reply:
                return json.loads(reply.read(LARGEST))
        except urllib.error.HTTPError as error:
            raise self._refused(error.code, f"GET {path}") from error
        except (OSError, urllib.error.URLError) as error:
            raise self._unreachable(getattr(error, "reason", error)) from error
        except ValueError as error:
            raise self._foreign(f"GET {path} did not give JSON") from error

    def _refused(self, status: int, request: str) -> UsageError:
        if status not in (401, 403):
            return self._foreign(f"{request} gave HTTP {status}")
        fix = f"correct the environment variable {TOKEN}"
        if not self._token:
            fix = f"set the environment variable {TOKEN} to its token"
        return UsageError(f"{self._setting}: the server refused {request} (HTTP {status}); {fix}")

    def _unreachable(self, reason: Any) -> UsageError:
        text = " ".join(str(reason).split()) or type(reason).__name__
        fix = "start it, or correct the address"
        return UsageError(f"{self._setting}: no server answers there ({text}); {fix}")

    def _foreign(self, problem: str) -> UsageError:
        fix = "give the address of an OpenEnv server, without a path"
        return UsageError(f"{self._setting} does not speak OpenEnv's protocol: {problem}; {fix}")

    def _schema(self) -> dict[str, Any]:
        schema = self._get("/schema")
        parts = ("action", "observation")
        if not isinstance(schema, dict) or not all(isinstance(schema.get(x), dict) for x in parts):
            raise self._foreign("GET /schema has no 'action' and 'observation'")
        return schema

    def _observation_field(self, schema: Mapping[str, Any], field: str | None) -> str | None:
        names = schema["observation"].get("properties", {})
        if field is None:
            return "text" if "text" in names else None
        if field not in names:
            raise UsageError(
                f"reality.kwargs.field must be a field of the server's observations"
                f" ({', '.join(names)}), got {field!r}"
            )
        return field

    def _action_field(self, schema: Mapping[str, Any]) -> tuple[str, bool] | None:
        """The one required field of an action, and whether it is a text; None where there is not
        one.
        """
        required = schema["action"].get("required", [])
        if len(required) != 1:
            return None
        properties = schema["action"].get("properties", {})
        return required[0], properties.get(required[0], {}).get("type") == "string"

    def _version(self) -> str:
        """The server's name and version: part of the id of what is measured in it."""
        try:
            metadata = self._get("/metadata")
        except UsageError as error:
            cause = error.__cause__
            if isinstance(cause, urllib.error.HTTPError) and cause.code == 404:
                return "openenv"
            raise  # a server that is busy must not change what its steps belong to
        if not isinstance(metadata, dict):
            return "openenv"
        return f"openenv {metadata.get('name')} {metadata.get('version')}"

    # -- episodes

    def _connect(self) -> None:
        """Open a connection: a session of the server."""
        try:
            from websockets.exceptions import InvalidHandshake, InvalidStatus
            from websockets.sync.client import connect
        except ImportError as error:
            message = "openenv: needs the package websockets; pip install websockets"
            raise DependencyNotInstalled(message) from error
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        options: dict[str, Any] = {"proxy": None} if self._local else {}
        options |= {"open_timeout": CONNECT_S, "close_timeout": 1.0, "max_size": LARGEST}
        address = "ws" + self._url.removeprefix("http") + "/ws"
        try:
            self._connection = connect(address, additional_headers=headers, **options)
        except InvalidStatus as error:
            raise self._refused(error.response.status_code, "the connection to /ws") from error
        except InvalidHandshake as error:
            raise self._foreign(f"/ws is no WebSocket ({error})") from error
        except OSError as error:
            raise self._unreachable(error) from error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        data = ({} if seed is None else {"seed": seed}) | self._arguments | (options or {})
        fresh = self._connection is None
        if fresh:
            self._connect()
        try:
            reply = self._ask("reset", data)
        except ConnectionError:
            if fresh:
                raise
            self._connect()  # the server ended the connection while nothing was asked
            reply = self._ask("reset", data)
        text, _, _, info = self._read(reply)
        return text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._connection is None:
            raise ResetNeeded("the connection was lost: call reset() before step()")
        text, reward, ends, info = self._read(self._ask("step", self._action(action)))
        return text, reward, *ends, info

    def _action(self, text: str) -> dict[str, Any]:
        """The data of a step. Raises ValueError where the text is not the JSON that it must be."""
        if self._required is not None and self._required[1]:
            return {self._required[0]: text}
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the action {text[:60]!r} must be JSON for this server") from error
        if self._required is not None:
            return {self._required[0]: value}
        if not isinstance(value, dict):
            raise ValueError(f"the action {text[:60]!r} must be the JSON of an object")
        return value

    def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """The data of the answer to a message.

        Raises:
            ConnectionError: The server ended the connection or the session.
            RuntimeError: It answered with an error, or with something else than an observation.
        """
        from websockets.exceptions import ConnectionClosed

        try:
            self._connection.send(json.dumps({"type": kind, "data": data}))
            reply = json.loads(self._connection.recv(timeout=ANSWER_S))
        except ConnectionClosed as error:
            self._drop()
            raise ConnectionError(f"the server ended the connection at {kind}: {error}") from error
        except BaseException:  # the answer to this message may still come
            self._drop()
            raise
        answer = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(answer, dict):
            raise RuntimeError(f"the server's answer to {kind} is not OpenEnv's")
        if reply.get("type") == "error":
            message = " ".join(str(answer.get("message")).split())
            if answer.get("code") == "SESSION_ERROR":  # it is over, and another may begin
                self._drop()
                raise ConnectionError(f"the server ended the session at {kind}: {message:.500}")
            raise RuntimeError(f"the server refused {kind} ({answer.get('code')}): {message:.500}")
        if not isinstance(answer.get("observation"), dict):
            raise RuntimeError(f"the server's answer to {kind} has no observation")
        return answer

    def _read(
        self, answer: Mapping[str, Any]
    ) -> tuple[str, float, tuple[bool, bool], dict[str, Any]]:
        """(text, reward, (terminated, truncated), info) of an answer."""
        observation = answer["observation"]
        metadata = answer.get("metadata") or observation.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        value: Any = {name: observation[name] for name in observation if name != "metadata"}
        if self._field is not None:
            if self._field not in observation:
                raise RuntimeError(f"the server's observation has no field {self._field!r}")
            value = observation[self._field]
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        allowed = self.observation_space.character_set  # type: ignore[attr-defined]
        limit: int = self.observation_space.max_length  # type: ignore[attr-defined]
        text = "".join(c if c in allowed else "?" for c in text[:limit])
        done = bool(answer.get("done"))
        truncated = done and metadata.get("truncated") is True and not metadata.get("terminated")
        info: dict[str, Any] = {}
        commands = observation.get("commands")
        if isinstance(commands, list) and all(isinstance(each, str) for each in commands):
            info["admissible_commands"] = commands
        if "success" in metadata:
            info["success"] = bool(metadata["success"])
        reward = answer.get("reward")
        return text, float(reward or 0.0), (done and not truncated, truncated), info

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.socket.close()

    def close(self) -> None:
        """End the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            from websockets.exceptions import ConnectionClosed

            try:
                connection.send('{"type": "close"}')
                connection.close()
            except ConnectionClosed:
                pass
