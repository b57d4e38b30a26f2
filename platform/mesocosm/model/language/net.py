"""The trained part of a text world: a backbone, and heads of reward and termination that read its
state at `<eoo>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mesocosm.model.heads import RewardHead, TerminationHead, bce, reward_outputs
from mesocosm.model.language.llama import Llama, padded
from mesocosm.model.language.shape import Shape
from mesocosm.model.language.stream import DYNAMICS, READ, TASK, TokenRows
from mesocosm.model.layers import Linear
from mesocosm.model.net import WindowLosses
from mesocosm.model.spec import Spec

Count = TypeVar("Count", float, Tensor)
LARGEST = 1 << 25
"""Most logits (tokens times vocabulary) that are in memory at once; more are computed in parts,
again in the backward pass.
"""


class Backbone(Protocol):
    """The four calls of a causal language model; `llama.Llama` documents them. Each backbone has a
    cache of its class, with `batch`, `columns`, `length`, `rewind` and `select` as
    `cache.KeyCache`.
    """

    shape: Shape
    members: int
    token_bytes: int
    checkpoint_activations: bool

    def hidden(
        self,
        ids: Tensor,
        position: Tensor,
        segment: Tensor | None = None,
        member: Tensor | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def new_cache(self, batch: int, window: int) -> Any: ...

    def feed(
        self, cache: Any, ids: Tensor, count: Tensor, member: Tensor | None = None
    ) -> Tensor: ...


def bits_per_byte(nats: Count, size: Count) -> Count:
    """Bits of the dynamics per byte of text: comparable between tokenizers.

    Args:
        nats: The sum over the scored observations.
        size: Their bytes, as `TextLosses.bytes` counts them; of none the result is 0.
    """
    return nats / (size + (size == 0)) / math.log(2.0)


@dataclass(frozen=True)
class TextLosses(WindowLosses):
    """The losses of rows: `by_window` holds a sum for each row, `transitions` the scored steps."""

    bytes: Tensor
    """float32 scalar: UTF-8 bytes of the scored observations, and 1 a text for its mark; the starts
    are not among them."""
    tokens: Tensor  # float32 scalar: tokens that are not padding

    @property
    def bits_per_byte(self) -> Tensor:
        """Like the function of this name."""
        return bits_per_byte(self.nats["dynamics"], self.bytes)

    @property
    def counts(self) -> dict[str, Tensor]:
        """Like `WindowLosses.counts`, with the bytes and the tokens."""
        return {"transitions": self.transitions, "bytes": self.bytes, "tokens": self.tokens}


@dataclass(frozen=True)
class StepPredictions:
    """A network's predictions of N logged steps, each after all texts up to and with its own."""

    uncertainty: Tensor
    """[N] float32: `TextStep.disagreement` before its scale"""
    p_terminated: Tensor  # [N] float32, the members' mean
    reward: Tensor  # [N] float32, raw: the most likely one, or the expected one of numbers


