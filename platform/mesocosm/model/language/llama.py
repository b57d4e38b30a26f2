"""The network: RMSNorm, RoPE, SwiGLU, grouped-query attention, as in Llama (Touvron et al. 2023,
arXiv 2302.13971), with Granite's multipliers for muP and optional LoRA members.

`hidden` reads whole rows, for training. `feed` appends ragged chunks to a `KeyCache`: prefill,
decoding and replay are the same call. What `feed` computes for a token depends on the row's tokens
and on nothing else: neither on the other rows nor on how the tokens were cut into chunks, bit for
bit. So a cache that is rebuilt in one chunk equals one that was decoded token by token. Three
things bring this about:

- Matrix products run over the real tokens of the chunk, with rows of zeros up to a multiple of
  TILE. MKL's kernels for fewer rows add in another order than those for many.
- Attention runs over whole blocks of BLOCK columns, added in turn, with at least LEAST queries.
- Softmax is the exponential, whose maximum does not depend on an order, and sums by block.

`tests/model/language/test_feed.py` tests it on the machine at hand. CUDA chooses its kernels by
shape and makes no such promise.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mesocosm.errors import UsageError
from mesocosm.model.language.adapter import Adapter, Selection
from mesocosm.model.language.cache import KeyCache, Places
from mesocosm.model.language.shape import EMBEDDING_STD, Shape
from mesocosm.model.layers import Constant, Linear
from mesocosm.model.mup import tag

TILE = 16
LEAST = 4
CHUNK = 32
"""Tokens of a row that one pass of `feed` reads: bounds the memory of the scores."""
Mask = Tensor | list[int] | None
"""The tokens that attention reads, see `LlamaBlock.forward`."""
Rotation = tuple[Tensor, Tensor]
"""(cos, sin) [..., 1, head] of the tokens' positions"""


