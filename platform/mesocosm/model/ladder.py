"""The ladder of model sizes, 10k to 7B, and the multipliers that let its rungs share settings.

A rung is named after N: the hidden matrices and the vectors (norm gains, biases) of the backbone
and of one decoder, without embeddings and output layers, which depend on the spaces.

Width and depth follow CompleteP (Dey et al. 2025, arXiv 2505.01618: width muP, depth with
alpha = 1). A network keeps to three rules, on which `mup.init_` and `mup.param_groups` rely:

- Every trainable parameter is tagged once with `mup.tag`. `width` is `Stack.width` of the stack
  that the parameter reads, `depth` is `Stack.depth` inside residual blocks and 1 outside.
- A block is added as `x + block(norm(x)) / stack.depth`.
- The result of an output layer, before its bias, is divided by `stack.width`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesocosm.errors import UsageError, nearest

HEAD = 32
"""Head size of the backbone at every rung, so that an attention score always sums as many terms."""
DEC_HEAD = 16
"""Head size of the decoder: 16 keeps the decoder of the smallest rungs in proportion."""
BASE_WIDTH, BASE_LAYERS = 64, 2
BASE_DEC_WIDTH, BASE_DEC_LAYERS = 32, 1
BASE_HIDDEN = 128
"""Base width of the ensemble's MLPs and of other plain MLPs."""


@dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks of width `d`, with its factors relative to the base size."""

    d: int
    layers: int
    d_ff: int
    head: int
    width: float  # CompleteP's m_N
    depth: float  # CompleteP's m_L

    @property
    def heads(self) -> int:
        return self.d // self.head

    @property
    def params(self) -> int:
        """Hidden matrices and norm gains."""
        return self.layers * (4 * self.d**2 + 3 * self.d * self.d_ff + 2 * self.d) + self.d


@dataclass(frozen=True)
class Dims:
    """A rung of the sequence family."""

    d_model: int
    layers: int
    d_ff: int
    d_dec: int
    dec_layers: int
    d_ff_dec: int

    @property
    def backbone(self) -> Stack:
        width, depth = self.d_model / BASE_WIDTH, self.layers / BASE_LAYERS
        return Stack(self.d_model, self.layers, self.d_ff, HEAD, width, depth)

    @property
    def decoder(self) -> Stack:
        width, depth = self.d_dec / BASE_DEC_WIDTH, self.dec_layers / BASE_DEC_LAYERS
        return Stack(self.d_dec, self.dec_layers, self.d_ff_dec, DEC_HEAD, width, depth)

    @property
    def params(self) -> int:
        """N; a network's exact number is `counts.ParamCounts.n`."""
        return self.backbone.params + self.d_model * self.d_dec + self.decoder.params


@dataclass(frozen=True)
class EnsembleDims:
    """A rung of the ensemble family: `layers` hidden layers of `hidden` units."""

    hidden: int
    layers: int

    @property
    def width(self) -> float:
        return self.hidden / BASE_HIDDEN

    @property
    def params(self) -> int:
        """N: the hidden matrices and vectors of one member."""
        return (self.layers - 1) * (self.hidden**2 + self.hidden)


@dataclass(frozen=True)
class LanguageDims:
    """A rung of the language family: a Llama-type network with grouped-query attention."""

    d_model: int
    layers: int
    d_ff: int
    key_heads: int

    @property
    def heads(self) -> int:
        """Query heads; each of `key_heads` serves heads / key_heads of them."""
        return self.d_model // HEAD

    @property
    def width(self) -> float:
        """CompleteP's m_N."""
        return self.d_model / BASE_WIDTH

    @property
    def depth(self) -> float:
        """CompleteP's m_L."""
        return self.layers / BASE_LAYERS

    @property
    def params(self) -> int:
        """N: hidden matrices and norm gains, without the token embedding, adapters and heads."""
        d, keys = self.d_model, self.key_heads * HEAD
        block = 2 * d * d + 2 * d * keys + 3 * d * self.d_ff + 2 * d
        return self.layers * block + d


