"""The base of the dynamics: the change of an observation's numbers as closed-form ridge + small
MLP, frozen before pretraining.

The networks model only the residual over it. K members, each fitted on its own episodes
(`rng.member_mask`), because members that share a base agree everywhere. Far outside the data the
ridge goes on linearly and the MLP, whose last hidden units are tanh, stays bounded: nothing is
clipped, yet an imagined state can leave the range of the data without being thrown to infinity by
an extrapolating network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mesocosm.model.config import ModelConfig
from mesocosm.model.rng import left_out, member_mask
from mesocosm.model.spec import Parts, PartSpec, Spec

MAX_CARDINALITY = 16
"""Category slots of more values (text) do not enter the base."""
MAX_TRANSITIONS = 200_000
BATCH = 128
LR = 7e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 1e-4
RIDGE = 1e-7
"""Ridge penalty a transition; features are normalised."""

Transitions = tuple[Parts, Parts, Parts, Parts, Tensor]
"""Observation, action, task, next observation ([N, ...] each) and the episode hash [N] int64."""


def _width(part: PartSpec) -> int:
    return part.numbers + sum(c for c in part.categories if c <= MAX_CARDINALITY)


class Base(nn.Module):
    """Frozen: all state is in buffers, float32, so that it is saved, moved and counted but never
    trained with the network.
    """

    residual_scale: Tensor
    """[n] robust spread of the change that is left over, at least the number's bin; shared by the
    members.
    """
    ridge: Tensor
    scale: Tensor

    def __init__(self, spec: Spec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        self.members = config.members
        self.enabled = config.base and spec.observation.numbers > 0
        n, k = spec.observation.numbers, config.members
        self.register_buffer("residual_scale", torch.ones(n))
        if self.enabled:
            features = 1 + _width(spec.observation) + _width(spec.action) + _width(spec.task)
            self.register_buffer("ridge", torch.zeros(k, features, n))
            self.register_buffer("scale", torch.ones(n))  # of the MLP's output
            for i, (fan_in, fan_out) in enumerate(self._layers(features, config.base_hidden, n)):
                self.register_buffer(f"weight{i}", torch.zeros(k, fan_in, fan_out))
                self.register_buffer(f"bias{i}", torch.zeros(k, 1, fan_out))

    @staticmethod
    def _layers(features: int, hidden: int, n: int) -> tuple[tuple[int, int], ...]:
        return (features, hidden), (hidden, hidden), (hidden, n)

    def _mlp_buffers(self) -> list[Tensor]:
        return [
            buffer
            for i in range(3)
            for buffer in (getattr(self, f"weight{i}"), getattr(self, f"bias{i}"))
        ]

    def features(self, observation: Parts, action: Parts, task: Parts) -> Tensor:
        """[..., F] float32: 1, the numbers and the small categories (one-hot) of observation,
        action and task.
        """
        columns = [torch.ones_like(observation.numbers[..., :1])]
        for part, values in (
            (self.spec.observation, observation),
            (self.spec.action, action),
            (self.spec.task, task),
        ):
            columns.append(values.numbers)
            for i, cardinality in enumerate(part.categories):
                if cardinality <= MAX_CARDINALITY:
                    columns.append(
                        F.one_hot(values.categories[..., i], cardinality).to(values.numbers.dtype)
                    )
        return torch.cat(columns, -1)

    def forward(self, observation: Parts, action: Parts, task: Parts) -> Tensor:
        """[K, ..., n] float32: each member's normalised change o' - o of the numbers, for any
        leading shape [...].
        """
        lead = observation.numbers.shape[:-1]
        if not self.enabled:
            return observation.numbers.new_zeros(self.members, *lead, self.spec.observation.numbers)
        x = (
            self.features(observation, action, task).flatten(0, -2)
            if lead
            else self.features(observation, action, task).unsqueeze(0)
        )
        x = x.unsqueeze(0).expand(self.members, -1, -1)
        return (
            torch.baddbmm(_mlp(self._mlp_buffers(), x) * self.scale, x, self.ridge)
            .unflatten(1, lead or (1,))
            .reshape(self.members, *lead, -1)
        )

    @staticmethod
    @torch.no_grad()
    def fit(
        spec: Spec,
        config: ModelConfig,
        transitions: Transitions,
        seed: int,
        steps: int | None = None,
    ) -> Base:
        """Fit on `transitions` (at most MAX_TRANSITIONS of them, spread evenly), on the CPU in
        float32; the same result for the same input.

        `steps` of the MLP's training; None is `config.base_steps`.
        """
        observation, action, task, following = (part.to("cpu") for part in transitions[:4])
        episode = transitions[4].cpu()
        base = Base(spec, config)
        generator = torch.Generator().manual_seed(seed)
        rows = episode.shape[0]
        if rows > MAX_TRANSITIONS:
            jitter = torch.rand(MAX_TRANSITIONS, generator=generator, dtype=torch.float64)
            chosen = (
                ((torch.arange(MAX_TRANSITIONS) + jitter) * (rows / MAX_TRANSITIONS))
                .long()
                .clamp(max=rows - 1)
            )
            observation, action, task, following = (
                part[chosen] for part in (observation, action, task, following)
            )
            episode = episode[chosen]
        change = following.numbers - observation.numbers
        bins = torch.tensor(spec.observation.bins, dtype=torch.float32)
        if spec.observation.numbers == 0 or rows == 0:
            return base
        if not base.enabled:
            base.residual_scale.copy_(torch.maximum(change.std(0, correction=0), bins))
            return base
        x = base.features(observation, action, task)
        keep = member_mask(episode, base.members) | left_out(episode, base.members).unsqueeze(1)
        _fit_ridge(base, x, change, keep)
        residual = change - torch.matmul(x, base.ridge)
        base.scale.copy_(torch.maximum(residual.pow(2).mean((0, 1)).sqrt(), bins))
        _fit_mlp(
            base,
            x,
            residual / base.scale,
            keep,
            config.base_steps if steps is None else steps,
            generator,
        )
        chunks = torch.arange(len(episode)).split(
            8192
        )  # hidden layers of all rows at once would take a gigabyte
        left = change - torch.cat([base(observation[c], action[c], task[c]) for c in chunks], 1)
        unseen = ~keep
        left = left[unseen] if unseen.any() else left.flatten(0, 1)
        base.residual_scale.copy_(_spread(left, bins))
        return base


def _mlp(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """[K, B, F] -> [K, B, n]."""
    for i in range(2):
        x = torch.tanh(torch.baddbmm(weights[2 * i + 1], x, weights[2 * i]))
    return torch.baddbmm(weights[5], x, weights[4])


def _fit_ridge(base: Base, x: Tensor, change: Tensor, keep: Tensor) -> None:
    """The normal equations of each member's own rows, in float64."""
    x64, y64 = x.double(), change.double()
    for k in range(base.members):
        rows = keep[k]
        xk, yk = x64[rows], y64[rows]
        gram = xk.T @ xk + RIDGE * len(xk) * torch.eye(xk.shape[1], dtype=torch.float64)
        base.ridge[k] = torch.linalg.solve(gram, xk.T @ yk).float()