class TokenNorm(nn.Module):
    """RMSNorm over the last dimension, in float32, with epsilon inside the root as in Llama."""

    def __init__(self, size: int, eps: float, *, width: float, depth: float):
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = tag(nn.Parameter(torch.ones(size)), "vector", width=width, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(x.float(), (self.size,), eps=self.eps)
        return wide.to(x.dtype) * self.weight


class LlamaBlock(nn.Module):
    """Attention and SwiGLU, each added to its input."""

    dropout: float = 0.0  # of the outputs that are added to the input, in training

    def __init__(self, shape: Shape, members: int, rank: int):
        super().__init__()
        self.shape = shape
        d, attended, ff = shape.d_model, shape.heads * shape.head, shape.d_ff

        def norm(size: int) -> TokenNorm:
            return TokenNorm(size, shape.norm_eps, width=shape.width, depth=shape.depth)

        def linear(inputs: int, outputs: int, multiplier: float = 1.0) -> Linear:
            width, depth = shape.width, shape.depth
            return Linear(
                inputs, outputs, "hidden", width=width, depth=depth, multiplier=multiplier
            )

        def adapter(inputs: int, outputs: int) -> Adapter | None:
            return Adapter(inputs, outputs, members, rank, shape.width) if rank else None

        self.norm_1 = norm(d)
        self.qkv = linear(d, shape.qkv)
        self.bias = None
        if shape.biases:
            self.bias = tag(nn.Parameter(torch.zeros(shape.qkv)), "vector", depth=shape.depth)
        self.norm_q = norm(shape.head) if shape.head_norms else None
        self.norm_k = norm(shape.head) if shape.head_norms else None
        self.out = linear(attended, d, shape.residual_multiplier)
        self.norm_2 = norm(d)
        self.up = linear(d, 2 * ff)  # the gate and the values
        self.down = linear(ff, d, shape.residual_multiplier)
        self.qkv_adapter, self.out_adapter = adapter(d, shape.qkv), adapter(attended, d)
        self.up_adapter, self.down_adapter = adapter(d, 2 * ff), adapter(ff, d)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, by: Selection) -> Tensor:
        """Rows [B, T, d] -> the same. `mask` [B, 1, T, T] bool; a list: of the lengths of segments
        through all rows, negative for padding; None: causal.
        """
        parts = self.project(x, rotation, by)
        if isinstance(mask, list):
            return self.finish(x, self._by_segment(parts, mask).reshape(*x.shape[:2], -1), by)
        q, k, v = (part.transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.shape.groups > 1
        )
        return self.finish(x, attended.transpose(1, 2).flatten(2), by)

    def _by_segment(self, parts: tuple[Tensor, ...], lengths: list[int]) -> Tensor:
        """Attention within each segment, [B * T, heads, head]: on a CPU the kernels for a mask take
        three times as long, for tokens that see nothing of each other.
        """
        sizes = [abs(length) for length in lengths]
        split = (part.flatten(0, 1).transpose(0, 1).split(sizes, 1) for part in parts)
        attended = [
            torch.zeros_like(q)
            if length < 0
            else F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=self.shape.groups > 1
            )[0]
            for length, q, k, v in zip(lengths, *split, strict=True)
        ]
        return torch.cat(attended, 1).transpose(0, 1)

    def project(self, x: Tensor, rotation: Rotation, by: Selection) -> tuple[Tensor, ...]:
        """Rotated queries [..., heads, head] and keys, and values [..., key_heads, head]."""
        shape = self.shape
        joint = _adapted(self.qkv, self.qkv_adapter, self.norm_1(x), by)
        if self.bias is not None:
            joint = joint + self.bias
        joint = joint.unflatten(-1, (-1, shape.head))
        q, k, v = joint.split((shape.heads, shape.key_heads, shape.key_heads), -2)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return rotate(q, rotation), rotate(k, rotation), v

    def finish(self, x: Tensor, attended: Tensor, by: Selection) -> Tensor:
        """Add the attention's result [..., heads * head], then the SwiGLU."""
        x = x + self._dropped(_adapted(self.out, self.out_adapter, attended, by))
        joint = _adapted(self.up, self.up_adapter, self.norm_2(x), by)
        gate, up = joint.chunk(2, -1)
        return x + self._dropped(_adapted(self.down, self.down_adapter, F.silu(gate) * up, by))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class Llama(nn.Module):
    """A causal language model with the four calls of a backbone: `hidden`, `logits`, `new_cache`
    and `feed`.
    """

    checkpoint_activations: bool = False  # recompute the blocks in the backward pass

    def __init__(self, shape: Shape, *, members: int = 1, rank: int = 0):
        """Zeros until `mup.init_` or a checkpoint fills them.

        Args:
            shape: The sizes.
            members: K, the number of adapters; each row is read by one of them.
            rank: The rank of the LoRA adapters; 0 for none.
        """
        super().__init__()
        self.shape, self.members, self.rank = shape, members, rank
        table = nn.Parameter(torch.zeros(shape.vocabulary, shape.d_model))
        self.embed = tag(table, "embedding", fan_in=1, gain=EMBEDDING_STD)
        self.blocks = nn.ModuleList(LlamaBlock(shape, members, rank) for _ in range(shape.layers))
        self.norm = TokenNorm(shape.d_model, shape.norm_eps, width=shape.width, depth=1.0)
        self.output = None
        if not shape.tied:
            table = nn.Parameter(torch.zeros(shape.vocabulary, shape.d_model))
            self.output = tag(table, "output", width=shape.width)
        rate = shape.rope_theta ** (torch.arange(0, shape.head, 2, dtype=torch.int64) / shape.head)
        self._frequency = Constant(1.0 / rate)
        self._table: Rotation | None = None

    @property
    def device(self) -> torch.device:
        return self.embed.device

    # Training.

    def drop(self, rate: float) -> None:
        """Zero this share of what each block adds to its input, in training mode (Srivastava et al.
        2014), by torch's global generator.
        """
        for block in cast(list[LlamaBlock], list(self.blocks)):
            block.dropout = rate

    def hidden(
        self,
        ids: Tensor,
        position: Tensor,
        segment: Tensor | None = None,
        member: Tensor | None = None,
    ) -> Tensor:
        """The states that predict each next token.

        Args:
            ids: [B, T] int64.
            position: [B, T] int64, counted from the start of the token's episode.
            segment: [B, T] int64: tokens see the earlier tokens of their own segment. None: a row
                is one segment (padding behind it does no harm).
            member: [B, T] int64, the adapter that reads each token. None: the first.

        Returns:
            [B, T, d] in the dtype of the weights.
        """
        by = self._selection(member, ids)
        x = self._embedded(ids)
        angle = position.unsqueeze(-1).float() * self._frequency(x)
        rotation = _rotation(angle)
        mask: Mask = None
        if segment is not None:
            mask = _lengths(segment) if segment.device.type == "cpu" else segment_mask(segment)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            arguments = (x, rotation, mask, by)
            if recompute:
                x = cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
            else:
                x = block(*arguments)
        return cast(Tensor, self.norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., vocabulary]."""
        table = self.embed if self.output is None else self.output
        flat = hidden.flatten(0, -2)
        logits = F.linear(padded(flat), table)[: len(flat)].unflatten(0, hidden.shape[:-1])
        return logits if self.shape.logits_divisor == 1.0 else logits / self.shape.logits_divisor

    # Cached reading.

    @property
    def token_bytes(self) -> int:
        """The bytes of a token's keys and values, in float32."""
        return 2 * 4 * self.shape.layers * self.shape.key_heads * self.shape.head

    def new_cache(self, batch: int, window: int) -> KeyCache:
        """An empty cache of `batch` rows of at most `window` tokens."""
        return KeyCache(self.shape, batch, window, self.embed)

    @torch.inference_mode()
    def feed(
        self, cache: KeyCache, ids: Tensor, count: Tensor, member: Tensor | None = None
    ) -> Tensor:
        """Append tokens to the rows of `cache`.

        Args:
            cache: Of `new_cache`; it is changed in place.
            ids: [B, C] int64, of which the first count[i] of row i are appended.
            count: [B] int64; rows of 0 cost nothing.
            member: [B] int64, the adapter of each row. None: the first.

        Returns:
            [B, C, d]: the state after each token; zeros behind a row's last.

        Raises:
            UsageError: A row does not fit in the window.
        """
        longest = int((cache.length + count).max())
        if longest > cache.window:
            raise UsageError(f"model.context must be >= {longest} tokens, got {cache.window}")
        if member is None:
            member = torch.zeros_like(count)
        result = self.embed.new_zeros(*ids.shape, self.shape.d_model)
        for start in range(0, int(count.max()), CHUNK):
            piece = ids[:, start : start + CHUNK]
            places = cache.places((count - start).clamp(0, piece.shape[1]))
            by = self._selection(member[places.row], ids)
            states = self._feed(cache, piece[places.row, places.column], places, by)
            result[places.row, start + places.column] = states
        return result

    def _feed(self, cache: KeyCache, ids: Tensor, places: Places, by: Selection) -> Tensor:
        shape, tokens = self.shape, len(ids)
        active, columns, _ = places.bias.shape
        lead = (active, columns, shape.key_heads, shape.groups, shape.head)
        queries = active * shape.key_heads, shape.groups * columns
        x = padded(self._embedded(ids))
        if by is not None:
            by = padded(by)
        cos, sin = self._rotations(cache.window)
        rotation = padded(cos[places.position]), padded(sin[places.position])
        for layer, block in enumerate(cast(list[LlamaBlock], list(self.blocks))):
            q, k, v = block.project(x, rotation, by)
            cache.write(layer, places, k[:tokens], v[:tokens])
            if columns == 1:
                grid = q[:tokens].view(*queries, shape.head)
            else:
                grid = q.new_zeros(active, columns, shape.heads, shape.head)
                grid[places.slot, places.column] = q[:tokens]
                grid = grid.view(lead).permute(0, 2, 3, 1, 4).reshape(*queries, shape.head)
            grid = F.pad(grid, (0, 0, 0, max(0, LEAST - queries[1])))
            mixed = cache.attend(layer, grid * shape.head**-0.5, places)[:, : queries[1]]
            if columns == 1:
                attended = mixed.reshape(tokens, -1)
            else:
                mixed = mixed.view(lead[0], lead[2], lead[3], columns, lead[4])
                mixed = mixed.permute(0, 3, 1, 2, 4)
                attended = mixed[places.slot, places.column].flatten(1)
            x = block.finish(x, padded(attended), by)
        states: Tensor = self.norm(x)
        cache.advance(places)
        return states[:tokens]

    def _embedded(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        multiplier = self.shape.embedding_multiplier
        return x if multiplier == 1.0 else x * multiplier

    def _rotations(self, window: int) -> Rotation:
        """(cos, sin) [window, 1, head], computed once for the device and the longest window."""
        table = self._table
        if table is None or len(table[0]) < window or table[0].device != self.device:
            positions = torch.arange(window, device=self.device).unsqueeze(-1)
            table = _rotation(positions.float() * self._frequency(self.embed))
            self._table = table
        return table

    def _selection(self, member: Tensor | None, ids: Tensor) -> Selection:
        """[..., K * rank]: 1 for the columns of each token's adapter; None without adapters or with
        one.
        """
        if not self.rank or self.members == 1:
            return None
        chosen = F.one_hot(torch.zeros_like(ids) if member is None else member, self.members)
        return chosen.repeat_interleave(self.rank, -1).to(self.embed.dtype)


def _lengths(segment: Tensor) -> list[int]:
    """The length of each segment of [B, T] int64, row after row, negative for padding."""
    changes = F.pad(segment[:, 1:] != segment[:, :-1], (1, 0), value=True)
    first = changes.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([segment.numel()]))
    return torch.where(segment.flatten()[first] < 0, -lengths, lengths).tolist()


def segment_mask(segment: Tensor) -> Tensor:
    """[B, T] int64 -> [B, 1, T, T] bool: earlier tokens of the same segment, and the token."""
    same = segment.unsqueeze(-1) == segment.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def padded(x: Tensor) -> Tensor:
    """Add rows of zeros up to a multiple of TILE."""
    missing = -len(x) % TILE
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of [..., heads, head]."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def _rotation(angle: Tensor) -> Rotation:
    angle = torch.cat((angle, angle), -1).unsqueeze(-2)
    return angle.cos(), angle.sin()


def _adapted(linear: Linear, adapter: Adapter | None, x: Tensor, by: Selection) -> Tensor:
    y: Tensor = linear(x)
    if adapter is None:
        return y
    return y + linear.multiplier * cast(Tensor, adapter(x, by))
