"""The job `pretrain`: datasets -> a world (`mesocosm.train.pretrain`)."""

from __future__ import annotations

from mesocosm.train.config import PretrainConfig
from mesocosm.train.pretrain import JOB

__all__ = ["JOB", "PretrainConfig"]
