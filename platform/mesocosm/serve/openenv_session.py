"""One client's session in OpenEnv's wire protocol (of openenv 0.10), without its connection.

A message is a JSON object; so is its reply:

    {"type": "reset", "data": {seed, episode_id, split, index}}   -> observation
    {"type": "step", "data": {"text": ACTION}}                    -> observation
    {"type": "state"}                                             -> state
    {"type": "close"}                                             -> nothing

    {"type": "observation", "data": {"observation": {text, task, commands, metadata}, "reward",
    "done"}}
    {"type": "state", "data": {episode_id, step_count, seed, split, index}}
    {"type": "error", "data": {message, code}}

Whatever else `data` of a reset holds is ignored, as OpenEnv's own server does: trainers pass whole
rows of their data. An error changes nothing: the episode continues with the next valid message.
"""

from __future__ import annotations

import json
import logging
import secrets
import uuid
from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mesocosm.envs import text as text_envs
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.check import shown
from mesocosm.serve.http_sessions import HttpSessions, UnknownSession, to_json
from mesocosm.serve.schema import Model, json_type
from mesocosm.serve.tasks import GENERATED, Tasks

logger = logging.getLogger(__name__)
TYPES = ("reset", "step", "state", "close")
SEEDS = 1 << 31
"""The seeds that a session without one draws from"""
LARGEST_SEED = (1 << 63) - 1
LONGEST_ID = 255
"""Characters of an episode's id"""


class TextAction(Model):
    text: str = Field(description="the action")
    metadata: dict[str, Any] = {}
    """Ignored"""


class TextObservation(Model):
    """The schema of an observation. Messages have `reward` and `done` beside it; OpenEnv's schemas
    name them as its parts.
    """

    text: str
    """The observation; in a world whose observations are not texts, its JSON. Images are base64 of
    PNG, without quotes where the observation is one image
    """
    task: dict[str, bool | int | float | str]
    """The reset options of the episode's task; empty where the world has none"""
    commands: list[str] | None = None
    """The commands that make sense now, where the world's environment is one of
    `mesocosm.envs.text`, which derive them from the texts; else null
    """
    metadata: dict[str, Any]
    """After a step: `disagreement` (1 is what a tenth of held-out transitions exceed), `diverged`,
    `terminated` and `truncated`
    """
    reward: float | None = None
    """Null after a reset"""
    done: bool = False
    """The episode has ended: send reset"""


class EpisodeState(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)
    episode_id: str | None = None
    """The id that the reset named, or a drawn one; null before the first reset"""
    step_count: int = 0
    seed: int | None = None
    """With the same seed, split, index and actions another session has the same episode"""
    split: str | None = None
    index: int | None = None


class SessionOver(Exception):
    """The session cannot continue; the client must connect again. Its text is the last reply."""


def evicted() -> SessionOver:
    """The end of a session whose place another client has taken."""
    problem = "this session was unused for long and another one took its place"
    return SessionOver(error_reply("SESSION_ERROR", f"{problem}; connect and reset again"))


def action_schema(action_space: Any) -> dict[str, Any]:
    """The JSON schema of an action: one required field `text`, as trainers want it."""
    schema = TextAction.model_json_schema()
    if not isinstance(action_space, spaces.Text):
        inner = json.dumps(TypeAdapter(json_type(action_space, "Inner")).json_schema())
        schema["properties"]["text"]["description"] = f"the action as JSON, of the schema {inner}"
    return schema


def error_reply(code: str, message: str) -> str:
    """An error as the client gets it."""
    text = message.encode("utf-8", "backslashreplace").decode()
    return encoded("error", {"message": text, "code": code})


def encoded(kind: str, data: dict[str, Any]) -> str:
    return to_json({"type": kind, "data": data}).decode()


def commands_of(environment: str) -> Callable[[str, str], list[str]] | None:
    """The function of an episode's first and latest text that lists the sensible commands, of the
    environment with this id; None where it does not come with Mesocosm: a server runs no program
    that a world names.
    """
    module, _, name = environment.rpartition(":")
    if module != text_envs.__name__ or name not in gymnasium.registry:
        return None
    entry_point = gymnasium.registry[name].entry_point
    function: Callable[[str, str], list[str]] | None = None
    if isinstance(entry_point, str):
        function = getattr(load_env_creator(entry_point), "candidates", None)
    return function


