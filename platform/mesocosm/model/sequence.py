"""The sequence family: a causal transformer over environment steps, with a decoder inside the step.

One token a step holds (o_t, a_t, task); its features h_t condition K decoders of o_{t+1} (and the
duration). RMSNorm, RoPE, SwiGLU and SDPA; widths and depths share hyperparameters as `ladder` says.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mesocosm.model.config import ModelConfig
from mesocosm.model.decoder import Decoder, Layout, Scale
from mesocosm.model.ladder import HEAD, Dims, dims
from mesocosm.model.layers import Constant, Linear, PartsEmbedding, RMSNorm, flatten, read
from mesocosm.model.net import BaseOut, Cache, Draw, Outcome, Transition, WorldNet, spread
from mesocosm.model.spec import Parts, Spec

ROPE_BASE = 10000.0


class KeyValues(Cache):
    """`data` [layers, 2, W, B, heads, HEAD]: rotated keys, and values."""

    def __init__(self, data: Tensor):
        self.data = data


class Block(nn.Module):
    """Attention over steps, then SwiGLU: [B, T, d] -> the same."""

    def __init__(self, dims: Dims):
        super().__init__()
        width, depth, d = dims.width, dims.depth, dims.d_model
        self.heads = dims.heads
        self.multiplier = dims.residual_multiplier
        self.norm_1 = RMSNorm(d, m_width=width, m_depth=depth)
        self.qkv = Linear(d, 3 * d, "hidden", width=width, depth=depth)
        self.out = Linear(d, d, "hidden", width=width, depth=depth, multiplier=self.multiplier)
        self.norm_2 = RMSNorm(d, m_width=width, m_depth=depth)
        self.up = Linear(d, 2 * dims.d_ff, "hidden", width=width, depth=depth)
        self.down = Linear(
            dims.d_ff, d, "hidden", width=width, depth=depth, multiplier=self.multiplier
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Within windows: every step sees the steps before it."""
        q, k, v = (part.transpose(1, 2) for part in self._qkv(x, rope))
        return self._rest(
            x, F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        )

    def columns(self, x: Tensor, rope: tuple[Tensor, Tensor], data: Tensor, seen: Tensor) -> Tensor:
        """The same for the first C columns x [B, C, d], under a mask `seen` [B, 1, C, C], filling
        `data` [2, W, B, heads, HEAD].
        """
        q, k, v = (part.transpose(1, 2) for part in self._qkv(x, rope))
        data[0, : x.shape[1]], data[1, : x.shape[1]] = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
        return self._rest(
            x, F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        )

    def step(
        self, x: Tensor, rope: tuple[Tensor, Tensor], data: Tensor, column: int, seen: Tensor
    ) -> Tensor:
        """The same for one column x [B, 1, d], written to `data`; `seen` [column + 1, B, 1] is
        added to the scores.
        """
        q, k, v = (part.squeeze(1) for part in self._qkv(x, rope))
        data[0, column], data[1, column] = k, v
        # Plain products over few columns: half the time of the fused kernel, which is made for many
        # queries.
        score = torch.add(seen, (data[0, : column + 1] * q).sum(-1), alpha=HEAD**-0.5)
        attended = (score.softmax(0).unsqueeze(-1) * data[1, : column + 1]).sum(0)
        return self._rest(x, attended.unsqueeze(1))

    def _qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, T, heads, HEAD]."""
        b, t, _ = x.shape
        qk, v = self.qkv(self.norm_1(x)).view(b, t, 3, self.heads, HEAD).split((2, 1), 2)
        q, k = rotate(qk, rope).unbind(2)
        return q, k, v.squeeze(2)

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.flatten(2))
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        return cast(Tensor, x + self.down(F.silu(gate) * up))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of [B, T, ..., HEAD] by angles
    [T, 1, 1, HEAD], in float32.
    """
    cos, sin = rope
    wide = x.float()
    a, b = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Sequence(WorldNet):
    """See the module. `dims`: its rung of the ladder; `memory` = W = `config.context`."""

    def __init__(self, spec: Spec, config: ModelConfig):
        rung = dims(config.size)
        super().__init__(spec, config, hidden=2 * rung.d_model, features=rung.d_model)
        self.dims = rung
        self.memory = config.context
        self.embed = PartsEmbedding(spec.observation, spec.action, spec.task, width=rung.d_model)
        self.blocks = nn.ModuleList(Block(rung) for _ in range(rung.layers))
        self.norm = RMSNorm(rung.d_model, m_width=rung.width, m_depth=1.0)
        o, extra = spec.observation, int(spec.durations)
        order = (
            [("number", j) for j in range(o.numbers)]
            + [("category", j) for j in range(len(o.categories))]
            + [("number", o.numbers)] * extra
        )
        layout = Layout(tuple(order), o.bins + (spec.duration_bin,) * extra, o.categories, o.texts)
        self.decoder = Decoder(
            layout, rung, members=config.members, components=config.components, inputs=rung.d_model
        )
        angle = torch.arange(self.memory).unsqueeze(-1) / ROPE_BASE ** (
            torch.arange(0, HEAD, 2) / HEAD
        )
        angle = angle.repeat(1, 2)[:, None, None]
        self._cos, self._sin, self._columns = (
            Constant(angle.cos()),
            Constant(angle.sin()),
            Constant(torch.arange(self.memory)),
        )

    # -- history
    # -----------------------------------------------------------------------------------------------------

    def context(self, transition: Transition) -> Tensor:
        x = self._embed(transition)
        rope = self._rope(x, slice(0, x.shape[1]))
        for block in self.blocks:
            x = (
                checkpoint(block, x, rope, use_reentrant=False)
                if self.checkpoint_activations and torch.is_grad_enabled()
                else block(x, rope)
            )
        return self.norm(x)

    def new_cache(self, batch: int) -> KeyValues:
        weight = self.norm.weight
        return KeyValues(
            torch.zeros(
                self.dims.layers,
                2,
                self.memory,
                batch,
                self.dims.heads,
                HEAD,
                device=weight.device,
                dtype=weight.dtype,
            )
        )

    def advance(
        self, cache: Cache | None, column: int, start_column: Tensor, token: Transition
    ) -> Tensor:
        assert isinstance(cache, KeyValues) and column < self.memory
        x = self._embed(token).unsqueeze(1)
        # A step always sees itself: replayed columns from before an environment's present episode
        # must stay finite.
        hidden = self._columns(x)[: column + 1].unsqueeze(1) < start_column.clamp(max=column)
        seen = (
            torch.zeros(hidden.shape, device=x.device, dtype=x.dtype)
            .masked_fill_(hidden, -torch.inf)
            .unsqueeze(-1)
        )
        rope = self._rope(x, slice(column, column + 1))
        for layer, block in enumerate(cast(list[Block], list(self.blocks))):
            x = block.step(x, rope, cache.data[layer], column, seen)
        return cast(Tensor, self.norm(x.squeeze(1)))

    def rebuild(self, cache: Cache | None, start_column: Tensor, tokens: Transition) -> None:
        assert isinstance(cache, KeyValues)
        x = self._embed(tokens)
        columns = self._columns(x)[: x.shape[1]]
        before = (columns <= columns.unsqueeze(-1)) & (columns >= start_column[:, None, None])
        allowed = before | (columns == columns.unsqueeze(-1))
        seen = (
            torch.zeros(allowed.shape, device=x.device, dtype=x.dtype)
            .masked_fill_(~allowed, -torch.inf)
            .unsqueeze(1)
        )
        rope = self._rope(x, slice(0, x.shape[1]))
        for layer, block in enumerate(cast(list[Block], list(self.blocks))):
            x = block.columns(x, rope, cache.data[layer], seen)

    def _embed(self, token: Transition) -> Tensor:
        embedded: Tensor = self.embed(read(token.observation, token.action, token.task))
        return embedded

    def _rope(self, x: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        return self._cos(x)[columns], self._sin(x)[columns]

    # -- what comes next
    # ---------------------------------------------------------------------------------------------

    def _scale(self, base: BaseOut) -> Scale:
        """The decoder's numbers are the changes, and the duration as it is."""
        shift, scale = base.change.flatten(1, -2).float(), base.scale.float()
        if self.spec.durations:
            shift, scale = F.pad(shift, (0, 1)), F.pad(scale, (0, 1), value=1.0)
        return Scale(shift, scale)

    def log_prob(
        self, features: Tensor | None, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> tuple[Tensor, Tensor | None]:
        assert features is not None
        change, absolute, categories = self._outcome(transition, outcome)
        log_prob = self.decoder.log_prob(
            features.flatten(0, -2), change, categories, self._scale(base), absolute
        )
        log_prob = log_prob.unflatten(1, features.shape[:-1])
        if not self.spec.durations:
            return log_prob.sum(-1), None
        return log_prob[..., :-1].sum(-1), log_prob[..., -1]

    def draw(
        self,
        features: Tensor | None,
        transition: Transition,
        base: BaseOut,
        member: Tensor,
        keys: Tensor,
    ) -> Draw:
        n = self.spec.observation.numbers
        now = transition.observation.numbers
        seen = F.pad(now, (0, 1)) if self.spec.durations else now
        change, categories, means, chances = self.decoder.draw(
            features, self._scale(base), member, keys, seen
        )
        duration = change[:, n] if self.spec.durations else change.new_zeros(len(change))
        return Draw(
            Parts(now + change[:, :n], categories), duration, spread(means[..., :n], chances)
        )

    def disagreement(
        self, features: Tensor | None, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> Tensor:
        assert features is not None
        change, absolute, categories = self._outcome(transition, outcome)
        means, chances = self.decoder.expected(
            features.flatten(0, -2), change, categories, self._scale(base), absolute
        )
        return spread(means[..., : self.spec.observation.numbers], chances).view(
            features.shape[:-1]
        )

    def _outcome(self, transition: Transition, outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder scores and what its later slots read of it, the duration last, and the
        categories; leading dimensions as one.
        """
        now, after = flatten(transition.observation), flatten(outcome.observation)
        change, absolute = after.numbers - now.numbers, after.numbers
        if self.spec.durations:
            duration = outcome.duration.flatten().unsqueeze(-1)
            change, absolute = (
                torch.cat((change, duration), -1),
                torch.cat((absolute, duration), -1),
            )
        return change, absolute, after.categories
