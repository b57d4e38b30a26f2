"""A network in training on one rank, one step and one validation at a time. Pretraining's workers
and a sweep's trunks both use it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import SPLITS
from mesocosm.errors import MesocosmError
from mesocosm.model import mup, rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.language.net import TextNet, bits_per_byte
from mesocosm.model.net import WindowLosses, WorldNet, apply_base
from mesocosm.model.tensors import Parts, Windows
from mesocosm.model.widening import FEW, HIGH, LOW
from mesocosm.train import engine
from mesocosm.train.checkpoint import MODEL, TrainingProgress, Weights
from mesocosm.train.config import DataConfig, TrainConfig
from mesocosm.train.engine import Rank
from mesocosm.train.prepare import AnyCodec, AnyLoader, make_loader
from mesocosm.train.schedule import Watch

NOISE = -2
"""Salt of the noise on corrupted histories."""
JUDGED_WINDOWS = 256
"""The most windows that judge the weights."""
WIDENING_STEP = 2.0
COUNTS = ("transitions", "bytes", "tokens")
"""The counts of `WindowLosses` in the totals of a step."""


class Diverged(MesocosmError):
    """The problem that `Watch` detected in a step."""


@dataclass
class RankTrainer:
    """Everything that a step reads and writes on this rank."""

    engine: Any
    rates: list[float]  # each parameter group's full learning rate
    base: Base | None  # None for a family without one
    loader: AnyLoader
    valid: AnyLoader | None
    options: TrainConfig
    rank: Rank
    seed: int
    chosen: Weights | None = None  # the best weights so far, on rank 0
    watch: Watch = field(default_factory=Watch)
    _pending: bool = False  # there are gradients that no optimiser step has used

    @classmethod
    def start(
        cls,
        dataset: Dataset,
        codec: AnyCodec,
        model: ModelConfig,
        options: TrainConfig,
        seed: int,
        rank: Rank,
        base: Callable[[], Base] | None,
        *,
        data: DataConfig | None = None,
        resume_from: Path | None = None,
    ) -> tuple[Self, TrainingProgress | None]:
        """Start to train `model` on `dataset`, or resume.

        Args:
            base: Returns the base. It is called last, because the caller may have to wait for it.
                None for a family without one.
            data: The order of the data; by default all windows are shuffled.
            resume_from: The local folder of a checkpoint.

        Returns:
            The training, and the checkpoint's progress.
        """
        shape = (model, options.batch, seed, data)
        loader = make_loader(dataset, codec, "train", *shape)
        valid = make_loader(dataset, codec, "valid", *shape) if dataset.size("valid") else None
        torch.manual_seed(seed)
        net = cls.new_net(dataset, codec, model, seed)
        net.checkpoint_activations = options.activation_checkpointing
        if isinstance(net, TextNet):
            net.drop(options.dropout)
        running, rates, progress = engine.start(net, options, rank, resume_from)
        frozen = base().to(rank.device) if base is not None else None
        chosen = None
        if resume_from is not None and rank.rank == 0 and (resume_from / MODEL).exists():
            chosen = load_file(resume_from / MODEL)
        trainer = cls(running, rates, frozen, loader, valid, options, rank, seed, chosen)
        return trainer, progress

    @staticmethod
    def new_net(
        dataset: Dataset, codec: AnyCodec, model: ModelConfig, seed: int
    ) -> WorldNet | TextNet:
        """The network to train."""
        net = build(codec.spec, model)
        mup.init_(net, seed)
        net.trains_on(training_episodes(dataset, model.members))
        return net

    @property
    def lr(self) -> float:
        """The base width's learning rate in the last step."""
        return float(self.engine.optimizer.param_groups[self.rates.index(self.options.lr)]["lr"])

    def step(
        self, number: int, factor: float, *, last: bool, stop: bool = False
    ) -> dict[str, float] | None:
        """Take optimiser step `number` (from 1, on the loader's batch `number - 1`) at `factor` of
        the full learning rates.

        Args:
            last: The weights after this step may be the last, so its loss must not be high.
            stop: Stop instead, on all ranks, if any rank passes True.

        Returns:
            Over all ranks, nats a transition by part, `loss`, `objective`, `transitions` and
            `gradient_norm`. None after a stop, which leaves the state as it was.

        Raises:
            Diverged: The loss diverged. Raised on every rank.
        """
        options, rank, position = self.options, self.rank, number - 1
        for group, rate in zip(self.engine.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        micro = rank.world_size * options.accumulate
        shares = range(rank.rank * options.accumulate, (rank.rank + 1) * options.accumulate)
        sums, random = Sums(), self._random()
        for share in shares:
            losses = self._forward(self._batch(position, share, micro))
            self.engine.backward(losses.objective)
            self._pending = True
            sums.add(losses, 1 / micro)
            if share != shares[-1]:
                self.engine.step()
        totals = sums.reduced(rank.device, stop=stop)
        if totals.pop("stop"):
            self._set_random(random)
            return None
        watched = {name: totals[name] for name in ("loss", "objective")}
        problem = self.watch.check(number, last=last, **watched)
        if problem is None:
            totals["gradient_norm"] = self._update()
            problem = self.watch.check(number, gradient_norm=totals["gradient_norm"])
        if problem is not None:
            raise Diverged(problem)
        return totals

    def _batch(self, position: int, share: int, micro: int) -> Any:
        """One of `micro` shares of the batch at `position`."""
        options = self.options
        first = position * options.batch + share * (options.batch // micro)
        windows = cast(Windows, self.loader.batch(position, share, micro))
        return corrupted(windows, self._base, options.corrupt_history, self.seed, first)

    def _forward(self, windows: Any) -> WindowLosses:
        windows = windows.to(self.rank.device)
        losses: WindowLosses = self.engine(windows, apply_base(self._base, windows))
        return losses

    @property
    def _base(self) -> Base:
        assert self.base is not None, "families of windows have one"
        return self.base

    def _update(self) -> float:
        self._pending = False
        return engine.step(self.engine)

    def validate(self) -> dict[str, float]:
        """Nats a transition by part on `validate_windows` of the validation split, evenly spaced;
        the ranks share every batch.
        """
        assert self.valid is not None
        sums = Sums()
        with self._evaluating():
            for windows in self._evaluated(self.valid, self.options.validate_windows):
                sums.add(self._forward(windows))
        totals = sums.reduced(self.rank.device)
        hidden = ("stop", "objective", *COUNTS)
        return {f"valid/{name}": value for name, value in totals.items() if name not in hidden}

    def held_out_loss(self, widening: float) -> tuple[float, float] | None:
        """The loss on at most JUDGED_WINDOWS windows that a member was not trained on: from the
        episodes that it leaves out, and from the validation split.

        The densities of all numbers are as many times as wide as predicts these windows best, to a
        factor of WIDENING_STEP: new weights are judged by what they predict, not by how narrow
        their densities are, which is repaired after training (`model.widening`).

        Args:
            widening: The factor to begin the search at.

        Returns:
            The nats of the objective's parts, a transition and member, and the factor. None where
            there are fewer than `widening.FEW` pairs of a transition and a member, or no factor
            gives a finite loss.
        """
        sources = [] if self.valid is None else [(self.valid, True)]
        if self.engine.module.members > 1:
            sources.append((self.loader, False))
        nats: dict[float, float] = {}

        def judge(factors: list[float]) -> bool:
            """Add the nats at `factors`; False with too few pairs."""
            total = torch.zeros(len(factors) + 1, dtype=torch.float64, device=self.rank.device)
            with self._evaluating():
                for loader, unseen in sources:
                    total += self._held_out(loader, JUDGED_WINDOWS // len(sources), unseen, factors)
            dist.all_reduce(total)
            *sums, pairs = total.tolist()
            nats.update({f: value / pairs for f, value in zip(factors, sums, strict=True) if pairs})
            return bool(pairs >= FEW)

        searched = len(self._base.widening) > 0
        factors = [widening / WIDENING_STEP, widening, widening * WIDENING_STEP]
        if not judge(factors if searched else [1.0]):
            return None
        while True:
            finite = {factor: value for factor, value in nats.items() if math.isfinite(value)}
            if not finite:
                return None
            best = min(finite, key=finite.__getitem__)
            beyond = [best / WIDENING_STEP, best * WIDENING_STEP]
            beyond = [f for f in beyond if f not in nats and LOW <= math.log(f) <= HIGH]
            if not searched or not beyond:
                return finite[best], best
            judge(beyond)

    def _held_out(self, loader: AnyLoader, most: int, unseen: bool, factors: list[float]) -> Tensor:
        """This rank's sum of nats at each factor, and the number of pairs, [F + 1] float64."""
        net, sums = self.engine.module, []
        for windows in self._evaluated(loader, most):
            counted, base = net.held_out(windows, unseen=unseen), apply_base(self._base, windows)
            outs = [base.widened(base.widening * factor) for factor in factors]
            losses = [self.engine(windows, out, counted).objective for out in outs]
            sums.append(torch.stack([*losses, counted.sum() / counted.numel()]) * counted.numel())
        return torch.stack(sums).double().sum(0)

    def _evaluated(self, loader: AnyLoader, most: int) -> Iterator[Any]:
        """This rank's share of at most `most` windows, evenly spaced."""
        batch, rank = self.options.batch, self.rank
        for windows in loader.eval_batches(batch, rank.rank, rank.world_size, most):
            yield windows.to(rank.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.engine.eval()
        with torch.no_grad():
            yield
        self.engine.train()

    def _random(self) -> tuple[Tensor, list[Tensor]]:
        cuda = self.rank.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []

    def _set_random(self, state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Restore at the end of the block, to the last bit: weights, the optimiser's state, torch's
        random state and the watch. The copies are in memory. For a group of one rank, ZeRO stage 0
        to 2.
        """
        assert self.rank.world_size == 1
        module, optimizer = self.engine.module, self.engine.optimizer
        if self.engine.zero_optimization_stage():
            optimizer = optimizer.optimizer
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        # The masters of stage 0 are the parameters themselves.
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers(), *masters)}.values()
        copies = [t.detach().clone() for t in tensors]
        states = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            for p in masters
            for state in [optimizer.state.get(p, {})]
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
                for p, before in states.items():
                    state = optimizer.state.get(p, {})
                    for name in [name for name in state if name not in before]:
                        del state[name]
                    for name, value in before.items():
                        if isinstance(value, Tensor):
                            state[name].copy_(value)
                        else:
                            state[name] = value
            self._set_random(random)
            self.watch = Watch(best, high)


class Sums:
    """Losses of micro-batches, added up in float64, over this rank and then over all."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, None] = {}

    def add(self, losses: WindowLosses, share: float = 1.0) -> None:
        """`share`: the micro-batch's part of the global batch, the weight of its objective."""
        counts = losses.counts
        self._counts |= dict.fromkeys(counts)
        values = {"objective": losses.objective.detach(), **counts, **losses.nats}
        numbers = torch.stack(list(values.values())).double().tolist()
        for name, number in zip(values, numbers, strict=True):
            self._sums[name] += number * share if name == "objective" else number

    def reduced(self, device: torch.device, stop: bool = False) -> dict[str, float]:
        """Over all ranks: nats a transition by part, `loss` (their total), `objective`, the counts,
        `bits_per_byte` where bytes are counted, and `stop`: above 0 if any rank passes True.
        """
        names = sorted(self._sums)
        values = [*(self._sums[name] for name in names), float(stop)]
        vector = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(vector)
        totals = dict(zip([*names, "stop"], vector.tolist(), strict=True))
        parts = [name for name in names if name not in ("objective", *self._counts)]
        if "bytes" in totals:
            totals["bits_per_byte"] = bits_per_byte(totals["dynamics"], totals["bytes"])
        for name in parts:
            totals[name] /= max(totals["transitions"], 1.0)
        totals["loss"] = sum(totals[name] for name in parts)
        return totals


def training_episodes(dataset: Dataset, members: int) -> Tensor:
    """Hashes of the training split's episodes, [n] int64; only of the first shards, once every
    member keeps one of these.
    """
    hashes = torch.zeros(0, dtype=torch.int64)
    for shard in range(len(dataset.shards)):
        records = dataset.records(shard)
        train = records["hash"][records["split"] == SPLITS.index("train")].astype(np.int64)
        hashes = torch.cat([hashes, torch.from_numpy(train)])
        if not rng.left_out(hashes, members).any():
            break
    return hashes


def corrupted(windows: Windows, base: Base, amount: float, seed: int, first: int) -> Windows:
    """Windows whose o_t carry noise, of `amount` times the base's one-step error as standard
    deviation, for every reader (`net.unroll`); o_{t+1} is true and an episode's start is exact. The
    noise is a function of the sample's global number (`first` is that of row 0), whatever the
    number of workers.
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
