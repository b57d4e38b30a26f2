"""OpenTelemetry spans of generative AI, in JSON: the OTLP form (`resourceSpans`) in one object or
one a line, or the SDKs' own form, one span an object.

Read are the attributes of the semantic conventions (https://github.com/open-telemetry/
semantic-conventions-genai): `gen_ai.operation.name`, `gen_ai.conversation.id`,
`gen_ai.input.messages`, `gen_ai.output.messages`, `gen_ai.system_instructions` and
`gen_ai.request.model`. A trace is the spans of one conversation, or else of one trace id. Each span
that calls a model (chat, generate_content, text_completion), by its start, is an action: its output
messages. The messages of its input after the last one of the assistant are the observation before.
A reward is an attribute of such a span, or of one of its events; on any other span of the trace it
is the reward of the trace.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mesocosm.data.ingest.readers.traces import (
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
from mesocosm.errors import UsageError

MODEL_CALLS = ("chat", "generate_content", "text_completion")
INPUT, OUTPUT = "gen_ai.input.messages", "gen_ai.output.messages"
RECORD = (
    "record the contents of messages (OTEL_SEMCONV_STABILITY_OPT_IN=gen_ai_latest_experimental and"
    " OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT)"
)


@dataclass(frozen=True)
class Span:
    place: str
    trace: str
    start: float
    attributes: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    """The attributes of its events."""

    @property
    def calls_model(self) -> bool:
        operation = self.attributes.get("gen_ai.operation.name")
        return operation in MODEL_CALLS or (operation is None and OUTPUT in self.attributes)


def holds(record: Any) -> bool:
    """True if a value of a file has spans."""
    if not isinstance(record, dict):
        return False
    return "resourceSpans" in record or ("attributes" in record and bool(_trace_id(record)))


def traces(path: str, options: TraceOptions) -> Iterator[Trace]:
    """The traces of a file, in the order of their first spans; faulty ones with their problem.

    Raises:
        UsageError: No span of the file calls a model.
    """
    spans: list[Span] = []
    for place, record in documents(path):
        try:
            spans += _spans(place, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{path!r} {place} holds no spans that can be read ({error!r}); export OTLP JSON"
            ) from error
    conversation: dict[str, str] = {}
    for span in spans:
        id = span.attributes.get("gen_ai.conversation.id")
        if id is not None:
            conversation.setdefault(span.trace, str(id))
    groups: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        id = span.attributes.get("gen_ai.conversation.id", conversation.get(span.trace))
        groups[span.trace if id is None else f"conversation {id}"].append(span)
    called = {name: group for name, group in groups.items() if any(s.calls_model for s in group)}
    if not called:
        raise UsageError(f"{path!r} has no span that calls a model; {RECORD}")
    for group in called.values():
        try:
            yield _trace(group, options)
        except TraceError as error:
            yield Trace(group[0].place, problem=str(error))


def _trace(group: Sequence[Span], options: TraceOptions) -> Trace:
    calls = sorted((span for span in group if span.calls_model), key=lambda span: span.start)
    messages: list[Message] = []
    for i, span in enumerate(calls):
        where = span.place
        if INPUT not in span.attributes or OUTPUT not in span.attributes:
            raise TraceError(f"{where}: a span has no {INPUT} or no {OUTPUT}; {RECORD}")
        before = _messages(span.attributes[INPUT], f"{where}: {INPUT}")
        if i == 0:
            parts = span.attributes.get("gen_ai.system_instructions")
            if parts is not None:
                system = [{"role": "system", "parts": _json(parts, where)}]
                messages += _messages(system, f"{where}: gen_ai.system_instructions")
            # An example in the prompt is not an action of this episode.
            before = [m if m.role in SYSTEM else Message("user", m.text) for m in before]
        else:
            last = max((j for j, m in enumerate(before) if m.role == "assistant"), default=-1)
            before = [m for m in before[last + 1 :] if m.role not in SYSTEM]
        outputs = _messages(span.attributes[OUTPUT], f"{where}: {OUTPUT}")
        if len(outputs) != 1:
            raise TraceError(f"{where}: {OUTPUT} must have one message, got {len(outputs)}")
        messages += [*before, Message("assistant", outputs[0].text, _reward(span, options))]
    fields: dict[str, Any] = {}
    for span in group:
        if not span.calls_model:
            for attributes in (span.attributes, *span.events):
                fields |= {k: v for k, v in attributes.items() if not k.startswith("gen_ai.input")}
    fields.setdefault(options.name("behaviour"), calls[0].attributes.get("gen_ai.request.model"))
    return build(group[0].place, messages, fields, options)


def _reward(span: Span, options: TraceOptions) -> float | None:
    rewards = [
        value
        for attributes in (span.attributes, *span.events)
        if (value := number(options.get(attributes, "reward"), options.name("reward"))) is not None
    ]
    return sum(rewards) if rewards else None


def _messages(value: Any, where: str) -> list[Message]:
    """The messages of an attribute, which may be JSON text. Raises TraceError."""
    value = _json(value, where)
    if not isinstance(value, list):
        raise TraceError(f"{where} must be a list of messages, got {value!r}")
    messages = []
    for i, raw in enumerate(value):
        if not isinstance(raw, dict) or not isinstance(raw.get("parts"), list):
            raise TraceError(f"{where}: message {i + 1} must have a role and parts, got {raw!r}")
        texts = [_part(part, f"{where}: message {i + 1}") for part in raw["parts"]]
        messages.append(Message(str(raw.get("role")), joined([t for t in texts if t is not None])))
    return messages


def _part(part: Any, where: str) -> str | None:
    """The text of a part of a message; None if the part is not read."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("content"), str):
        return str(part["content"])
    if kind == "tool_call":
        return call_line(part.get("name"), part.get("arguments"), where)
    if kind == "tool_call_response":
        answer = part.get("response", part.get("result"))
        return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    if kind == "reasoning":
        return None
    raise TraceError(f"{where} has a part of type {kind!r}, which must be text; remove it")


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise TraceError(f"{where} is not JSON ({error})") from error