class TextNet(nn.Module):
    """A backbone and the heads of its K members. Texts, rewards and terminations are trained
    together, one nat each as much as another.
    """

    def __init__(self, backbone: nn.Module, spec: Spec):
        """`backbone`: a `Backbone`. `spec`: its rewards and terminations."""
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        shape, members = self.model.shape, self.model.members
        self.members = members

        def output(outputs: int) -> Linear:
            return Linear(
                shape.d_model,
                outputs,
                "output",
                members=members,
                width=shape.width,
                bias=True,
                gain=0.0,
            )

        self.reward_output = output(reward_outputs(spec))
        self.termination_output = output(1)
        self.reward = RewardHead(spec, members, features=0)
        self.termination = TerminationHead(spec, members, features=0)

    @property
    def checkpoint_activations(self) -> bool:
        """Recompute the backbone's blocks in the backward pass."""
        return self.model.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: bool) -> None:
        self.model.checkpoint_activations = value

    @property
    def model(self) -> Backbone:
        """The backbone by its calls."""
        return cast(Backbone, self.backbone)

    def drop(self, rate: float) -> None:
        """Like `Llama.drop`. Other backbones drop nothing."""
        if isinstance(self.backbone, Llama):
            self.backbone.drop(rate)

    def forward(self, rows: TokenRows) -> TextLosses:
        """The losses of rows, each token read by its member. The objective is the sum of all parts,
        divided by B * T.
        """
        parts = self._token_nats(rows)
        total = torch.stack([nats.sum() for nats in parts.values()]).sum()
        by_row = {name: nats.detach().sum(1) for name, nats in parts.items()}
        return self._losses(rows, total / rows.ids.numel(), by_row)

    @torch.no_grad()
    def losses(self, rows: TokenRows) -> TextLosses:
        """The losses by the mean likelihood of all members, each transition by itself."""
        if self.members == 1:
            return self(rows)
        # Tokens up to and including a mark belong to the same text.
        index = rows.mark.long().cumsum(1) - rows.mark.long()
        texts: dict[str, list[Tensor]] = {}
        for member in range(self.members):
            for name, nats in self._token_nats(rows.read_by(member)).items():
                texts.setdefault(name, []).append(
                    nats.new_zeros(nats.shape).scatter_add(1, index, nats)
                )
        by_row = {
            name: (math.log(self.members) - torch.logsumexp(-torch.stack(nats), 0)).sum(1)
            for name, nats in texts.items()
        }
        total = torch.stack([nats.sum() for nats in by_row.values()]).sum()
        return self._losses(rows, total / rows.ids.numel(), by_row)

    @torch.no_grad()
    def predictions(self, rows: TokenRows) -> StepPredictions:
        """The members' opinions of the scored steps of rows, row after row."""
        index = rows.mark.long().cumsum(1) - rows.mark.long()
        scored = (rows.part == DYNAMICS).float()
        empty = torch.zeros_like(scored)
        count = empty.scatter_add(1, index, scored).clamp(min=1.0)
        opinions: list[Tensor] = []
        ended: list[Tensor] = []
        outputs: list[Tensor] = []
        for member in range(self.members):
            read = rows.read_by(member)
            hidden = self.model.hidden(read.ids, read.position, read.segment, read.member)
            nats = self._text_nats(hidden, read.ids.roll(-1, 1)).roll(1, 1) * scored
            if self.members == 1:
                opinions.append(empty.scatter_reduce(1, index, nats, "amax"))
            else:
                opinions.append(empty.scatter_add(1, index, nats) / count)
            states = hidden[rows.steps]
            ended.append(torch.sigmoid(self.termination_logits(states)[member]))
            outputs.append(self.reward_states(states)[member])
        apart = opinions[0] if self.members == 1 else torch.stack(opinions).std(0, correction=0)
        mean = torch.stack(outputs).mean(0, keepdim=True)
        if self.reward.categorical:
            reward = self.reward.values(mean)[mean.argmax(-1)]
        else:
            reward = self.reward.expected(mean, None)
        at_steps = apart.gather(1, index)[rows.steps]
        return StepPredictions(at_steps, torch.stack(ended).mean(0), reward.squeeze(0))

    def reward_states(self, states: Tensor) -> Tensor:
        """[N, d] states at marks -> [K, N, out], the outputs that `self.reward` reads."""
        return self._head(self.reward_output, states)

    def termination_logits(self, states: Tensor) -> Tensor:
        """[N, d] states at marks -> [K, N] float32."""
        logits: Tensor = self.termination.logit(self._head(self.termination_output, states))
        return logits

    def heads(self) -> dict[str, Tensor]:
        """The heads and the members' adapters by name: all that the backbone's checkpoint lacks."""
        backbone = {f"backbone.{name}" for name, _ in self.backbone.named_parameters()}
        state = self.state_dict()
        return {k: t for k, t in state.items() if k not in backbone or "_adapter." in k}

    def load_heads(self, heads: dict[str, Tensor]) -> None:
        """Copy `heads` from another network. Raises ValueError if a tensor is missing or is one too
        many.
        """
        if different := sorted(heads.keys() ^ self.heads().keys()):
            raise ValueError(
                f"the heads must have the tensors of their world.json, but {different[0]!r} is in"
                " only one of them; pretrain the world again"
            )
        self.load_state_dict(heads, strict=False)

    def _head(self, output: Linear, states: Tensor) -> Tensor:
        outputs: Tensor = output(padded(states))
        return outputs[:, : len(states)].float()

    def _token_nats(self, rows: TokenRows) -> dict[str, Tensor]:
        """[B, T] float32 by part, at the token that each is of."""
        hidden = self.model.hidden(rows.ids, rows.position, rows.segment, rows.member)
        text = self._text_nats(hidden, rows.ids.roll(-1, 1)).roll(1, 1)
        steps, flat, member = rows.steps, hidden.flatten(0, 1), rows.member.flatten().unsqueeze(0)
        reward = -self.reward.log_prob(self.reward_states(flat), None, rows.reward.flatten())
        ended = bce(self.termination_logits(flat), rows.ended.flatten().float())
        by_member = [nats.gather(0, member).view(steps.shape) for nats in (reward, ended)]
        scored = {
            "dynamics": (text, rows.part == DYNAMICS),
            "reward": (by_member[0], steps),
            "termination": (by_member[1], steps),
            "task": (text, rows.part == TASK),
        }
        return {name: torch.where(where, nats, 0.0) for name, (nats, where) in scored.items()}

    def _text_nats(self, hidden: Tensor, target: Tensor) -> Tensor:
        """-log p of the tokens `target` [B, T] by the states [B, T, d] before them."""
        flat, targets = hidden.flatten(0, 1), target.flatten()
        size = max(1, LARGEST // self.model.shape.vocabulary)
        if len(flat) <= size or flat.is_meta:
            return self._nats(flat, targets).view(target.shape)
        nats: Callable[..., Tensor] = self._nats
        parts = [
            cast(Tensor, checkpoint(nats, *part, use_reentrant=False))
            for part in zip(flat.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(parts).view(target.shape)

    def _nats(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model.logits(hidden).float(), target, reduction="none")

    def _losses(self, rows: TokenRows, objective: Tensor, by_row: dict[str, Tensor]) -> TextLosses:
        steps = rows.steps
        count = torch.where(steps, rows.bytes, 0).sum().float()
        return TextLosses(objective, by_row, steps.sum().float(), count, rows.tokens.float())


def blank_rows(batch: int, window: int) -> TokenRows:
    """Rows of zeros on torch's default device, for counting."""
    zeros = torch.zeros(batch, window, dtype=torch.int64)
    flags, part = zeros == 1, torch.full_like(zeros, READ)
    count = torch.tensor(batch * window)
    return TokenRows(zeros, zeros, None, part, flags, zeros.float(), flags, zeros, zeros, count)
