"""What a user says of the model: its family, its rung of the ladder and its members."""

from __future__ import annotations

from dataclasses import dataclass

from mesocosm.errors import UsageError, nearest
from mesocosm.model.ladder import dims

FAMILIES = ("sequence", "ensemble")


@dataclass
class ModelConfig:
    family: str = "sequence"
    """`sequence`: a transformer over steps, with history; `ensemble`: probabilistic MLPs on (o, a),
    as PETS.
    """
    size: str = "30k"
    """A rung of `ladder.RUNGS`."""
    members: int = 4
    """K: decoders (sequence) or MLPs (ensemble), each with its own base and its own mask of
    episodes.
    """
    base: bool = True
    """Predict the residual over a ridge + MLP base rather than the change itself."""
    base_hidden: int = 128
    base_steps: int = 1500
    context: int = 16
    """W: steps of history in a window (sequence)."""
    components: int = 3
    """Logistics in the mixture density of a number (sequence)."""

    def validate(self) -> None:
        """Raises UsageError naming the key, its value and the fix."""
        if self.family not in FAMILIES:
            raise UsageError(
                f"model.family={self.family!r} is unknown, use one of"
                f" {', '.join(FAMILIES)}{nearest(self.family, FAMILIES)}"
            )
        dims(self.size)
        for key in ("members", "base_hidden", "context", "components"):
            if getattr(self, key) < 1:
                raise UsageError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.base_steps < 0:
            raise UsageError(
                f"model.base_steps={self.base_steps} must be at least 0 (0 leaves the ridge alone)"
            )
