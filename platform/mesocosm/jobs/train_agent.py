"""The job `train-agent`: an RLlib agent trained inside a world (`mesocosm.agents.training`)."""

from __future__ import annotations

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.training import JOB

__all__ = ["JOB", "AgentConfig"]
