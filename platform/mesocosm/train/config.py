"""The pretrain job's config, and the part of it that identifies the world."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mesocosm import checks
from mesocosm.config import ADDED, JobConfig, identity
from mesocosm.envs.config import KnownConfig
from mesocosm.errors import UsageError
from mesocosm.model.config import LANGUAGE, ModelConfig

PRECISIONS = ("auto", "fp32", "bf16")
DEFAULT_STEPS = 1000
WITHOUT = {"accumulate", "zero_stage", "activation_checkpointing", "workers", "gpus_per_worker"}
WITHOUT |= {"checkpoint_every", "keep_checkpoints", "max_failures", "validate_every", "peak_flops"}
"""Keys of `train` that do not change the result: they are not part of the world's id."""


@dataclass
class DataConfig:
    datasets: list[str] = field(default_factory=list)
    """Dataset ids (or unique prefixes); several are opened as one."""
    unique: int | None = None
    """Number of transitions to train on: whole episodes in an order that `seed` draws, the last one
    cut short. Defaults to all.
    """
    weights: list[float] | None = None
    """Share of each dataset in every batch, in the order of `datasets`, independent of its size.
    Defaults to its share of the transitions.
    """
    block: int | None = None
    """Shuffle within blocks of this many shards (files of a dataset), so that a machine holds at
    most two blocks on its disk. Defaults to shuffling all data.
    """
    cache_gib: float | None = None
    """Size limit in GiB of a machine's cache of a remote root's shards, shared by all its jobs that
    set it. Defaults to no limit.
    """
    tokenizer: str | None = field(default=None, metadata=ADDED)
    """`tokenizers/ID`, by which the observation's images are learned (`mesocosm tokenize`)."""

    def validate(self) -> None:
        """Raise UsageError that names the key, its value and the fix."""
        weights, count = self.weights, len(self.datasets)
        if weights is not None and len(weights) != count:
            text = f"data.weights must have one number for each of the {count} datasets"
            raise UsageError(f"{text}, got {weights}")
        if weights is not None and not all(math.isfinite(w) and w > 0 for w in weights):
            fix = "leave a dataset without weight out of data.datasets"
            raise UsageError(f"data.weights must be > 0, got {weights}; {fix}")
        if self.block is not None and self.block < 1:
            raise UsageError(f"data.block must be >= 1 or null, got {self.block}")
        cache = self.cache_gib
        if cache is not None and not (math.isfinite(cache) and cache > 0):
            raise UsageError(f"data.cache_gib must be > 0 or null, got {cache}")


@dataclass
class TrainConfig:
    steps: int | None = None
    """The most optimiser steps: the weights that predict held-out episodes best are kept, and
    training ends where they have become clearly worse. Defaults to 1000 if `epochs` is not set
    either.
    """
    epochs: float | None = None
    """Passes over the training transitions, instead of `steps`."""
    batch: int = 32
    """Windows a step (language: rows of `model.context` tokens), over all workers."""
    lr: float = 6e-3
    """Learning rate at the ladder's base width; see model/mup.py."""
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises from 0."""
    decay: float = 0.4
    """Fraction of the steps in which it falls to 0; it is constant between."""
    clip: float = 1.0
    """Limit of the gradient's global norm."""
    corrupt_history: float = 0.0
    """Standard deviation of noise on the observations that a step is predicted from, in units of
    the base's one-step error. The targets stay true, so that the world learns to correct its own
    errors and drifts less over long horizons.
    """
    dropout: float = field(default=0.0, metadata=ADDED)
    """Share of what each block of a language network adds that is zeroed in training, against
    overfitting of logs that are read many times.
    """
    precision: str = "auto"
    """`fp32`, `bf16` (with float32 masters: ZeRO stage 1 at least), or `auto`: fp32 on CPU, bf16 on
    CUDA.
    """
    workers: int = 1
    gpus_per_worker: float | None = None
    """Defaults to 1 if the cluster has a GPU for every worker, otherwise to 0."""
    accumulate: int = 1
    """Micro-batches a step."""
    zero_stage: int = 0
    activation_checkpointing: bool = False
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    max_failures: int = 3
    """Restarts of failed workers, from the last checkpoint."""
    validate_every: int = 250
    """Steps between validations; the last step is always validated, and so are those after which
    held-out episodes judge the weights.
    """
    validate_windows: int = 2048
    """Windows of the validation split to evaluate, evenly spaced."""
    peak_flops: float | None = None
    """FLOP/s of one worker's device, for MFU. Defaults to the measured rate of a large matrix
    product.
    """


