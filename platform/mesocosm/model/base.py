"""The base of a world, fitted and frozen before pretraining: the start model (`start`), a ridge
regression plus a small MLP that predict the change of an observation's numbers, and MLPs that
predict reward and termination of single transitions (`head_fit`). The networks model what is left.

Each of the K members is fitted on its own episodes (`rng.fitted_by`), because members that share a
base agree everywhere, and its other episodes stop the fit (`fitting`). Far outside the data the
ridge continues linearly and the MLP, whose last hidden units are tanh, stays bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model.config import ModelConfig
from mesocosm.model.fitting import Report, StoppedFit, fit, of_part, silent
from mesocosm.model.heads import reward_outputs
from mesocosm.model.ladder import BASE_HIDDEN
from mesocosm.model.layers import MemberMLP
from mesocosm.model.rng import fitted_by
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.start import StartModel
from mesocosm.model.tables import TableMLP, pooled
from mesocosm.model.tensors import Parts, Transition

HEAD_HIDDEN = 128
"""Hidden units of the reward and the termination networks."""
MAX_CARDINALITY = 16
"""Category slots with more values (text) do not enter the base."""
MAX_TRANSITIONS = 200_000
BATCH = 128
LR = 7e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 1e-4
RIDGE = 1e-7
"""Ridge penalty a transition; features are normalised."""
JUDGED = 2048
"""The most held-out rows of a member, spread evenly, that an evaluation reads."""
CHUNK = 8192  # rows evaluated at once, because the hidden layers of all rows would take a gigabyte

Transitions = tuple[Parts, Parts, Parts, Parts, Tensor]
"""Observation, action, task, next observation ([N, ...] each) and the episode hash [N] int64."""


PARTS = ("base", "reward", "termination")
"""The fits of a base, in the order of `Base.fits`. "base" is the fit of the numbers' change."""


