"""One ladder of sizes from 10k to 7B, and the multipliers by which its rungs share hyperparameters.

N, a rung's name, counts the hidden matrices and the vectors (norm gains, biases) of the backbone
and *one* decoder; what the environment's spaces decide (embeddings and output layers) is counted
beside it, see `counts`. With SwiGLU blocks, N = layers (4 d^2 + 3 d d_ff) + d d_dec + dec_layers (4
d_dec^2 + 3 d_dec d_ff_dec), and the norms.

Width and depth follow CompleteP (Dey et al. 2025, arXiv 2505.01618: width muP, depth with alpha =
1), relative to a base of BASE_WIDTH and BASE_LAYERS. What a network must do, for `mup.param_groups`
and `mup.init_` to hold:

- tag every trainable parameter once with `mup.tag(parameter, kind, width=..., depth=...)`: kind
  "hidden" (both sides grow with the width), "embedding" (input side fixed: number projections,
  category tables, slot and position vectors), "output" (output side fixed: mixture parameters,
  logits) or "vector" (norm gains, biases); width is `dims.width` for a fan-in of d_model or d_ff,
  `dims.dec_width` for one of d_dec or d_ff_dec; depth is `dims.depth` or `dims.dec_depth` inside
  residual blocks, 1 outside;
- add each block as `x + dims.residual_multiplier * block(norm(x))` (`dims.dec_residual_multiplier`
  in the decoder);
- multiply what an output layer gives (before its bias) by `dims.output_multiplier` if it reads
  d_model, `dims.dec_output_multiplier` if d_dec.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesocosm.errors import UsageError, nearest

HEAD = 32
"""Size of a backbone's attention head, at every rung: what an attention score sums over does not
grow.
"""
DEC_HEAD = 16
"""Size of a decoder's head: 16 lets the smallest rungs keep a decoder in proportion."""
BASE_WIDTH = 64
BASE_LAYERS = 2
BASE_DEC_WIDTH = 32
BASE_DEC_LAYERS = 1
BASE_HIDDEN = 128
"""Base width of the ensemble's MLPs and of other plain MLPs."""


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
    def heads(self) -> int:
        return self.d_model // HEAD

    @property
    def dec_heads(self) -> int:
        return self.d_dec // DEC_HEAD

    @property
    def width(self) -> float:
        """CompleteP's m_N of the backbone."""
        return self.d_model / BASE_WIDTH

    @property
    def dec_width(self) -> float:
        return self.d_dec / BASE_DEC_WIDTH

    @property
    def depth(self) -> float:
        """CompleteP's m_L of the backbone."""
        return self.layers / BASE_LAYERS

    @property
    def dec_depth(self) -> float:
        return self.dec_layers / BASE_DEC_LAYERS

    @property
    def residual_multiplier(self) -> float:
        """m_L^-1: x + residual_multiplier * block(norm(x))."""
        return 1.0 / self.depth

    @property
    def dec_residual_multiplier(self) -> float:
        return 1.0 / self.dec_depth

    @property
    def output_multiplier(self) -> float:
        """m_N^-1, on what an output layer computes from d_model."""
        return 1.0 / self.width

    @property
    def dec_output_multiplier(self) -> float:
        return 1.0 / self.dec_width

    @property
    def params(self) -> int:
        """N as the ladder states it; `counts` counts a network's own."""
        backbone = (
            self.layers * (4 * self.d_model**2 + 3 * self.d_model * self.d_ff + 2 * self.d_model)
            + self.d_model
        )
        decoder = (
            self.dec_layers * (4 * self.d_dec**2 + 3 * self.d_dec * self.d_ff_dec + 2 * self.d_dec)
            + self.d_dec
        )
        return backbone + self.d_model * self.d_dec + decoder


@dataclass(frozen=True)
class EnsembleDims:
    """A rung of the ensemble family: `layers` hidden layers of `hidden` units; N is one member's
    hidden matrices and vectors.
    """

    hidden: int
    layers: int

    @property
    def width(self) -> float:
        return self.hidden / BASE_HIDDEN

    @property
    def output_multiplier(self) -> float:
        return 1.0 / self.width

    @property
    def params(self) -> int:
        return (self.layers - 1) * (self.hidden**2 + self.hidden)


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


def dims(size: str) -> Dims:
    """The rung `size` of the sequence family. Raises UsageError with the nearest rung."""
    return RUNGS[_rung(size)]


def ensemble_dims(size: str) -> EnsembleDims:
    """The rung `size` of the ensemble family. Raises UsageError with the nearest rung."""
    return ENSEMBLE_RUNGS[_rung(size)]


def nominal(size: str, key: str = "model.size") -> int:
    """The number a rung's name states: 30k is 30000. Raises UsageError with the config's `key` and
    the nearest rung.
    """
    rung = _rung(size, key)
    return int(rung[:-1]) * {"k": 10**3, "m": 10**6, "b": 10**9}[rung[-1]]


def _rung(size: str, key: str = "model.size") -> str:
    if size not in RUNGS:
        raise UsageError(
            f"{key}={size!r} is no rung of the ladder, use one of"
            f" {', '.join(RUNGS)}{nearest(size, RUNGS)}"
        )
    return size
