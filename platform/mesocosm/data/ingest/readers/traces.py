"""Traces of language agents: the rule that makes episodes of messages, and the reader around it.

    messages    role assistant                 an action: its text, then each tool call as a line
                                               {"name": ..., "arguments": {...}}
                the messages between actions   the observation: their texts, joined by new lines
                before the first action        system and developer: the task; the rest: o_0
    the end     after an action                the last observation is the empty text, and the
                                               episode is terminated: the agent ended it
                after an observation           the episode is unfinished
                fields terminated, truncated   of the trace, where it has them, decide instead
    reward      of a message                   belongs to its action, or to the action before it
                of the trace                   belongs to the last action

Consecutive messages of the assistant are one action. A format gives `Trace`s (`chat`, `otel`,
`agentworld`); `TraceReader` makes rows of the documented schema of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from mesocosm.data.ingest.readers import BATCH_BYTES, PROBLEM, About, LogPiece
from mesocosm.data.ingest.readers.files import open_file
from mesocosm.datasets.texts import utf8_problem
from mesocosm.errors import UsageError

SYSTEM = ("system", "developer")
OBSERVED = ("user", "tool", "function")
TASKS = ("system", "prompt", "none")
REWARDS = ("required", "zero")
HEAD_EPISODES = 100
LAST = "the empty text, where the trace ends with an action"


@dataclass
class TraceConfig:
    """How traces of language agents become episodes."""

    task: str = "system"
    """The task of a trace: system (its system and developer messages), prompt (all messages
    before the first action, which leaves the first observation empty), or none (all of these are
    the first observation).
    """
    reward: str = "required"
    """A trace without a reward: required (it is a fault), or zero (its rewards are 0)."""


@dataclass(frozen=True)
class TraceOptions:
    """`TraceConfig` with the names of fields, as a piece of a file carries it."""

    task: str = "system"
    reward: str = "required"
    fields: Mapping[str, str] = field(default_factory=dict)
    """The schema's name -> the trace's, of `columns`."""

    def name(self, standard: str) -> str:
        """The trace's name of a field."""
        return self.fields.get(standard, standard)

    def get(self, record: Mapping[str, Any], standard: str) -> Any:
        """The field of a record by its name or dotted path, or None."""
        name = self.name(standard)
        if name in record:
            return record[name]
        value: Any = record
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value


class TraceError(Exception):
    """The reason why a trace is not an episode, and the fix."""


@dataclass(frozen=True)
class Message:
    role: str
    text: str
    """An action's text holds its tool calls too."""
    reward: float | None = None


@dataclass(frozen=True)
class Trace:
    """An episode of T actions."""

    place: str
    """The place in its file: `line 3`."""
    task: str = ""
    observations: Sequence[str] = ()
    """[T+1]"""
    actions: Sequence[str] = ()
    rewards: Sequence[float] = ()
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    behaviour: str | None = None
    problem: str | None = None
    """The reason why it is not an episode; then it has no observations."""


def joined(texts: Sequence[str]) -> str:
    """The texts of consecutive messages as one."""
    return "\n".join(texts)


def call_line(name: Any, arguments: Any, where: str) -> str:
    """A tool call as a line of JSON.

    Args:
        name: The name of the tool.
        arguments: An object, or its JSON text; null and the empty text are no arguments.
        where: The message, for errors.

    Raises:
        TraceError: The arguments are not JSON.
    """
    if not isinstance(name, str):
        raise TraceError(f"{where}: a tool call has no name; give function.name")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise TraceError(
                f"{where}: the arguments of the tool call {name!r} are not JSON ({error})"
            ) from error
    return json.dumps({"name": name, "arguments": arguments or {}}, ensure_ascii=False)


