"""The model's part of a config: family, size, members."""

from __future__ import annotations

from dataclasses import dataclass

from mesocosm.errors import UsageError, nearest
from mesocosm.model.ladder import LADDERS, dims

FAMILIES = tuple(LADDERS)


@dataclass
class ModelConfig:
    family: str = "sequence"
    """`sequence`: a transformer over steps, with history. `ensemble`: probabilistic MLPs on (o, a),
    as PETS.
    """
    size: str = "30k"
    """Parameters of the backbone and of one decoder: a rung of `model/ladder.py`, 10k to 7b."""
    members: int = 4
    """K: the number of decoders (sequence) or MLPs (ensemble). Each member has a base of its own
    and trains on its own subset of the episodes.
    """
    base: bool = True
    """Predict the residual over a ridge + MLP base instead of the change itself."""
    base_hidden: int = 128
    """Hidden units of the base's MLP."""
    base_steps: int = 5000
    """The most training steps of the base's MLP. Episodes that a member leaves out stop it earlier;
    0 keeps the ridge alone.
    """
    head_steps: int = 5000
    """The most training steps of the reward and of the termination network, before those of the
    dynamics. Episodes that a member leaves out stop each earlier.
    """
    context: int = 16
    """W: steps of history in a window (sequence)."""
    components: int = 3
    """Logistics in the mixture density of a number (sequence)."""

    def validate(self) -> None:
        """Raise UsageError that names the key, its value and the fix."""
        if self.family not in FAMILIES:
            hint = f"got {self.family!r}{nearest(self.family, FAMILIES)}"
            raise UsageError(f"model.family must be one of {', '.join(FAMILIES)}, {hint}")
        dims(self.size)
        least = dict(members=1, base_hidden=1, base_steps=0, head_steps=1, context=1, components=1)
        for key, low in least.items():
            if getattr(self, key) < low:
                raise UsageError(f"model.{key} must be >= {low}, got {getattr(self, key)}")
