"""Chats in the form of OpenAI's API: JSONL, or a list in JSON, of objects with `messages`.

A message has a role (system, developer, user, assistant, tool or function), a content (a text, or
parts of type text), and of the assistant `tool_calls`, whose `function.arguments` is JSON. The
source of the form: https://platform.openai.com/docs/api-reference/chat. Other fields of messages
and of the object, such as `reasoning_content`, are not read, except those of `traces`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mesocosm.data.ingest.readers.traces import (
    OBSERVED,
    SYSTEM,
    Message,
    Trace,
    TraceError,
    TraceOptions,
    build,
    call_line,
    documents,
    joined,
    number,
)


def holds(record: Any) -> bool:
    """True if a value of a file is a chat."""
    return isinstance(record, dict) and isinstance(record.get("messages"), list)


def traces(path: str, options: TraceOptions) -> Iterator[Trace]:
    """The traces of a file, in order; faulty ones with their problem."""
    for place, record in documents(path):
        try:
            if not holds(record):
                raise TraceError("it has no list of messages; give an object with messages")
            messages = [
                _message(raw, f"message {i + 1}", options)
                for i, raw in enumerate(record["messages"])
            ]
            fields = dict(record)
            fields.setdefault(options.name("behaviour"), record.get("model"))
            yield build(place, messages, fields, options)
        except TraceError as error:
            yield Trace(place, problem=str(error))


def _message(raw: Any, where: str, options: TraceOptions) -> Message:
    role = raw.get("role") if isinstance(raw, dict) else None
    if role not in (*SYSTEM, *OBSERVED, "assistant"):
        roles = ", ".join((*SYSTEM, *OBSERVED, "assistant"))
        raise TraceError(f"{where} must have a role of {roles}, got {role!r}")
    lines = [text] if (text := content(raw.get("content"), where)) else []
    if role == "assistant":
        calls = raw.get("tool_calls") or []
        if not isinstance(calls, list):
            raise TraceError(f"{where}: tool_calls must be a list, got {calls!r}")
        if raw.get("function_call"):
            calls = [*calls, {"function": raw["function_call"]}]
        for call in calls:
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping):
                raise TraceError(f"{where}: a tool call must have a function, got {call!r}")
            lines.append(call_line(function.get("name"), function.get("arguments"), where))
    return Message(role, joined(lines), number(options.get(raw, "reward"), "reward"))


def content(value: Any, where: str) -> str:
    """The text of a message's content.

    Args:
        value: A text, parts of type text, or null.
        where: The message, for errors.

    Raises:
        TraceError: A part is not text.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise TraceError(f"{where}: content must be a text or a list of parts, got {value!r}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise TraceError(f"{where} has a part of type {kind!r}, which must be text; remove it")
        texts.append(text)
    return joined(texts)