def _trace_id(span: Mapping[str, Any]) -> str | None:
    context = span.get("context")
    inner = context if isinstance(context, dict) else {}
    return span.get("traceId") or span.get("trace_id") or inner.get("trace_id")


def _spans(place: str, record: Any) -> Iterator[Span]:
    """The spans of an object. Raises KeyError, TypeError, ValueError or AttributeError."""
    if "resourceSpans" not in record:
        yield _span(place, record)
        return
    for resource in record["resourceSpans"]:
        for scope in resource.get("scopeSpans", []):
            for span in scope.get("spans", []):
                yield _span(place, span)


def _span(place: str, span: Mapping[str, Any]) -> Span:
    start = span.get("startTimeUnixNano", span.get("start_time", 0))
    if isinstance(start, str) and not start.isdigit():
        start = datetime.fromisoformat(start).timestamp() * 1e9
    events = [_attributes(event.get("attributes") or {}) for event in span.get("events") or []]
    attributes = _attributes(span.get("attributes") or {})
    return Span(place, str(_trace_id(span)), float(start), attributes, events)


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes as a dict: OTLP's list of keys and typed values, or an object."""
    if isinstance(value, dict):
        return value
    return {item["key"]: _value(item["value"]) for item in value}


def _value(value: Any) -> Any:
    """A typed value of OTLP JSON, in which 64-bit integers are texts."""
    content: Any = None
    for kind, content in value.items():  # there is one, or none
        if kind == "intValue":
            return int(content)
        if kind == "arrayValue":
            return [_value(item) for item in content.get("values", [])]
        if kind == "kvlistValue":
            return _attributes(content.get("values", []))
    return content
