"""A network in training on one rank: a step and a validation at a time. Pretraining's workers and a
sweep's trunks run the very same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.manifest import SPLITS
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import MesocosmError
from mesocosm.model import mup, rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.net import Losses, apply_base
from mesocosm.model.spec import Parts, Windows
from mesocosm.train import engine, prepare
from mesocosm.train.checkpoint import Progress
from mesocosm.train.config import DataConfig, TrainConfig
from mesocosm.train.engine import Rank
from mesocosm.train.metrics import Sums
from mesocosm.train.schedule import Watch

NOISE = -2
"""Salt of the noise on corrupted histories."""


class Diverged(MesocosmError):
    """What `Watch` says of the step that was tried."""


@dataclass
class Training:
    """Everything that a step reads and writes on this rank."""

    engine: Any
    rates: list[float]
    """Each parameter group's full learning rate."""
    base: Base
    loader: Loader
    valid: Loader | None
    options: TrainConfig
    own: Rank
    seed: int
    watch: Watch = field(default_factory=Watch)
    _pending: bool = False
    """There are gradients that no optimiser's step has used up."""

    @staticmethod
    def start(
        dataset: Dataset,
        codec: Codec,
        model: ModelConfig,
        options: TrainConfig,
        seed: int,
        own: Rank,
        base: Callable[[], Base],
        *,
        kept: Path | None = None,
        id: str = "",
        data: DataConfig | None = None,
    ) -> tuple[Training, Progress | None]:
        """The training of `model` on `dataset` in the order that `data` says, and the progress of
        the checkpoint `kept` (a local folder) that it goes on from. `base` is called last: it may
        have to be waited for.
        """
        order = data or DataConfig()
        events = prepare.events_of(codec.spec, options)
        loader = Loader(
            dataset,
            codec,
            "train",
            model.context,
            options.batch,
            seed,
            events,
            block=order.block,
            weights=order.weights,
        )
        valid = (
            Loader(dataset, codec, "valid", model.context, options.batch, seed, block=order.block)
            if dataset.size("valid")
            else None
        )
        torch.manual_seed(seed)
        net = build(codec.spec, model)
        mup.init_(net, seed)
        net.checkpoint_activations = options.activation_checkpointing
        net.trains_on(_episodes(dataset, model.members))
        running, rates, before = engine.start(net, options, own, kept, id)
        return Training(
            running, rates, base().to(own.device), loader, valid, options, own, seed
        ), before

    @property
    def lr(self) -> float:
        """The base width's learning rate in the last step."""
        return float(self.engine.optimizer.param_groups[self.rates.index(self.options.lr)]["lr"])

    def step(
        self, number: int, factor: float, *, last: bool, stop: bool = False
    ) -> dict[str, float] | None:
        """Optimiser step `number` (from 1, on the loader's batch `number - 1`) at `factor` of the
        full learning rates.

        Nats a transition by part, `loss`, `objective`, `transitions` and `gradient_norm`, over all
        ranks; None, and everything that a checkpoint keeps is as it was, where a rank says `stop`.
        Raises Diverged on every rank alike. `last`: the weights after it are kept.
        """
        options, own, position = self.options, self.own, number - 1
        for group, rate in zip(self.engine.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        micro, shares = (
            own.world_size * options.accumulate,
            range(own.rank * options.accumulate, (own.rank + 1) * options.accumulate),
        )
        sums, random = Sums(), self._random()
        for share in shares:
            first = position * options.batch + share * (options.batch // micro)
            windows = corrupted(
                self.loader.batch(position, share, micro),
                self.base,
                options.corrupt_history,
                self.seed,
                first,
            ).to(own.device)
            losses: Losses = self.engine(windows, apply_base(self.base, windows))
            self.engine.backward(losses.objective)
            self._pending = True
            sums.add(losses, 1 / micro)
            if share != shares[-1]:
                self.engine.step()
        told = sums.reduced(own.device, stop=stop)
        if told.pop("stop"):
            self._draw_on(random)
            return None
        trouble = self.watch.check(
            number, last=last, loss=told["loss"], objective=told["objective"]
        )
        if trouble is None:
            told["gradient_norm"] = self._update()
            trouble = self.watch.check(number, gradient_norm=told["gradient_norm"])
        if trouble is not None:
            raise Diverged(trouble)
        return told

    def _update(self) -> float:
        self._pending = False
        return engine.step(self.engine)

    def validate(self) -> dict[str, float]:
        """Nats a transition by part on the validation split, or on `validate_windows` evenly of it,
        the ranks sharing every batch.
        """
        assert self.valid is not None
        options, own = self.options, self.own
        self.engine.eval()
        sums = Sums()
        with torch.no_grad():
            for windows in self.valid.eval_batches(
                options.batch, own.rank, own.world_size, options.validate_windows
            ):
                here = windows.to(own.device)
                sums.add(self.engine(here, apply_base(self.base, here)))
        self.engine.train()
        told = sums.reduced(own.device)
        return {
            f"valid/{name}": value
            for name, value in told.items()
            if name not in ("stop", "objective", "transitions")
        }

    def _random(self) -> tuple[Tensor, list[Tensor]]:
        return (
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if self.own.device.type == "cuda" else [],
        )

    def _draw_on(self, state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is trained inside is undone at the end: weights, the optimiser's state, torch's
        random state and the watch are as they were, to the last bit. In memory, beside the
        training's own. For a group of one rank, ZeRO stage 0 to 2.
        """
        assert self.own.world_size == 1
        optimizer = (
            self.engine.optimizer.optimizer
            if self.engine.zero_optimization_stage()
            else self.engine.optimizer
        )
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        tensors: list[Tensor] = list(
            {
                id(t): t
                for t in (*self.engine.module.parameters(), *self.engine.module.buffers(), *masters)
            }.values()
        )
        copies = [t.detach().clone() for t in tensors]
        states = {
            p: {
                name: v.clone() if isinstance(v, Tensor) else v
                for name, v in optimizer.state.get(p, {}).items()
            }
            for p in masters
        }
        random = self._random()
        best, high = self.watch.best, self.watch.high
        try:
            yield
        finally:
            if self._pending:
                self._update()
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)
                for p, kept in states.items():
                    state = optimizer.state.get(p, {})
                    for name in [name for name in state if name not in kept]:
                        del state[name]
                    for name, value in kept.items():
                        if isinstance(value, Tensor):
                            state[name].copy_(value)
                        else:
                            state[name] = value
            self._draw_on(random)
            self.watch = Watch(best, high)


def _episodes(dataset: Dataset, members: int) -> Tensor:
    """Hashes of the training split's episodes, [n] int64: of its first shards only, where every
    member keeps one of these.
    """
    found = torch.zeros(0, dtype=torch.int64)
    for shard in range(len(dataset.shards)):
        records = dataset.records(shard)
        found = torch.cat(
            [
                found,
                torch.from_numpy(
                    records["hash"][records["split"] == SPLITS.index("train")].astype(np.int64)
                ),
            ]
        )
        if not rng.left_out(found, members).any():
            break
    return found


def corrupted(windows: Windows, base: Base, amount: float, seed: int, first: int) -> Windows:
    """Windows whose o_t carry noise of `amount` times the base's one-step error as standard
    deviation, wherever they are read (`net.unroll`); o_{t+1} is true and an episode's own start is
    exact. The noise is a function of the sample's global number (`first` is that of row 0),
    whatever the number of workers.
    """
    if amount == 0:
        return windows
    seen = windows.observation[:, :-1]
    size, steps, numbers = seen.numbers.shape
    keys = rng.keys(seed, first + torch.arange(size).unsqueeze(1), torch.arange(steps), NOISE)
    uniform = rng.uniform(keys.unsqueeze(-1), torch.arange(numbers) + rng.OBSERVATION)
    noise = torch.special.ndtri(uniform) * (amount * base.residual_scale.cpu())
    noise[:, 0][windows.start] = 0.0
    return replace(windows, seen=Parts(seen.numbers + noise, seen.categories))