class Base(nn.Module):
    """All state is in float32 tensors: saved, moved and counted, but not trained."""

    residual_scale: Tensor
    """[n] robust spread of the residual, at least the number's bin; shared by the members."""
    widening: Tensor
    """[n], and one for the duration if the spec has it: the factor of the network's scales that
    `widening.fit` chooses after training; 1 until then.
    """
    ridge: Tensor
    scale: Tensor
    fits: Tensor
    """[3, 2] float64: for each of PARTS the steps of its fit, and its held-out loss: the error over
    persistence's, nats, and nats. NaN without held-out data, or if there was nothing to fit.
    """

    def __init__(self, spec: Spec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        self.members = config.members
        table = spec.observation.table
        self.enabled = config.base and spec.observation.numbers > 0 and table is None
        """False with a table, because the base's networks would treat its slots differently."""
        n, k, hidden = spec.observation.numbers, config.members, config.base_hidden
        self.start = StartModel(spec)
        self.register_buffer("residual_scale", torch.ones(n))
        self.register_buffer("widening", torch.ones(n + int(spec.durations)))
        fits = torch.tensor([[0.0, torch.nan]] * len(PARTS), dtype=torch.float64)
        self.register_buffer("fits", fits)
        parts = (spec.observation, spec.action, spec.task, spec.observation)
        sizes: Any = {"members": k, "hidden": HEAD_HIDDEN, "width": HEAD_HIDDEN / BASE_HIDDEN}
        network = MemberMLP if table is None else TableMLP
        self.reward = network(*parts, outputs=reward_outputs(spec), **sizes)
        self.termination = network(*parts, outputs=1, **sizes)
        self.requires_grad_(False)
        if self.enabled:
            features = 1 + sum(_width(part) for part in (spec.observation, spec.action, spec.task))
            self.register_buffer("ridge", torch.zeros(k, features, n))
            self.register_buffer("scale", torch.ones(n))  # of the MLP's output
            widths = (features, hidden, hidden, n)
            for i in range(3):
                self.register_buffer(f"weight{i}", torch.zeros(k, widths[i], widths[i + 1]))
                self.register_buffer(f"bias{i}", torch.zeros(k, 1, widths[i + 1]))

    @property
    def metrics(self) -> dict[str, float]:
        """`base_steps`, `base_held_out` and so on for each part that was fitted."""
        names = ("steps", "held_out")
        values = {
            f"{part}_{name}": value
            for part, row in zip(PARTS, self.fits.tolist(), strict=True)
            for name, value in zip(names, row, strict=True)
            if row[0] > 0
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def record(self, part: str, fit: StoppedFit) -> None:
        """Note the result of a part's fit in `fits`."""
        self.fits[PARTS.index(part)] = torch.tensor([fit.steps, fit.loss], dtype=torch.float64)

    @property
    def mlp(self) -> list[Tensor]:
        """The MLP's weights and biases in turn, layer by layer."""
        return [getattr(self, f"{kind}{i}") for i in range(3) for kind in ("weight", "bias")]

    def features(self, observation: Parts, action: Parts, task: Parts) -> Tensor:
        """[..., F] float32: 1, and the numbers and small categories (one-hot) of all three."""
        columns = [torch.ones_like(observation.numbers[..., :1])]
        specs = (self.spec.observation, self.spec.action, self.spec.task)
        for spec, part in zip(specs, (observation, action, task), strict=True):
            columns.append(part.numbers)
            for i, cardinality in enumerate(spec.categories):
                if cardinality <= MAX_CARDINALITY:
                    columns.append(F.one_hot(part.categories[..., i], cardinality).float())
        return torch.cat(columns, -1)

    def forward(self, observation: Parts, action: Parts, task: Parts) -> Tensor:
        """[K, ..., n] float32: each member's predicted normalised change o' - o of the numbers."""
        lead = observation.numbers.shape[:-1]
        if not self.enabled:
            return observation.numbers.new_zeros(self.members, *lead, self.spec.observation.numbers)
        x = self.features(observation, action, task)
        x = x.reshape(-1, x.shape[-1]).expand(self.members, -1, -1)
        change = self._change(x)
        return change.reshape(self.members, *lead, change.shape[-1])

    def of_groups(self, token: Transition) -> Tensor:
        """[K, M, n] float32: the same of `token` [K, M], where each member has its own rows."""
        if not self.enabled:
            return torch.zeros_like(token.observation.numbers)
        return self._change(self.features(token.observation, token.action, token.task))

    def _change(self, x: Tensor) -> Tensor:
        return torch.baddbmm(_mlp(self.mlp, x) * self.scale, x, self.ridge)

    @staticmethod
    @torch.no_grad()
    def fit(
        spec: Spec,
        config: ModelConfig,
        transitions: Transitions,
        seed: int,
        report: Report = silent,
    ) -> Base:
        """Fit on the CPU in float32, on at most MAX_TRANSITIONS of `transitions`, spread evenly.

        The same input gives the same bits. `report` is called with the progress in words.
        """
        observation, action, task, following = (part.to("cpu") for part in transitions[:4])
        episode = transitions[4].cpu()
        base = Base(spec, config)
        generator = torch.Generator().manual_seed(seed)
        rows = len(episode)
        if spec.observation.numbers == 0 or rows == 0:
            return base
        if rows > MAX_TRANSITIONS:
            jitter = torch.rand(MAX_TRANSITIONS, generator=generator, dtype=torch.float64)
            spaced = (torch.arange(MAX_TRANSITIONS) + jitter) * (rows / MAX_TRANSITIONS)
            some = spaced.long().clamp(max=rows - 1)
            observation, action, task = observation[some], action[some], task[some]
            following, episode = following[some], episode[some]
        change = following.numbers - observation.numbers
        bins = torch.tensor(spec.observation.bins, dtype=torch.float32)
        if not base.enabled:
            variance = pooled(change.var(0, correction=0), spec.observation.table)
            base.residual_scale.copy_(torch.maximum(variance.sqrt(), bins))
            return base

        x = base.features(observation, action, task)
        keep = fitted_by(episode, base.members)
        keep = keep | ~keep.any(1, keepdim=True)
        _fit_ridge(base, x, change, keep)
        residual = change - torch.matmul(x, base.ridge)
        base.scale.copy_(torch.maximum(residual.pow(2).mean((0, 1)).sqrt(), bins))
        progress = of_part(report, "base")
        fitted = _fit_mlp(
            base, x, residual / base.scale, keep, config.base_steps, generator, progress
        )
        chunks = torch.arange(len(episode)).split(CHUNK)
        error = change - torch.cat([base(observation[c], action[c], task[c]) for c in chunks], 1)
        held_out = ~keep
        if held_out.any():
            error, rows_held_out = error[held_out], held_out.nonzero()[:, 1]
            size, wrong = (
                values.pow(2).mean(0).sqrt() for values in (change[rows_held_out], error)
            )
            relative = float((wrong / size)[size > 0].mean())
            base.record("base", replace(fitted, loss=relative))
        else:
            error = error.flatten(0, 1)
            base.record("base", fitted)
        base.residual_scale.copy_(_spread(error, bins))
        return base


def _width(part: PartSpec) -> int:
    return part.numbers + sum(c for c in part.categories if c <= MAX_CARDINALITY)


def _mlp(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """[K, B, F] -> [K, B, n]."""
    for i in range(2):
        x = torch.tanh(torch.baddbmm(weights[2 * i + 1], x, weights[2 * i]))
    return torch.baddbmm(weights[5], x, weights[4])


def _fit_ridge(base: Base, x: Tensor, change: Tensor, keep: Tensor) -> None:
    """Solve the normal equations of each member's rows, in float64."""
    x64, y64 = x.double(), change.double()
    for k in range(base.members):
        xk, yk = x64[keep[k]], y64[keep[k]]
        gram = xk.T @ xk + RIDGE * len(xk) * torch.eye(xk.shape[1], dtype=torch.float64)
        base.ridge[k] = torch.linalg.solve(gram, xk.T @ yk).float()


def _fit_mlp(
    base: Base,
    x: Tensor,
    target: Tensor,
    keep: Tensor,
    most: int,
    generator: torch.Generator,
    report: Report,
) -> StoppedFit:
    """AdamW on the Huber loss of `target` [K, N, n], which keeps rare impacts from dominating. Each
    member draws from its own rows, and the rows that it leaves out stop the fit.
    """
    weights = base.mlp
    for buffer in weights[:4:2]:
        buffer.normal_(0.0, buffer.shape[1] ** -0.5, generator=generator)
    if most == 0:
        return StoppedFit(0, math.nan)
    trained = [buffer.clone().requires_grad_() for buffer in weights]
    settings: Any = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "fused": True}
    optimizer = torch.optim.AdamW(trained, **settings)
    rows, held_out = (_rows(mask) for mask in (keep, ~keep))
    flat, first = target.flatten(0, 1), torch.arange(len(rows)).unsqueeze(1) * target.shape[1]

    def huber(index: Tensor, weight: Tensor) -> Tensor:
        """The mean of rows `index` [K, B], weighted by [K, B]."""
        error = F.huber_loss(_mlp(trained, x[index]), flat[index + first], reduction="none")
        return (error.mean(-1) * weight).sum() / weight.sum()

    def loss(step: int) -> Tensor:
        draws = [r[torch.randint(len(r), (BATCH,), generator=generator)] for r in rows]
        return len(rows) * huber(torch.stack(draws), torch.ones(len(rows), BATCH))

    judged, weight = _padded(held_out)
    judge = (lambda: huber(judged, weight)) if judged.numel() else None
    result = fit(optimizer, loss, judge, most, report)
    for buffer, values in zip(weights, trained, strict=True):
        buffer.copy_(values.detach())
    return result


def _rows(mask: Tensor) -> list[Tensor]:
    """The numbers of each member's rows, from bool [K, N]."""
    return [m.nonzero().squeeze(1) for m in mask]


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """At most JUDGED rows of each member, evenly: int64 [K, B], and 1 [K, B] where one is real."""
    most = min(JUDGED, max(map(len, rows)))
    index = torch.zeros(len(rows), most, dtype=torch.int64)
    weight = torch.zeros(len(rows), most)
    for k, r in enumerate(rows):
        some = r[torch.arange(min(len(r), most)) * len(r) // max(1, min(len(r), most))]
        index[k, : len(some)], weight[k, : len(some)] = some, 1.0
    return index, weight


def _spread(error: Tensor, bins: Tensor) -> Tensor:
    """[N, n] -> [n]: the geometric mean of the standard deviation, which outliers dominate, and of
    1.48 MAD, which ignores them; at least the bin.
    """
    deviation = error.pow(2).mean(0).sqrt()
    robust = 1.4826 * error.abs().median(0).values
    return torch.maximum((deviation * torch.maximum(robust, 0.01 * deviation)).sqrt(), bins)
