"""The model families, by the name that `model.family` gives them.

To add a family, write a subclass of `net.WorldNet` in a module of its own (`ensemble` is the
shortest example), list it in NETWORKS, and list its sizes in `ladder.LADDERS`.
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
    """A new network of `config.family`, initialised from torch's global generator. Raises
    UsageError for an unknown family or size.
    """
    config.validate()
    return NETWORKS[config.family](spec, config)
