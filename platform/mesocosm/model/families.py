"""The model families, by `model.family`. To add one, write a subclass of `net.WorldNet` (`ensemble`
is the shortest), list it in NETWORKS, and list its sizes in `ladder.LADDERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from mesocosm.model.config import ModelConfig
from mesocosm.model.ensemble import Ensemble
from mesocosm.model.net import WorldNet
from mesocosm.model.sequence import Sequence
from mesocosm.model.spec import Spec

NETWORKS: dict[str, Callable[[Spec, ModelConfig], WorldNet]] = {
    "sequence": Sequence,
    "ensemble": Ensemble,
}


def build(spec: Spec, config: ModelConfig) -> WorldNet:
    """A new network, from torch's global generator. Raises UsageError on an invalid config."""
    config.validate()
    return NETWORKS[config.family](spec, config)
