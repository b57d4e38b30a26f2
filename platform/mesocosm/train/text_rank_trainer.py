"""A text network in training on one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mesocosm.datasets.dataset import Dataset
from mesocosm.model import mup
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import new_text_net
from mesocosm.model.language.net import TextNet
from mesocosm.model.net import WindowLosses
from mesocosm.model.widening import FEW
from mesocosm.train.prepare import AnyCodec
from mesocosm.train.rank_trainer import RankTrainer
from mesocosm.train.texts import TextCorpus


@dataclass
class TextTrainer(RankTrainer):
    """Like `RankTrainer`, on rows of tokens and without a base."""

    _validated: dict[str, float] | None = None
    """The validation since the last step."""

    @staticmethod
    def new_net(dataset: Dataset, codec: AnyCodec, model: ModelConfig, seed: int) -> TextNet:
        """A new network, or one that begins with pretrained weights."""
        net = new_text_net(codec.spec, model)
        if model.pretrained is None:
            mup.init_(net, seed)
        return net

    def step(
        self, number: int, factor: float, *, last: bool, stop: bool = False
    ) -> dict[str, float] | None:
        """Like `RankTrainer.step`."""
        self._validated = None
        return super().step(number, factor, last=last, stop=stop)

    def validate(self) -> dict[str, float]:
        """Like `RankTrainer.validate`, with bits per byte."""
        if self._validated is None:
            self._validated = super().validate()
        return self._validated

    def held_out_loss(self, widening: float) -> tuple[float, float] | None:
        """The nats a transition on the validation split without its starts, and a factor of 1. None
        where it has fewer than `widening.FEW` transitions. Members share a backbone that reads all
        training episodes, so none of these is held out.
        """
        if self.valid is None or self.valid.transitions_per_epoch < FEW:
            return None
        nats = self.validate()
        loss = nats["valid/loss"] - nats["valid/task"]
        return (loss, 1.0) if math.isfinite(loss) else None

    def _batch(self, position: int, share: int, micro: int) -> Any:
        return self.loader.batch(position, share, micro)

    def _forward(self, windows: Any) -> WindowLosses:
        losses: WindowLosses = self.engine(windows.to(self.rank.device))
        return losses


def trainer_of(codec: AnyCodec) -> type[RankTrainer]:
    """The trainer of a family."""
    return TextTrainer if isinstance(codec, TextCorpus) else RankTrainer