@dataclass
class PretrainConfig(JobConfig):
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    known: KnownConfig = field(default_factory=KnownConfig)
    """Functions that replace the learned reward or termination in this world. The networks are
    trained nevertheless, and evaluate compares them.
    """

    def validate(self) -> None:
        """Raise UsageError that names the key, its value and the fix, by the config alone."""
        self.model.validate()
        t = self.train
        if not self.data.datasets:
            raise UsageError("data.datasets must not be empty, got []; try data.datasets=[ID]")
        self.data.validate()
        if t.steps is not None and t.epochs is not None:
            text = f"train.steps={t.steps} and train.epochs={t.epochs} must not both be set"
            raise UsageError(f"{text}; leave one null")
        positive = ["steps", "batch", "workers", "accumulate", "checkpoint_every"]
        positive += ["keep_checkpoints", "validate_every", "validate_windows"]
        checks.at_least(t, 1, *positive, prefix="train.")
        checks.at_least(t, 0, "max_failures", prefix="train.")
        not_negative = ("weight_decay", "corrupt_history", "warmup", "decay", "gpus_per_worker")
        for key in ("lr", "clip", "epochs", "peak_flops", *not_negative):
            value, above = getattr(t, key), key not in not_negative
            if value is not None and not (0 < value < math.inf or (value == 0 and not above)):
                raise UsageError(f"train.{key} must be {'>' if above else '>='} 0, got {value}")
        if not 0 <= t.dropout < 1:
            raise UsageError(f"train.dropout must be >= 0 and < 1, got {t.dropout}")
        if t.dropout and (self.model.family != LANGUAGE or self.model.pretrained):
            raise UsageError(
                f"train.dropout must be 0 with model.family={self.model.family} and"
                f" model.pretrained={self.model.pretrained}, got {t.dropout}; it is for language"
                " networks from scratch"
            )
        if self.model.family == LANGUAGE:
            self._refuse_unread()
        if t.warmup + t.decay > 1:
            values = f"train.warmup={t.warmup} and train.decay={t.decay}"
            raise UsageError(f"train.warmup + train.decay must be <= 1, got {values}")
        if t.zero_stage not in (0, 1, 2, 3):
            raise UsageError(f"train.zero_stage must be 0, 1, 2 or 3, got {t.zero_stage}")
        checks.one_of(self, PRECISIONS, "train.precision")
        micro = t.workers * t.accumulate
        if t.batch % micro:
            factors = f"(train.workers={t.workers} x train.accumulate={t.accumulate})"
            raise UsageError(f"train.batch must be a multiple of {micro} {factors}, got {t.batch}")

    def _refuse_unread(self) -> None:
        """Raise UsageError for a key that the family of texts does not read, or a value that it
        cannot train with.
        """
        if self.train.zero_stage == 3:  # its embedding is read outside a module's own call
            raise UsageError(
                f"train.zero_stage must be 0, 1 or 2 with model.family={LANGUAGE}, got 3"
            )
        unread = {
            "data.weights": self.data.weights,
            "data.block": self.data.block,
            "train.corrupt_history": self.train.corrupt_history or None,
            "known.reward": self.known.reward,
            "known.terminated": self.known.terminated,
        }
        for key, value in unread.items():
            if value is not None:
                raise UsageError(
                    f"{key} must be left out with model.family={LANGUAGE}, which does not read it,"
                    f" got {value}"
                )


def world_identity(config: PretrainConfig) -> dict[str, Any]:
    """The part of a resolved `config` that identifies the world."""
    values = identity(config)
    values["train"] = {key: value for key, value in values["train"].items() if key not in WITHOUT}
    del values["known"]  # Pretrain adds the functions with their sources
    return values
