"""The pretrain job: datasets -> a world (`mesocosm.train.pretrain`)."""

from __future__ import annotations

from mesocosm.train.config import PretrainConfig
from mesocosm.train.pretrain import plan, run

__all__ = ["PretrainConfig", "plan", "run"]
