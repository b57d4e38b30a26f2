"""Builders of traces of language agents, and what their imports give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.jobs.import_logs import JOB
from mesocosm.store.artifacts import Artifact

from .logs import configured

Import = Callable[..., Artifact]
Record = dict[str, Any]
SEARCH = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q": "日"}'}}


def say(role: str, text: Any, **more: Any) -> Record:
    return {"role": role, "content": text, **more}


def chat(**fields: Any) -> Record:
    """Two actions: a tool call, and the answer that ends it."""
    messages = [
        say("system", "You are a clerk."),
        say("user", "Find the day 🙂"),
        say("assistant", "I search.", tool_calls=[SEARCH]),
        say("tool", "Sunday", tool_call_id="1"),
        say("user", "Hurry!"),
        say("assistant", "It is Sunday."),
    ]
    return {"messages": messages, "reward": 1.0} | fields


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def episodes(artifact: Artifact) -> list[Episode]:
    return list(Dataset([artifact.path]).iter_episodes())


def refused(path: Path, **keys: Any) -> str:
    """The one sentence that refuses an import."""
    with pytest.raises(UsageError) as caught:
        JOB.preview(configured(path, **keys))
    message = str(caught.value)
    assert "\n" not in message
    return message


def sample(**fields: Any) -> Record:
    return {
        "task": "terminal",
        "id": 7,
        "system_str": "# Role\nYou simulate a terminal.",
        "prompt": ["**Action:** ls", "**Action:** pwd"],
        "response": ["a.txt", "/home"],
        "turn_idx": 1,
        "total_turns": 2,
    } | fields


def part(text: str) -> Record:
    return {"type": "text", "content": text}


def message(role: str, *parts: Record) -> Record:
    return {"role": role, "parts": list(parts)}


QUESTION = message("user", part("What day?"))
ASKED = message(
    "assistant",
    {"type": "reasoning", "content": "hm"},
    {"type": "tool_call", "id": "1", "name": "day", "arguments": {"zone": "日"}},
)
ANSWER = message("tool", {"type": "tool_call_response", "id": "1", "response": {"day": "Sun"}})
DONE = message("assistant", part("Sunday."))


def span(start: int, inputs: list[Record], output: Record, **attributes: Any) -> Record:
    facts: Record = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m1",
        "gen_ai.input.messages": json.dumps(inputs),
        "gen_ai.output.messages": [output],
        "gen_ai.system_instructions": [part("You tell days.")],
    } | attributes
    return {"traceId": "t", "startTimeUnixNano": str(start), "name": "chat", "attributes": facts}


def value(raw: Any) -> Record:
    """A value in the form of OTLP JSON."""
    if isinstance(raw, dict):
        return {"kvlistValue": {"values": typed(raw)}}
    if isinstance(raw, list):
        return {"arrayValue": {"values": list(map(value, raw))}}
    if isinstance(raw, int):
        return {"intValue": str(raw)}
    return {"doubleValue": raw} if isinstance(raw, float) else {"stringValue": raw}


def typed(attributes: Record) -> list[Record]:
    return [{"key": key, "value": value(raw)} for key, raw in attributes.items()]


def otlp(*spans: Record) -> Record:
    inside = [item | {"attributes": typed(item["attributes"])} for item in spans]
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": inside}]}]}


def conversation(**attributes: Any) -> list[Record]:
    """The spans of a trace, the later one first, with a root span and another program's span."""
    root = {"traceId": "t", "name": "invoke_agent", "attributes": {"reward": 2.5}}
    other = {"traceId": "u", "name": "GET", "attributes": {"http.status": 200}}
    second = span(200, [QUESTION, ASKED, ANSWER], DONE, **attributes)
    return [second, other, root, span(100, [QUESTION], ASKED, **attributes)]
