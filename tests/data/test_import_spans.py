"""Import of OpenTelemetry's spans of language agents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .traces import (
    ANSWER,
    ASKED,
    DONE,
    QUESTION,
    Import,
    conversation,
    episodes,
    lines,
    message,
    otlp,
    refused,
    span,
)


@pytest.mark.parametrize("form", ["otlp", "lines", "spans"])
def test_spans(folder: Path, import_logs: Import, form: str) -> None:
    spans = conversation()
    if form == "otlp":
        path = folder / "a.json"
        path.write_text(json.dumps(otlp(*spans)))
    elif form == "lines":
        path = lines(folder / "a.jsonl", *map(otlp, spans))
    else:
        path = lines(folder / "a.jsonl", *spans)
    (episode,) = episodes(import_logs(path))
    assert episode.observations == ["What day?", '{"day": "Sun"}', ""]
    assert episode.actions == ['{"name": "day", "arguments": {"zone": "日"}}', "Sunday."]
    assert episode.rewards.tolist() == [0, 2.5] and episode.outcome == "terminated"
    assert episode.task == {"system": "You tell days."} and episode.behaviour == "m1"


def test_spans_of_one_conversation_and_rewards_of_spans(folder: Path, import_logs: Import) -> None:
    """Conversations may span traces. A span's event may hold the score of its action."""
    name = "gen_ai.evaluation.score.value"
    one, two = {"gen_ai.conversation.id": "c1"}, {"gen_ai.conversation.id": "c2"}
    first = span(1, [QUESTION], ASKED, **one, **{name: 0.5})
    later = span(3, [QUESTION, ASKED, ANSWER], DONE, **one) | {
        "traceId": "later",
        "events": [{"name": "gen_ai.evaluation.result", "attributes": {name: 1}}],
    }
    other = span(2, [QUESTION], DONE, **two, **{name: 4.0}) | {"traceId": "x"}
    path = lines(folder / "a.jsonl", first, other, later)
    both = episodes(import_logs(path, columns={"reward": name}))
    assert [episode.rewards.tolist() for episode in both] == [[0.5, 1], [4]]


def test_spans_that_are_no_episodes(folder: Path) -> None:
    empty = span(1, [QUESTION], DONE)
    del empty["attributes"]["gen_ai.output.messages"]
    assert "CAPTURE_MESSAGE_CONTENT" in refused(lines(folder / "a.jsonl", empty))
    other = {"traceId": "u", "name": "GET", "attributes": {"http.status": 200}}
    assert "no span that calls a model" in refused(lines(folder / "b.jsonl", other))
    bad = span(1, [QUESTION], DONE, **{"gen_ai.input.messages": '[{"role"'})
    problem = refused(lines(folder / "c.jsonl", bad))
    assert "c.jsonl" in problem and "line 1: gen_ai.input.messages is not JSON" in problem
    image = span(1, [message("user", {"type": "blob", "content": "x"})], DONE)
    assert "'blob', which must be text" in refused(lines(folder / "d.jsonl", image))
    assert "no reward" in refused(lines(folder / "e.jsonl", span(1, [QUESTION], DONE)))
