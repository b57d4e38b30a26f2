"""Import of traces of language agents: chats, OpenTelemetry spans, AgentWorldBench."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gymnasium import spaces

from mesocosm.data.ingest.readers import agentworld, otel
from mesocosm.data.ingest.readers import chat as chat_reader
from mesocosm.data.ingest.readers.traces import TraceConfig, TraceOptions
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs.import_logs import JOB
from mesocosm.store.artifacts import Storage

from .logs import configured, report
from .traces import Import, Record, chat, conversation, episodes, lines, otlp, refused, sample, say


def test_a_chat_is_an_episode(folder: Path, import_logs: Import) -> None:
    result = import_logs(lines(folder / "a.jsonl", chat(model="clerk-1"), chat(success=True)))
    first, second = episodes(result)
    call = '{"name": "search", "arguments": {"q": "日"}}'
    assert first.observations == ["Find the day 🙂", "Sunday\nHurry!", ""]
    assert first.actions == [f"I search.\n{call}", "It is Sunday."]
    assert first.rewards.tolist() == [0, 1] and first.outcome == "terminated"
    assert first.task == {"system": "You are a clerk."} and first.behaviour == "clerk-1"
    assert first.success is None and second.success is True
    assert second.behaviour == "imported"
    table = {row["became"].partition(":")[0]: row["how"] for row in report(result)["columns"]}
    assert "the empty text" in table["observation"] and "tool calls" in table["action"]


@pytest.mark.parametrize(
    ("task", "first", "options"),
    [
        ("system", "Find the day 🙂", {"system": "You are a clerk."}),
        ("prompt", "", {"system": "You are a clerk.\nFind the day 🙂"}),
        ("none", "You are a clerk.\nFind the day 🙂", {}),
    ],
)
def test_the_task_is_a_choice(
    folder: Path, import_logs: Import, task: str, first: str, options: Record
) -> None:
    result = import_logs(lines(folder / "a.jsonl", chat()), traces=TraceConfig(task=task))
    (episode,) = episodes(result)
    assert episode.observations[0] == first and episode.task == options


def test_without_system_messages_there_is_no_task(folder: Path, import_logs: Import) -> None:
    """A trace that has one among those that have none is a fault, and the other way it is empty."""
    plain = chat()
    del plain["messages"][0]
    (episode,) = episodes(import_logs(lines(folder / "a.jsonl", plain)))
    assert episode.task == {} and episode.observations[0] == "Find the day 🙂"
    late = lines(folder / "b.jsonl", *[plain] * 100, chat())
    assert "line 101: it has a task" in refused(late)
    lines(folder / "c.jsonl", chat())
    assert "c.jsonl" in refused(folder / "[ac].jsonl")
    both = episodes(import_logs(folder / "c.jsonl", folder / "a.jsonl"))
    assert [episode.task for episode in both] == [{"system": "You are a clerk."}, {"system": ""}]


def test_rewards_of_messages_belong_to_the_action_before(folder: Path, import_logs: Import) -> None:
    trace = chat()
    del trace["reward"]
    trace["messages"][3]["score"] = 0.25
    trace["messages"][4]["score"] = 0.25
    trace["messages"][5]["score"] = 2
    (episode,) = episodes(
        import_logs(lines(folder / "a.jsonl", trace), columns={"reward": "score"})
    )
    assert episode.rewards.tolist() == [0.5, 2]
    nested = chat(reward=None, grade={"points": 3})
    path = lines(folder / "b.jsonl", nested)
    (episode,) = episodes(import_logs(path, columns={"reward": "grade.points"}))
    assert episode.rewards.tolist() == [0, 3]


def test_how_an_episode_ends(folder: Path, import_logs: Import) -> None:
    unfinished = chat()
    unfinished["messages"].append(say("user", "Thanks"))
    cut = chat(truncated=True)
    never = chat(terminated=False)
    result = import_logs(lines(folder / "a.jsonl", chat(), unfinished, cut, never))
    ends = [episode.outcome for episode in episodes(result)]
    assert ends == ["terminated", "unfinished", "truncated", "unfinished"]
    assert episodes(result)[1].observations[-1] == "Thanks"


def test_forms_of_chats(folder: Path, import_logs: Import) -> None:
    """Parts, calls of the old form, arguments as objects, several messages of the assistant."""
    messages = [
        say("developer", [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]),
        say("user", "Go", name="x"),
        say("assistant", None, function_call={"name": "run", "arguments": ""}),
        say("function", "ran", name="run"),
        say("assistant", "So", tool_calls=[{"function": {"name": "stop", "arguments": {"n": 1}}}]),
        say("assistant", "done", reasoning_content="hm"),
    ]
    (folder / "a.json").write_text(json.dumps([{"messages": messages, "reward": 1}]))
    (episode,) = episodes(import_logs(folder))
    assert episode.task == {"system": "Be\nbrief."}
    assert episode.actions == [
        '{"name": "run", "arguments": {}}',
        'So\n{"name": "stop", "arguments": {"n": 1}}\ndone',
    ]


def call(arguments: str) -> Record:
    return {"function": {"name": "search", "arguments": arguments}}


def broken(change: Callable[[Record], Any]) -> Record:
    trace = chat()
    change(trace)
    return trace


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (
            broken(lambda t: t["messages"][2].update(tool_calls=[call('{"q": 1')])),
            ["line 2: message 3", "tool call 'search'", "not JSON"],
        ),
        (broken(lambda t: t.pop("reward")), ["line 2", "no reward", "columns.reward=NAME"]),
        (
            broken(lambda t: t.update(messages=t["messages"][:2])),
            ["line 2", "no action", "role assistant"],
        ),
        (broken(lambda t: t.update(messages=[])), ["line 2", "no action"]),
        (broken(lambda t: t.update(messages=3)), ["line 2", "no list of messages"]),
        (broken(lambda t: t["messages"][1].update(role="boss")), ["message 2", "'boss'"]),
        (
            broken(lambda t: t["messages"][1].update(content=[{"type": "image_url"}])),
            ["message 2", "'image_url'", "must be text"],
        ),
        (broken(lambda t: t["messages"][1].update(content="\ud83d")), ["line 2", "lone surrogate"]),
        (broken(lambda t: t["messages"][3].update(reward=5)), ["its own 'reward' is 1", "to 5"]),
        (broken(lambda t: t["messages"][2].update(tool_calls=7)), ["message 3", "a list", "7"]),
        (broken(lambda t: t.update(reward="good")), ["must be a number", "'good'"]),
        (broken(lambda t: t.update(terminated="yes")), ["true or false", "'yes'"]),
    ],
)
def test_a_faulty_trace_is_refused_with_file_and_line(
    root: str, folder: Path, import_logs: Import, trace: Record, words: list[str]
) -> None:
    path = lines(folder / "a.jsonl", chat(), trace, chat())
    message = refused(path)
    assert "a.jsonl" in message and all(word in message for word in words), message
    with pytest.raises(UsageError):
        import_logs(path)
    assert Storage(root).list("datasets") == []
    kept = import_logs(path, bad="drop")
    assert len(episodes(kept)) == 2 and report(kept)["left_out"][0]["episodes"] == 1


def test_traces_without_rewards_may_be_zero(folder: Path, import_logs: Import) -> None:
    trace = chat()
    del trace["reward"]
    result = import_logs(lines(folder / "a.jsonl", trace), traces=TraceConfig(reward="zero"))
    assert episodes(result)[0].rewards.tolist() == [0, 0]
    assert any("every reward is 0" in warning for warning in report(result)["warnings"])
    with pytest.raises(UsageError, match=r"traces\.reward must be"):
        JOB.preview(configured(folder, traces=TraceConfig(reward="none")))


def test_a_line_that_was_cut_short_is_refused(folder: Path) -> None:
    path = lines(folder / "a.jsonl", chat(), chat())
    path.write_text(path.read_text()[:-40])
    message = refused(path, bad="drop")
    assert "a.jsonl' line 2 is not JSON" in message and "cut short" in message
    whole = folder / "b.json"
    whole.write_text('[{"messages": [')
    assert "b.json' is not JSON" in refused(whole)
    whole.write_text('{"rows": 3}')
    assert "no traces that are known" in refused(whole)


@pytest.mark.integration
def test_files_are_read_in_order_by_any_number_of_workers(
    folder: Path, tmp_path: Path, import_logs: Import, ray_local: None
) -> None:
    for i in range(3):
        lines(folder / f"{i}.jsonl", *(chat(reward=10 * i + k) for k in range(4)))
    for workers in (0, 2):
        result = import_logs(folder, workers=workers, to=str(tmp_path / f"to{workers}"))
        rewards = [episode.rewards[-1] for episode in episodes(result)]
        assert rewards == [10 * i + k for i in range(3) for k in range(4)]


def test_a_lone_surrogate_in_rows_is_refused_with_its_row(folder: Path) -> None:
    row = {"episode": 0, "action": 0, "reward": 0, "terminated": False, "truncated": False}
    rows = [row | {"step": t, "observation": "a\ud800" if t else "b"} for t in range(2)]
    message = refused(lines(folder / "a.jsonl", *rows))
    assert "row 2" in message and "lone surrogate" in message


def test_agentworldbench(folder: Path, import_logs: Import) -> None:
    path = lines(folder / "terminal_test.jsonl", sample(), sample(prompt="pwd", response="/"))
    assert "columns.reward=NAME, or traces.reward=zero" in refused(path).replace(
        " to the field that holds it", ""
    )
    first, second = episodes(import_logs(path, traces=TraceConfig(reward="zero")))
    assert first.observations == ["", "a.txt", "/home"] and first.outcome == "unfinished"
    assert first.actions == ["**Action:** ls", "**Action:** pwd"]
    assert first.task == {"system": "# Role\nYou simulate a terminal."}
    assert second.actions == ["pwd"] and second.observations == ["", "/"]
    scored = lines(folder / "b.jsonl", sample(score=0.5))
    (episode,) = episodes(
        import_logs(scored, columns={"reward": "score"}, traces=TraceConfig(task="none"))
    )
    assert episode.rewards.tolist() == [0, 0.5] and episode.observations[0].startswith("# Role")
    uneven = lines(folder / "c.jsonl", sample(response=["a.txt"]))
    assert "line 1: prompt has 2 turns and response 1" in refused(uneven)
    none = lines(folder / "d.jsonl", sample(prompt=[], response=[]))
    assert "line 1: it has no action" in refused(none)


def test_ids_of_other_imports_do_not_change(folder: Path, root: str) -> None:
    """The id of rows is that of before traces; a choice for traces makes another one."""
    from .logs import jsonl, steps

    path = jsonl(folder / "a.jsonl", steps())
    ids = [
        JOB.resolve(configured(path, **keys), Storage(root)).id
        for keys in ({}, {"traces": TraceConfig(task="none")})
    ]
    assert ids[0] != ids[1]


def test_texts_of_traces_are_long_texts(folder: Path, import_logs: Import) -> None:
    trace = chat()
    trace["messages"][3]["content"] = "日本 " * 100_000
    (episode,) = episodes(import_logs(lines(folder / "a.jsonl", trace)))
    assert episode.observations[1].startswith("日本 日本") and len(episode.observations[1]) > 3e5
    space = Dataset([import_logs(folder / "a.jsonl").path]).observation_space
    assert isinstance(space, spaces.Text) and space.max_length == len(episode.observations[1])


# -- anything at all


def mutations(value: Any, rng: random.Random) -> Any:
    """A copy with one random part replaced by a value of another kind, or removed."""
    value = json.loads(json.dumps(value))
    node, places = value, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice([None, 7, -0.5, True, "x", "", [], {}, [None], {"a": 1}, ["x"]])
    return value


@pytest.mark.parametrize("module", [chat_reader, otel, agentworld], ids=lambda m: m.__name__)
def test_whatever_a_trace_holds_its_problem_is_one_sentence(folder: Path, module: Any) -> None:
    rng, path = random.Random(0), folder / "a.jsonl"
    originals = {
        chat_reader: [chat()],
        otel: [otlp(*conversation()), *conversation()],
        agentworld: [sample(reward=1)],
    }
    faults = 0
    for _ in range(400):
        record = mutations(rng.choice(originals[module]), rng)
        lines(path, record)
        try:
            problems = [trace.problem for trace in module.traces(str(path), TraceOptions())]
        except UsageError as error:
            problems = [str(error)]
        faults += any(problem is not None for problem in problems)
        assert all("\n" not in problem for problem in problems if problem is not None)
    assert faults > 40