def number(value: Any, name: str) -> float | None:
    """A reward as a float, or None without a reward. Raises TraceError if it is not a number."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float):
        raise TraceError(f"the reward {name!r} must be a number, got {value!r}")
    return float(value)


def flag(value: Any, name: str) -> bool | None:
    """A field that is true, false, 1 or 0. Raises TraceError where it is another value."""
    if value is None or value in (True, False):
        return None if value is None else bool(value)
    raise TraceError(f"{name} must be true or false, got {value!r}")


def build(
    place: str, messages: Sequence[Message], record: Mapping[str, Any], options: TraceOptions
) -> Trace:
    """The episode of a trace, by the rule of this module.

    Args:
        place: Where the trace is in its file.
        messages: In order.
        record: The fields of the trace: reward, terminated, truncated, success, behaviour.
        options: The task, the rewards and the names of fields.

    Raises:
        TraceError: There is no action, no reward, or a field of another kind.
    """
    acts = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not acts:
        raise TraceError("it has no action: no message has the role assistant")
    prompt = messages[: acts[0]]
    is_task = {
        "system": lambda message: message.role in SYSTEM,
        "prompt": lambda message: True,
        "none": lambda message: False,
    }[options.task]
    task = joined([m.text for m in prompt if is_task(m)])
    observations = [joined([m.text for m in prompt if not is_task(m)])]
    actions: list[str] = []
    rewards: list[float | None] = []
    acting = False
    for message in messages[acts[0] :]:
        if message.role == "assistant" and acting:
            actions[-1] = joined([actions[-1], message.text])
        elif message.role == "assistant":
            actions.append(message.text)
            rewards.append(None)
        elif acting:
            observations.append(message.text)
        else:
            observations[-1] = joined([observations[-1], message.text])
        acting = message.role == "assistant"
        if message.reward is not None:
            rewards[-1] = (rewards[-1] or 0.0) + message.reward
    observations += [""] if acting else []
    return finished(place, task, observations, actions, rewards, record, options, ends=acting)


def finished(
    place: str,
    task: str,
    observations: Sequence[str],
    actions: Sequence[str],
    rewards: Sequence[float | None],
    record: Mapping[str, Any],
    options: TraceOptions,
    *,
    ends: bool,
) -> Trace:
    """The episode of T+1 observations and T actions, with the fields of its record.

    Args:
        place: Where the trace is in its file.
        task: "" without a task.
        observations: [T+1]
        actions: [T]
        rewards: [T] None where an action has none of its own.
        record: The fields of the trace.
        options: The names of fields.
        ends: The agent ended the episode, where no field says how it ended.

    Raises:
        TraceError: There is no reward, a field of another kind, or a text that UTF-8 cannot hold.
    """
    for text in (task, *observations, *actions):
        if (problem := utf8_problem(text)) is not None:
            raise TraceError(problem)
    terminated, truncated, success = (
        flag(options.get(record, name), options.name(name))
        for name in ("terminated", "truncated", "success")
    )
    if terminated is None:
        terminated = ends and not truncated
    name = options.name("reward")
    total = number(options.get(record, "reward"), name)
    values = [reward or 0.0 for reward in rewards]
    if any(reward is not None for reward in rewards):
        if total is not None and not math.isclose(total, sum(values), abs_tol=1e-9):
            raise TraceError(
                f"its own {name!r} is {total:g} and those of its messages sum to {sum(values):g};"
                " remove one of them"
            )
    elif total is not None:
        values[-1] = total
    elif options.reward != "zero":
        raise TraceError(
            f"it has no reward: neither the trace nor a message has the field {name!r}; set"
            " columns.reward=NAME to the field that holds it, or traces.reward=zero"
        )
    behaviour = options.get(record, "behaviour")
    return Trace(
        place,
        task,
        observations,
        actions,
        values,
        terminated,
        bool(truncated),
        success,
        behaviour if isinstance(behaviour, str) else None,
    )


def documents(path: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of the lines of a file, or of the items of one that is a list in JSON.

    Raises:
        UsageError: The file or a line is not JSON, which names file and line.
    """
    try:
        with open_file(path) as file:
            if path.endswith(".json"):
                value = _parsed(file.read(), f"{path!r}", "give a whole JSON file")
                items = value if isinstance(value, list) else [value]
                for i, item in enumerate(items):
                    yield (f"item {i + 1}" if isinstance(value, list) else "the file"), item
                return
            for i, line in enumerate(file):
                if line.strip():
                    fix = "write one object a line, and remove a line that was cut short"
                    yield f"line {i + 1}", _parsed(line, f"{path!r} line {i + 1}", fix)
    except OSError as error:
        raise UsageError(
            f"{path!r} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _parsed(text: bytes, where: str, fix: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({error}); {fix}") from error


