"""The sequence family: a causal transformer over environment steps, with a decoder inside the step.

One token a step holds (o_t, a_t, task); its features h_t condition K decoders of o_{t+1} (and of
the duration). RMSNorm, RoPE, SwiGLU and SDPA.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mesocosm.model.config import ModelConfig
from mesocosm.model.decoder import Decoder, Scale, slot_order
from mesocosm.model.ensemble import Ensemble
from mesocosm.model.ladder import HEAD, dims
from mesocosm.model.layers import Constant, Inputs, PartsEmbedding, RMSNorm, TransformerBlock, read
from mesocosm.model.net import BaseOut, Features, WorldNet, spread
from mesocosm.model.spec import Spec
from mesocosm.model.tables import TableMixer
from mesocosm.model.tensors import Outcome, Parts, Transition

ROPE_BASE = 10000.0
Rope = tuple[Tensor, Tensor]
"""(cos, sin) [T, 1, 1, HEAD] of the positions' angles"""


class StepBlock(TransformerBlock):
    """Attention over steps, then SwiGLU: [B, T, d] -> the same."""

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Within windows: every step sees the steps before it."""
        q, k, v = (part.transpose(1, 2) for part in self._qkv(x, rope))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.residual(x, attended.transpose(1, 2).flatten(2))

    def columns(self, x: Tensor, rope: Rope, cache: Tensor, mask: Tensor) -> Tensor:
        """The same for the first C columns x [B, C, d], with `mask` [B, 1, C, C] added to the
        scores; fills `cache` [2, W, B, heads, HEAD].
        """
        q, k, v = (part.transpose(1, 2) for part in self._qkv(x, rope))
        c = x.shape[1]
        cache[0, :c], cache[1, :c] = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.residual(x, attended.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, rope: Rope, cache: Tensor, column: int, mask: Tensor) -> Tensor:
        """The same for one column x [B, 1, d], which is written to `cache`; `mask`
        [column + 1, B, 1] is added to the scores.
        """
        q, k, v = (part.squeeze(1) for part in self._qkv(x, rope))
        cache[0, column], cache[1, column] = k, v
        # Plain products over few columns take half the time of the fused kernel, which is built for
        # many queries.
        score = torch.add(mask, (cache[0, : column + 1] * q).sum(-1), alpha=HEAD**-0.5)
        attended = (score.softmax(0).unsqueeze(-1) * cache[1, : column + 1]).sum(0)
        return self.residual(x, attended.unsqueeze(1).flatten(2))

    def _qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, T, heads, HEAD]."""
        b, t, _ = x.shape
        qk, v = self.qkv(self.norm_1(x)).view(b, t, 3, self.heads, HEAD).split((2, 1), 2)
        q, k = rotate(qk, rope).unbind(2)
        return q, k, v.squeeze(2)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of [B, T, ..., HEAD], in
    float32.
    """
    cos, sin = rope
    wide = x.float()
    a, b = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class StepBackbone(WorldNet):
    """A causal transformer over steps; `memory` = W = `config.context`."""

    def _new_backbone(self, embed: nn.Module, config: ModelConfig) -> None:
        """`embed`: (o, a, task) to [..., d]."""
        stack = dims(config.size).backbone
        self.memory = config.context
        self.embed = embed
        self.blocks = nn.ModuleList(StepBlock(stack) for _ in range(stack.layers))
        self.norm = RMSNorm(stack, depth=1.0)
        columns = torch.arange(self.memory)
        rate = ROPE_BASE ** (torch.arange(0, HEAD, 2) / HEAD)
        angle = (columns.unsqueeze(-1) / rate).repeat(1, 2)[:, None, None]
        self._cos, self._sin = Constant(angle.cos()), Constant(angle.sin())
        self._columns = Constant(columns)

    def _embed(self, token: Transition) -> Tensor:
        embedded: Tensor = self.embed(read(token.observation, token.action, token.task))
        return embedded

    def _rope(self, x: Tensor, columns: slice) -> Rope:
        return self._cos(x)[columns], self._sin(x)[columns]

    # History.

    def context(self, transition: Transition) -> Tensor:
        x = self._embed(transition)
        rope = self._rope(x, slice(0, x.shape[1]))
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, rope, use_reentrant=False) if recompute else block(x, rope)
        return self.norm(x)

    def new_cache(self, batch: int) -> Tensor:
        """[layers, 2, W, B, heads, HEAD]: rotated keys, and values."""
        block = cast(StepBlock, self.blocks[0])
        shape = (len(self.blocks), 2, self.memory, batch, block.heads, HEAD)
        return self.norm.weight.new_zeros(shape)

    def advance(
        self, cache: Tensor | None, column: int, start_column: Tensor, token: Transition
    ) -> Tensor:
        assert cache is not None and column < self.memory
        x = self._embed(token).unsqueeze(1)
        # A step always sees itself: replayed columns from before an environment's present episode
        # must stay finite.
        seen = self._columns(x)[: column + 1].unsqueeze(1) >= start_column.clamp(max=column)
        mask = _score_mask(seen, x).unsqueeze(-1)
        rope = self._rope(x, slice(column, column + 1))
        for layer, block in enumerate(cast(list[StepBlock], list(self.blocks))):
            x = block.step(x, rope, cache[layer], column, mask)
        return cast(Tensor, self.norm(x.squeeze(1)))

    def rebuild(self, cache: Tensor | None, start_column: Tensor, tokens: Transition) -> None:
        assert cache is not None
        x = self._embed(tokens)
        columns = self._columns(x)[: x.shape[1]]
        row = columns.unsqueeze(-1)
        seen = ((columns <= row) & (columns >= start_column[:, None, None])) | (columns == row)
        mask = _score_mask(seen, x).unsqueeze(1)
        rope = self._rope(x, slice(0, x.shape[1]))
        for layer, block in enumerate(cast(list[StepBlock], list(self.blocks))):
            x = block.columns(x, rope, cache[layer], mask)


class Sequence(StepBackbone):
    """A backbone with K decoders of the next step."""

    def __init__(self, spec: Spec, config: ModelConfig):
        d, o = dims(config.size).d_model, spec.observation
        super().__init__(spec, config, features=d)
        self._new_backbone(PartsEmbedding(o, spec.action, spec.task, width=d), config)
        order, slots = slot_order(o), o
        if spec.durations:
            order = (*order, ("number", o.numbers))
            slots = replace(o, numbers=o.numbers + 1, bins=(*o.bins, spec.duration_bin))
        self.decoder = Decoder(slots, order, config, members=config.members, inputs=d)

    def _decoder_inputs(
        self, transition: Transition, outcome: Outcome
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers that the decoder scores (changes, and the duration last), the numbers that
        its later slots read, and the categories; leading dimensions joined.
        """
        now, following = transition.observation.flatten(), outcome.observation.flatten()
        change, absolute = following.numbers - now.numbers, following.numbers
        if self.spec.durations:
            duration = outcome.duration.reshape(-1, 1)
            change = torch.cat((change, duration), -1)
            absolute = torch.cat((absolute, duration), -1)
        return change, absolute, following.categories

    def log_prob(
        self, features: Features, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> tuple[Tensor, Tensor | None]:
        assert features is not None
        change, absolute, categories = self._decoder_inputs(transition, outcome)
        scale, flat = Scale(*base.flat(self.spec.durations)), features.flatten(0, -2)
        log_prob = self.decoder.log_prob(flat, change, categories, scale, absolute)
        log_prob = log_prob.unflatten(1, features.shape[:-1])
        if not self.spec.durations:
            return log_prob.sum(-1), None
        return log_prob[..., :-1].sum(-1), log_prob[..., -1]

    def draw(
        self, features: Features, transition: Transition, base: BaseOut, keys: Tensor
    ) -> Outcome:
        assert features is not None
        n, now = self.spec.observation.numbers, transition.observation.numbers
        absolute = F.pad(now, (0, 1)) if self.spec.durations else now
        scale = Scale(*base.flat(self.spec.durations))
        change, categories = self.decoder.draw(features, scale, keys, absolute)
        duration = change[..., n] if self.spec.durations else change.new_zeros(keys.shape)
        return Outcome(Parts(now + change[..., :n], categories), duration)

    def disagreement(
        self, features: Features, transition: Transition, outcome: Outcome, base: BaseOut
    ) -> Tensor:
        assert features is not None
        change, absolute, categories = self._decoder_inputs(transition, outcome)
        scale, flat = Scale(*base.flat(self.spec.durations)), features.flatten(0, -2)
        means, probabilities = self.decoder.expected(flat, change, categories, scale, absolute)
        n = self.spec.observation.numbers
        return spread(means[..., :n], probabilities).view(features.shape[:-1])


class TableSequence(StepBackbone, Ensemble):
    """A backbone, and the ensemble's networks over a table's slots, which read its features. Slots
    are independent given the history.
    """

    embed: Any

    def __init__(self, spec: Spec, config: ModelConfig):
        d = dims(config.size).d_model
        Ensemble.__init__(self, spec, config, features=d)
        self._new_backbone(TableEmbedding(spec, config), config)

    def expected(self, features: Features, transition: Transition, base: BaseOut) -> Outcome:
        raise NotImplementedError


class TableEmbedding(nn.Module):
    """A step with a table as one token [..., d]."""

    def __init__(self, spec: Spec, config: ModelConfig):
        super().__init__()
        stack = dims(config.size).backbone
        parts = spec.observation, spec.action, spec.task
        self.mixer = TableMixer(*parts, hidden=stack.d, width=stack.width)

    def forward(self, x: Inputs) -> Tensor:
        rest, _, common = self.mixer(x)
        return rest + common


def _score_mask(seen: Tensor, like: Tensor) -> Tensor:
    """0 where `seen`, minus infinity elsewhere, in the dtype of `like`."""
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