RUNGS: dict[str, Dims] = {
    "10k": Dims(32, 1, 32, 16, 1, 32),
    "30k": Dims(32, 2, 64, 32, 1, 32),
    "100k": Dims(64, 2, 128, 32, 1, 64),
    "300k": Dims(96, 3, 192, 48, 1, 96),
    "1m": Dims(128, 6, 256, 64, 1, 128),
    "3m": Dims(224, 6, 448, 112, 1, 224),
    "10m": Dims(384, 6, 768, 192, 2, 384),
    "30m": Dims(512, 11, 1024, 256, 2, 512),
    "100m": Dims(768, 16, 1536, 384, 3, 768),
    "300m": Dims(1152, 22, 2304, 576, 3, 1152),
    "1b": Dims(1792, 30, 3584, 896, 4, 1792),
    "3b": Dims(2560, 44, 5120, 1280, 5, 2560),
    "7b": Dims(3584, 53, 7168, 1792, 6, 3584),
}

ENSEMBLE_RUNGS: dict[str, EnsembleDims] = {
    "10k": EnsembleDims(72, 3),
    "30k": EnsembleDims(120, 3),
    "100k": EnsembleDims(224, 3),
    "300k": EnsembleDims(384, 3),
    "1m": EnsembleDims(576, 4),
    "3m": EnsembleDims(1000, 4),
    "10m": EnsembleDims(1584, 5),
    "30m": EnsembleDims(2736, 5),
    "100m": EnsembleDims(5000, 5),
    "300m": EnsembleDims(7744, 6),
    "1b": EnsembleDims(14144, 6),
    "3b": EnsembleDims(22360, 7),
    "7b": EnsembleDims(34160, 7),
}

LANGUAGE_RUNGS: dict[str, LanguageDims] = {
    "10k": LanguageDims(32, 1, 64, 1),
    "30k": LanguageDims(32, 3, 64, 1),
    "100k": LanguageDims(64, 2, 192, 1),
    "300k": LanguageDims(96, 3, 256, 1),
    "1m": LanguageDims(160, 4, 384, 1),
    "3m": LanguageDims(256, 5, 576, 2),
    "10m": LanguageDims(384, 6, 1152, 2),
    "30m": LanguageDims(576, 8, 1728, 2),
    "100m": LanguageDims(768, 15, 2304, 4),
    "300m": LanguageDims(1152, 22, 3072, 4),
    "1b": LanguageDims(1792, 30, 4864, 8),
    "3b": LanguageDims(2560, 44, 6912, 8),
    "7b": LanguageDims(3584, 53, 9728, 8),
}

LADDERS: dict[str, Mapping[str, Dims | EnsembleDims | LanguageDims]] = {
    "sequence": RUNGS,
    "ensemble": ENSEMBLE_RUNGS,
    "language": LANGUAGE_RUNGS,
}
"""The rungs of every family, by its name; `families.NETWORKS` has the networks."""


def dims(size: str) -> Dims:
    """A rung of the sequence family. Raises UsageError for an unknown size."""
    return RUNGS[_checked(size)]


def ensemble_dims(size: str) -> EnsembleDims:
    """A rung of the ensemble family. Raises UsageError for an unknown size."""
    return ENSEMBLE_RUNGS[_checked(size)]


def language_dims(size: str) -> LanguageDims:
    """A rung of the language family. Raises UsageError for an unknown size."""
    return LANGUAGE_RUNGS[_checked(size)]


def nominal(size: str, key: str = "model.size") -> int:
    """The number in a rung's name: 30k is 30000. Raises UsageError, which names `key`."""
    rung = _checked(size, key)
    return int(rung[:-1]) * {"k": 10**3, "m": 10**6, "b": 10**9}[rung[-1]]


def _checked(size: str, key: str = "model.size") -> str:
    if size not in RUNGS:
        sizes = ", ".join(RUNGS)
        raise UsageError(f"{key} must be one of {sizes}, got {size!r}{nearest(size, RUNGS)}")
    return size