class TraceReader:
    """Reads a format of traces (`readers`). A file is one piece: a trace may be anywhere in it."""

    def __init__(self, traces: Callable[[str, TraceOptions], Iterator[Trace]], name: str):
        """Read the episodes that `traces(path, options)` gives, of a format with this name."""
        self._traces, self._name = traces, name

    def about(self, path: str) -> About:
        """The remarks of the format on the columns."""
        notes = {
            "observation": f"{self._name}: see docs/text.md for the rule; {LAST}",
            "action": "the messages of the assistant, with their tool calls as lines of JSON",
            "task": "system: what the trace calls its task (traces.task)",
            "reward": "of the messages, or of the trace: then of its last action",
            "success": "the field of the trace, where it has one",
            "next_observation": "",
        }
        return About(notes=notes)

    def head(self, path: str, options: TraceOptions) -> pa.Table:
        """The rows of the first traces."""
        traces = []
        for trace in self._traces(path, options):
            traces.append(trace)
            if len(traces) == HEAD_EPISODES:
                break
        if not traces:
            return pa.table({})
        with_task = any(trace.task for trace in traces)
        return _table(traces, options, "0", with_task).drop_columns([PROBLEM])

    def pieces(self, path: str) -> list[tuple[int, int]]:
        """One: the whole file."""
        return [(0, 1)]

    def read(self, piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows of the file's traces."""
        options = piece.traces
        assert isinstance(options, TraceOptions)
        with_task = options.name("task") in columns
        batch: list[Trace] = []
        size, begin = 0, 0
        for trace in self._traces(piece.path, options):
            batch.append(trace)
            size += sum(map(len, (*trace.observations, *trace.actions)))
            if size >= BATCH_BYTES:
                yield _table(batch, options, str(piece.source + 1), with_task, begin)
                begin += len(batch)
                batch, size = [], 0
        if batch:
            yield _table(batch, options, str(piece.source + 1), with_task, begin)


def _table(
    traces: Sequence[Trace], options: TraceOptions, source: str, with_task: bool, begin: int = 0
) -> pa.Table:
    """The rows of traces: T+1 of an episode, the last without an action; one of a faulty trace."""
    rows: list[dict[str, Any]] = []
    for i, trace in enumerate(traces):
        text = trace.problem
        if text is None and trace.task and not with_task:
            text = (
                "it has a task (system messages), and the first traces of the import have none; set"
                " traces.task=none, or give a trace with a task first"
            )
        problem = None if text is None else f"{trace.place}: {text}"
        facts = {
            "episode": f"{source}/{begin + i + 1}",
            "behaviour": trace.behaviour,
            "success": trace.success,
            "task": {"system": trace.task} if with_task else None,
            PROBLEM: problem,
        }
        length = len(trace.actions)
        for t in range(length + 1):
            row = {"step": t, "observation": "" if problem else trace.observations[t]}
            if t < length or problem:
                last = t == length - 1
                row |= {
                    "action": "" if problem else trace.actions[t],
                    "reward": 0.0 if problem else trace.rewards[t],
                    "terminated": last and trace.terminated,
                    "truncated": last and trace.truncated,
                }
            rows.append(facts | row)
    types = {
        "episode": pa.string(),
        "step": pa.int64(),
        "observation": pa.large_string(),
        "action": pa.large_string(),
        "reward": pa.float64(),
        "terminated": pa.bool_(),
        "truncated": pa.bool_(),
        "behaviour": pa.string(),
        "success": pa.bool_(),
        PROBLEM: pa.string(),
    }
    if with_task:
        types["task"] = pa.struct([("system", pa.large_string())])
    table = pa.table(
        {name: pa.array([row.get(name) for row in rows], type) for name, type in types.items()}
    )
    return table.rename_columns([options.name(name) for name in table.column_names])