class OpenEnvSession:
    """Answers the messages of one client, one at a time.

    Args:
        sessions: The sessions of the ingress, in which it takes the place of one.
        tasks: The world's tasks.

    Raises:
        PoolFull: All places are taken.
        MesocosmError: No replica answers.
    """

    def __init__(self, sessions: HttpSessions, tasks: Tasks):
        self._sessions, self._tasks = sessions, tasks
        self._action_space = sessions.codec.action_space
        self._action: TypeAdapter[Any] | None = None
        if not isinstance(self._action_space, spaces.Text):
            self._action = TypeAdapter(json_type(self._action_space, "Action"))
        self._state = EpisodeState()
        self._over = True
        """True before the first reset and after an episode's end"""
        self._commands = commands_of(sessions.codec.environment["id"])
        self._first_text = ""
        horizon = sessions.codec.environment.get("max_episode_steps")
        self._name = sessions.open(horizon=horizon)

    def check(self) -> None:
        """Raise SessionOver where another client took this session's place while it was unused."""
        if not self._sessions.has(self._name):
            raise evicted()

    def close(self) -> None:
        """Free the session's place."""
        self._sessions.sessions.pop(self._name)

    def answer(self, text: str) -> str | None:
        """Return the reply to a message, or None to `close`.

        Raises:
            SessionOver: The session was evicted.
        """
        try:
            message = json.loads(text)
        except (ValueError, RecursionError) as error:
            return error_reply("INVALID_JSON", f"the message is not JSON ({error}); send an object")
        if not isinstance(message, dict):
            return error_reply("VALIDATION_ERROR", f"the message must be an object, got {text:.60}")
        kind, data = message.get("type"), message.get("data", {})
        if kind not in TYPES:
            rule = f"type must be one of {', '.join(TYPES)}, got {shown(kind)}"
            return error_reply("UNKNOWN_TYPE", rule)
        if kind == "close":
            return None
        if not isinstance(data, dict):
            return error_reply("VALIDATION_ERROR", f"data must be an object, got {shown(data)}")
        try:
            return self._answer(kind, data)
        except UsageError as error:
            return error_reply("VALIDATION_ERROR", str(error))
        except UnknownSession as error:
            raise evicted() from error
        except MesocosmError as error:
            return error_reply("EXECUTION_ERROR", str(error))
        except Exception:
            logger.exception("a message %r failed", kind)
            problem = "the server failed on this message, which is a bug; see its log"
            return error_reply("EXECUTION_ERROR", problem)

    def _answer(self, kind: str, data: dict[str, Any]) -> str:
        if kind == "reset":
            return self._reset(data)
        if kind == "step":
            return self._step(data)
        return encoded("state", self._state.model_dump())

    def _reset(self, data: dict[str, Any]) -> str:
        seed = _integer(data, "seed", LARGEST_SEED)
        index = _integer(data, "index", LARGEST_SEED)
        split, episode_id = data.get("split"), data.get("episode_id")
        named = isinstance(episode_id, str) and episode_id.isprintable()
        if episode_id is not None and not (named and len(episode_id) <= LONGEST_ID):
            rule = f"a printable text of at most {LONGEST_ID} characters"
            raise UsageError(f"episode_id must be {rule}, got {shown(episode_id)}")
        if (split is None) != (index is None):
            got = f"split={shown(split)} and index={shown(index)}"
            raise UsageError(f"split and index must come together, got {got}; give both, or none")
        start = None
        if split is not None and index is not None:
            start = self._tasks.start(split, index)
            if split == GENERATED:
                if seed not in (None, index):
                    problem = f"seed must be the index of a generated task, got {seed}"
                    raise UsageError(f"{problem}; leave seed out")
                seed = index
        if seed is None:
            seed = secrets.randbelow(SEEDS)
        self._over = True
        reply = self._sessions.begin(self._name, seed, start)
        self._over = False
        name = uuid.uuid4().hex if episode_id is None else episode_id
        self._state = EpisodeState(episode_id=name, seed=seed, split=split, index=index)
        return self._observed(reply, None, False, {})

    def _step(self, data: dict[str, Any]) -> str:
        action = self._parse(data)
        if self._over:
            raise MesocosmError("the episode is over, or none began; send reset before step")
        reply = self._sessions.step(self._name, [action], True)
        terminated, truncated = bool(reply["terminated"][0]), bool(reply["truncated"][0])
        self._over = terminated or truncated
        self._state.step_count += 1
        infos = {"terminated": terminated, "truncated": truncated}
        for name in ("disagreement", "diverged", "duration"):
            if reply[name] is not None:
                infos[name] = reply[name][0]
        return self._observed(reply, reply["reward"][0], self._over, infos)

    def _parse(self, data: dict[str, Any]) -> Any:
        """The action of a step's data. Raises UsageError if it is not an action of the world.

        A client may have parsed a model's reply as JSON, as verifiers does: a number or a list is
        then the text that it was parsed from.
        """
        if "text" not in data or data.keys() - {"text", "metadata"}:
            keys = shown(list(data))
            raise UsageError(f"data must have the one field 'text', got {keys}; see GET /schema")
        text = data["text"]
        if self._action is None:
            return text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        if isinstance(text, str):
            try:
                text = json.loads(text)
            except (ValueError, RecursionError) as error:
                problem = f"text must be the action as JSON, got {shown(text)} ({error})"
                raise UsageError(f"{problem}; see GET /schema") from error
        try:
            return self._action.validate_python(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(["text", *map(str, first["loc"])])
            raise UsageError(
                f"{key}={shown(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}; see"
                " GET /schema"
            ) from error

    def _observed(
        self, reply: dict[str, Any], reward: float | None, done: bool, infos: dict[str, Any]
    ) -> str:
        observation = reply["observation"][0]
        text = observation if isinstance(observation, str) else to_json(observation).decode()
        if reward is None:
            self._first_text = text
        commands = None if self._commands is None else self._commands(self._first_text, text)
        task = reply["task"][0] if reply["task"] else {}
        seen = {"text": text, "task": task, "commands": commands, "metadata": infos}
        return encoded("observation", dict(observation=seen, reward=reward, done=done))


def _integer(data: dict[str, Any], key: str, largest: int) -> int | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest:
        raise UsageError(f"{key} must be an integer from 0 to {largest}, got {shown(value)}")
    return value
