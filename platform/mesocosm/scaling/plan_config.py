"""What a user says of a plan: a law, a budget, and what compute and reality cost. Imports no Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mesocosm.errors import UsageError
from mesocosm.train.config import PretrainConfig


@dataclass
class PlanPrice:
    per_step: float | None = None
    """Of a real transition, beyond those that are owned; null: none can be bought."""
    per_exaflop: float | None = None
    """Of 1e18 counted FLOPs; null: from `cluster`'s price an hour and the FLOPs of its workers."""
    currency: str = "USD"


@dataclass
class PlanConfig(PretrainConfig):
    """What pretraining is to be like, but for its size and length, which the plan gives. With the
    law of a sweep, `data`, `model` and `train` may be left out: they are the sweep's.
    """

    law: str = ""
    """A law.json, or `laws/<id>` of a sweep."""
    flops: float | None = None
    """The budget in counted FLOPs. Either this or `money`."""
    money: float | None = None
    """The budget in money, for compute and for reality together."""
    price: PlanPrice = field(default_factory=PlanPrice)
    cluster: str | None = None
    """`clusters/<name>.yaml`, whose price of a FLOP is taken."""
    owned: int | None = None
    """Different real transitions that are there already; null: those to train on of
    `data.datasets`, or none.
    """

    def validate(self) -> None:
        """Raises UsageError naming the key, its value and the fix. Looks at nothing but the config."""
        self.model.validate()
        if not self.law:
            raise UsageError("law is not set; give --law law.json, or --law laws/<id> of a sweep")
        if (self.flops is None) == (self.money is None):
            said = (
                "neither flops nor money is set"
                if self.flops is None
                else f"flops={self.flops:g} and money={self.money:g} are both set"
            )
            raise UsageError(f"{said}; give one budget, as in --flops 1e18 or --money 500")
        for key, value in (("flops", self.flops), ("money", self.money)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{key}={value} is no budget; give a number above 0")
        for key, value in (
            ("per_step", self.price.per_step),
            ("per_exaflop", self.price.per_exaflop),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(
                    f"price.{key}={value} is no price; give a number above 0, or leave it out"
                )
        if self.owned is not None and self.owned < 0:
            raise UsageError(f"owned={self.owned} must be at least 0")
        if self.train.steps is not None or self.train.epochs is not None:
            raise UsageError("train.steps and train.epochs are the plan's to say; leave them out")
        if self.flops is not None and self.price.per_step is not None:
            raise UsageError(
                f"price.per_step={self.price.per_step:g} has no meaning in a budget of FLOPs; give"
                " money=... instead of flops"
            )
        if self.flops is not None and self.cluster is not None:
            raise UsageError(
                f"cluster={self.cluster!r} has no meaning in a budget of FLOPs, which needs no"
                " price; leave it out, or give money=..."
            )
        if self.money is not None and self.price.per_exaflop is None and self.cluster is None:
            raise UsageError(
                "money needs the price of compute; give price.per_exaflop=..., or the key"
                " cluster=NAME (not --cluster) whose prices are known"
            )
        if self.price.per_exaflop is not None and self.cluster is not None:
            raise UsageError(
                f"price.per_exaflop={self.price.per_exaflop:g} and cluster={self.cluster!r} both"
                " say what compute costs; give one"
            )
