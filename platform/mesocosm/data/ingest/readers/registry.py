"""The readers of logs by format, and how a file's format is known. A new format is registered here;
`readers/__init__.py` says what its module defines.
"""

from __future__ import annotations

from typing import Any

from mesocosm.data.ingest.readers import (
    agentworld,
    chat,
    jsonl,
    lerobot,
    minari,
    otel,
    parquet,
    pictures,
    rllib,
)
from mesocosm.data.ingest.readers.traces import TraceReader

READERS: dict[str, Any] = {
    "jsonl": jsonl,
    "lerobot": lerobot,
    "minari": minari,
    "parquet": parquet,
    "pictures": pictures,
    "rllib": rllib,
    "agentworld": TraceReader(agentworld.traces, "AgentWorldBench"),
    "chat": TraceReader(chat.traces, "a chat"),
    "otel": TraceReader(otel.traces, "OpenTelemetry spans"),
}
TRACES = {"agentworld": agentworld.holds, "chat": chat.holds, "otel": otel.holds}
"""The formats of traces of language agents, by how the first value of a file is known."""
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
IN_FOLDERS = (".parquet", ".jsonl", ".ndjson")
"""The suffixes for which a folder is searched. Files in .json are read only if there are none of
these.
"""
