"""The config of a plan: a law, a budget, and the prices of compute and reality. Imports neither Ray
nor torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mesocosm import checks
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.config import ADDED
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.model.ladder import RUNGS, dims
from mesocosm.scaling.optimum import PlanBudget
from mesocosm.scaling.sweep_config import CellTraining
from mesocosm.scaling.table import Notes
from mesocosm.train.config import PretrainConfig

LARGEST = max(dims(size).params for size in RUNGS)
"""The parameters of the ladder's last rung. If compute is nearly free compared with reality, money
would otherwise buy models that are too large to train.
"""
NOT_COMPARED = ("size", "warmup", "decay", "precision", "validate_windows")
"""Keys in which a plan's model and training may differ from the sweep's."""


@dataclass
class PlanPrice:
    per_step: float | None = None
    """Price of a real transition in addition to the owned ones. null: none can be bought."""
    per_exaflop: float | None = None
    """Price of 1e18 counted FLOPs. null: computed from `cluster`."""
    currency: str = "USD"
    per_second: float | None = field(default=None, metadata=ADDED)
    """Price of a second of `info["duration"]`, in addition: a transition takes the mean time of the
    training transitions of `data.datasets`.
    """


@dataclass
class PlanConfig(PretrainConfig):
    """How pretraining is to run; the plan sets its size and length. With the law of a sweep,
    `data`, `model` and `train` default to the sweep's.
    """

    law: str = ""
    """A law.json, or `laws/ID` of a sweep."""
    flops: float | None = None
    """The budget in counted FLOPs. Either this or `money`."""
    money: float | None = None
    """The budget in money, for compute and reality together."""
    price: PlanPrice = field(default_factory=PlanPrice)
    cluster: str | None = None
    """`clusters/NAME.yaml`, which sets the price of a FLOP."""
    owned: int | None = None
    """Different real transitions that exist already. null: the training transitions of
    `data.datasets`, or none.
    """

    def validate(self) -> None:
        """Check the values alone. Raises UsageError with the key, its value and the fix."""
        self.model.validate()
        price, per_exaflop, cluster = self.price, self.price.per_exaflop, self.cluster
        if not self.law:
            raise UsageError("law is not set; give --law law.json, or --law laws/ID of a sweep")
        if (self.flops is None) == (self.money is None):
            both = f"flops={self.flops} and money={self.money} are both set"
            text = "neither flops nor money is set" if self.flops is None else both
            raise UsageError(f"{text}; give one budget, as in --flops 1e18 or --money 500")
        values = {"flops": self.flops, "money": self.money}
        values |= {"price.per_step": price.per_step, "price.per_exaflop": per_exaflop}
        values |= {"price.per_second": price.per_second}
        for key, value in values.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{key} must be above 0 and finite, got {value}")
        checks.at_least(self, 0, "owned")
        if self.train.steps is not None or self.train.epochs is not None:
            raise UsageError("train.steps and train.epochs are set by the plan; leave them out")
        step_prices = ("per_step", "per_second")
        paid = [f"price.{k}={v}" for k in step_prices if (v := getattr(price, k)) is not None]
        if self.flops is not None and (paid or cluster is not None):
            setting = f"cluster={cluster}" if cluster else paid[0]
            text = f"{setting} has no meaning with a budget of FLOPs"
            raise UsageError(f"{text}; give money=... instead, or leave it out")
        if self.money is not None and per_exaflop is None and cluster is None:
            raise UsageError(
                "money needs the price of compute; give price.per_exaflop=..., or the key"
                " cluster=NAME (not --cluster) of a cluster with prices"
            )
        if per_exaflop is not None and cluster is not None:
            text = f"price.per_exaflop={per_exaflop:g} and cluster={cluster!r} both set the price"
            raise UsageError(f"{text} of compute; give one")

    def step_price(self, mean_duration: float | None) -> float | None:
        """The price of a real transition; None where none can be bought.

        Args:
            mean_duration: Seconds of a transition in the data; None where it has no durations.

        Raises:
            UsageError: Time has a price, and no dataset says how long a transition takes.
        """
        price = self.price
        if price.per_second is None:
            return price.per_step
        if not mean_duration:
            raise UsageError(
                f"price.per_second={price.per_second:g} needs datasets with durations, got"
                f" data.datasets={list(self.data.datasets)}; name some, or give price.per_step"
            )
        return (price.per_step or 0.0) + price.per_second * mean_duration

    def budget(
        self, cluster: ClusterConfig | None, owned: int, mean_duration: float | None = None
    ) -> PlanBudget:
        """The budget with its prices. Raises UsageError where money cannot be spent.

        Args:
            cluster: Sets the price of a FLOP; None takes `price.per_exaflop`.
            owned: Different real transitions that exist already.
            mean_duration: Seconds of a transition in the data; None where it has no durations.
        """
        if self.flops is not None:
            return PlanBudget(self.flops, 1.0, None, owned, unlimited=owned == 0)
        assert self.money is not None
        if cluster is None:
            flop = (self.price.per_exaflop or 0.0) / 1e18
        else:
            flops_per_s = cluster.nodes[0].flops_per_s * cluster.slots
            flop = cluster.price_per_hour / 3600 / flops_per_s
            if not flop > 0:
                message = f"cluster={self.cluster!r} has no price; set price_per_hour of its nodes"
                file = f"clusters/{self.cluster}.yaml"
                raise UsageError(f"{message} in {file}, or give price.per_exaflop")
        step_price = self.step_price(mean_duration)
        if step_price is None and not owned:
            raise UsageError(
                "money buys no real step without price.per_step, and no transition is owned; give"
                " price.per_step=..., data.datasets=[...] or owned=..."
            )
        return PlanBudget(self.money, flop, step_price, owned, most=LARGEST)

    def as_swept(
        self, swept: dict[str, Any], datasets: list[str], tokenizer: str | None = None
    ) -> tuple[PlanConfig, int | None]:
        """Fill what the config leaves at its defaults from a sweep's config, its datasets and the
        tokenizer of its law.

        Returns:
            The config, and the sweep's warm-up in steps where its training is taken.
        """
        config, default, warmup = self, PlanConfig(), None
        if datasets and config.data.datasets == default.data.datasets:
            config = replace(config, data=replace(config.data, datasets=list(datasets)))
        named = config.data.tokenizer
        named = tokenizer if named is None else named.removeprefix("tokenizers/")
        config = replace(config, data=replace(config.data, tokenizer=named))
        if config.model == default.model and "model" in swept:
            config = replace(config, model=ModelConfig.from_json(swept["model"]))
        if config.train == default.train and "train" in swept:
            cell = CellTraining(**swept["train"])
            warmup = cell.warmup
            train = replace(default.train, **(asdict(cell) | {"warmup": 0.0}))
            config = replace(config, train=train)
        return config, warmup

    def check_tokenizer(self, swept: dict[str, Any], tokenizer: str | None) -> None:
        """Raise UsageError where the plan's world reads images by another tokenizer than the law's
        cells. A law that names neither its models nor a tokenizer may be of any.
        """
        planned = self.data.tokenizer
        if planned == tokenizer or (tokenizer is None and "model" not in swept):
            return
        text = f"data.tokenizer must be {tokenizer or 'null'}, as in the law, got {planned}"
        raise UsageError(
            f"{text}: losses are comparable only under the same tokenizer; leave it out, or sweep"
            " with that tokenizer"
        )

    def model_notes(self, swept: dict[str, Any]) -> Notes:
        """A warning where the law is of other models than the plan's, or does not name its own."""
        if "model" not in swept:
            return {
                "unknown_models": "The law does not name its models. The plan is for"
                f" model.family={self.model.family}, members={self.model.members},"
                f" base={str(self.model.base).lower()}, context={self.model.context},"
                f" train.batch={self.train.batch}: give these keys as they were swept."
            }
        apart = []
        for block, config in (("model", self.model), ("train", self.train)):
            for key, value in swept.get(block, {}).items():
                planned = getattr(config, key, value)
                if key not in NOT_COMPARED and planned != value:
                    apart.append(f"{block}.{key}={planned} (swept: {value})")
        if not apart:
            return {}
        return {"other_models": f"The law is of other models than the plan's: {', '.join(apart)}."}