def _fit_mlp(
    base: Base, x: Tensor, target: Tensor, keep: Tensor, steps: int, generator: torch.Generator
) -> None:
    """AdamW with a cosine to zero on the Huber loss of `target` [K, N, n], so that rare impacts do
    not own the fit; each member draws from its own rows.
    """
    weights = base._mlp_buffers()
    for buffer in weights[:4:2]:
        buffer.normal_(0.0, buffer.shape[1] ** -0.5, generator=generator)
    if steps == 0:
        return
    trained = [buffer.clone().requires_grad_() for buffer in weights]
    optimizer = torch.optim.AdamW(
        trained, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    rows = [mask.nonzero().squeeze(1) for mask in keep]
    flat, member = target.flatten(0, 1), torch.arange(len(rows)).unsqueeze(1) * target.shape[1]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.stack(
            [own[torch.randint(len(own), (BATCH,), generator=generator)] for own in rows]
        )
        with torch.enable_grad():
            loss = F.huber_loss(_mlp(trained, x[index]), flat[index + member], reduction="sum") / (
                BATCH * target.shape[-1]
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for buffer, values in zip(weights, trained, strict=True):
        buffer.copy_(values.detach())


def _spread(left: Tensor, bins: Tensor) -> Tensor:
    """[N, n] -> [n]: the geometric mean of the standard deviation (which outliers own) and of 1.48
    MAD (which they do not), at least the bin.
    """
    deviation = left.pow(2).mean(0).sqrt()
    robust = 1.4826 * left.abs().median(0).values
    return torch.maximum((deviation * torch.maximum(robust, 0.01 * deviation)).sqrt(), bins)
