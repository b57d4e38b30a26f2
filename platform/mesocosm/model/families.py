"""The model families, by `model.family`. To add one, write a subclass of `net.WorldNet`
(`ensemble` is the shortest), list it in NETWORKS, and list its sizes in `ladder.LADDERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mesocosm.model.config import LANGUAGE, ModelConfig
from mesocosm.model.ensemble import Ensemble
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextNet
from mesocosm.model.language.pretrained import load_pretrained
from mesocosm.model.language.shape import rung_shape
from mesocosm.model.net import WorldNet
from mesocosm.model.sequence import Sequence, TableSequence
from mesocosm.model.spec import Spec


def new_text_net(spec: Spec, config: ModelConfig) -> TextNet:
    """Make a network of the ladder with zeros (`mup.init_` fills them), or one with the weights of
    `model.pretrained`. With adapters, the pretrained weights stay frozen.

    Raises:
        UsageError, ArtifactError: The checkpoint cannot be loaded.
    """
    members, rank = config.members, config.adapter.rank
    if config.pretrained is None:
        shape = rung_shape(config.size, config.vocabulary)
        return TextNet(Llama(shape, members=members, rank=rank), spec)
    backbone, _ = load_pretrained(
        config.pretrained, context=config.context, members=members, rank=rank
    )
    if rank:
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("_adapter." in name)
    return TextNet(backbone, spec)


NETWORKS: dict[str, Callable[[Spec, ModelConfig], nn.Module]] = {
    "sequence": Sequence,
    "ensemble": Ensemble,
    LANGUAGE: new_text_net,
}


def build(spec: Spec, config: ModelConfig) -> WorldNet:
    """A new network of windows, from torch's global generator. Raises UsageError on an invalid
    config.
    """
    config.validate()
    network = NETWORKS[config.family]
    if config.family == "sequence" and spec.observation.table is not None:
        network = TableSequence
    net = network(spec, config)
    assert isinstance(net, WorldNet), "text networks are made by new_text_net"
    return net
