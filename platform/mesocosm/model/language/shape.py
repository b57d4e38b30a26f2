"""The shape of a Llama-type network: a rung of our ladder, or that of a pretrained checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mesocosm.errors import UsageError
from mesocosm.model.ladder import HEAD, language_dims

ROPE_THETA = 10000.0
NORM_EPS = 1e-5
EMBEDDING_STD = 1 / 32
"""Initial standard deviation of the token embedding, which is the output layer too. At 1 / 8 a new
network would predict that each token repeats.
"""


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of a network. The multipliers are those of Hugging Face's Granite: 1 in a
    plain Llama, muP's in a network of our ladder.
    """

    vocabulary: int
    d_model: int
    layers: int
    heads: int
    key_heads: int  # grouped-query attention: heads is a multiple of it
    head: int
    d_ff: int
    rope_theta: float = ROPE_THETA
    norm_eps: float = NORM_EPS
    tied: bool = True  # the output layer is the embedding, transposed
    biases: bool = False  # of the query, key and value projections (Qwen2)
    head_norms: bool = False  # RMSNorm of each query and key head (Qwen3)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    width: float = 1.0  # CompleteP's m_N
    depth: float = 1.0  # CompleteP's m_L
    source: str = ""
    """Hugging Face's `model_type` of the checkpoint; empty for a network of our ladder."""

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise UsageError(
                f"heads must be a multiple of key_heads={self.key_heads}, got {self.heads}"
            )

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def qkv(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.heads + 2 * self.key_heads) * self.head

    @property
    def params(self) -> int:
        """N: matrices, biases and norm gains of the blocks, without embedding and output layer."""
        d = self.d_model
        block = self.qkv * d + self.heads * self.head * d + 3 * d * self.d_ff + 2 * d
        block += self.qkv * self.biases + 2 * self.head * self.head_norms
        return self.layers * block + d

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and, unless it is tied, of the output layer."""
        return self.vocabulary * self.d_model * (1 if self.tied else 2)

    def to_json(self) -> dict[str, Any]:
        """The fields, for `Shape(**fields)`."""
        return asdict(self)


def rung_shape(size: str, vocabulary: int) -> Shape:
    """The network of a rung of `ladder.LANGUAGE_RUNGS`, with muP's multipliers.

    Args:
        size: The rung, 10k to 7b.
        vocabulary: The number of tokens.

    Raises:
        UsageError: The size is unknown.
    """
    rung = language_dims(size)
    return Shape(
        vocabulary=vocabulary,
        d_model=rung.d_model,
        layers=rung.layers,
        heads=rung.heads,
        key_heads=rung.key_heads,
        head=HEAD,
        d_ff=rung.d_ff,
        embedding_multiplier=1.0 / EMBEDDING_STD,
        residual_multiplier=1.0 / rung.depth,
        logits_divisor=rung.width,
        width=rung.width,
        depth=rung.depth,
    )
