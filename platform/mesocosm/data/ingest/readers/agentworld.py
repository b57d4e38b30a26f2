"""AgentWorldBench's JSONL: objects with `system_str`, `prompt` (the actions) and `response` (what
the environment answered), one of each a turn.

The format: https://huggingface.co/datasets/Qwen/AgentWorldBench. The task is `system_str`, the
first observation is empty, and texts are read as they are, with their headings. The file holds a
trajectory once for each turn that it evaluates: `curate` drops the copies (exact_duplicates).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mesocosm.data.ingest.readers.traces import (
    Trace,
    TraceError,
    TraceOptions,
    documents,
    finished,
    joined,
)


def holds(record: Any) -> bool:
    """True if a value of a file is a sample of AgentWorldBench."""
    return isinstance(record, dict) and {"system_str", "prompt", "response"} <= set(record)


def traces(path: str, options: TraceOptions) -> Iterator[Trace]:
    """The traces of a file, in order; faulty ones with their problem."""
    for place, record in documents(path):
        try:
            yield _trace(place, record, options)
        except TraceError as error:
            yield Trace(place, problem=str(error))


def _trace(place: str, record: Any, options: TraceOptions) -> Trace:
    if not holds(record):
        raise TraceError("it must have system_str, prompt and response; give all three")
    turns = [record["prompt"], record["response"]]
    prompts, responses = ([turn] if isinstance(turn, str) else turn for turn in turns)
    for name, texts in (("prompt", prompts), ("response", responses)):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TraceError(f"{name} must be a list of texts, got {texts!r}")
    if not prompts:
        raise TraceError("it has no action: prompt is empty")
    if len(prompts) != len(responses):
        raise TraceError(
            f"prompt has {len(prompts)} turns and response {len(responses)}; give one response for"
            " each prompt"
        )
    system = record["system_str"]
    if not isinstance(system, str):
        raise TraceError(f"system_str must be a text, got {system!r}")
    in_task = options.task != "none"
    observations = ["" if in_task else joined([system]), *responses]
    rewards = [None] * len(prompts)
    task = system if in_task else ""
    return finished(place, task, observations, prompts, rewards, record, options, ends=False)
