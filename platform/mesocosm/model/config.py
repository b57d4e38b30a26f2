"""The model's part of a config: family, size, members."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from mesocosm.errors import UsageError, nearest
from mesocosm.model.ladder import LADDERS, dims

FAMILIES = tuple(LADDERS)
SEQUENCE = "sequence"
"""The family with history and a decoder inside the step."""
LANGUAGE = "language"
"""The family that reads and writes texts."""
LEAST_VOCABULARY = 259
"""All bytes, and the three marks of a stream."""
ADDED: Any = {"added": True}
"""Metadata of a key that ids do not contain at its default, because worlds are older than it."""

OF_IMAGES: Any = {"added": True, "images": True}
"""The same of a key that only worlds of images read."""


@dataclass
class AdapterConfig:
    rank: int = 0
    """Rank of the LoRA adapters, one for each member (language). With `model.pretrained` they are
    trained alone; 0 trains all weights.
    """


@dataclass
class ModelConfig:
    family: str = "sequence"
    """`sequence`: a transformer over steps, with history. `ensemble`: probabilistic MLPs on (o, a),
    as PETS. `language`: a causal language model over texts.
    """
    size: str = "30k"
    """Parameters of the backbone and of one decoder: a rung of `model/ladder.py`, 10k to 7b. Not
    used with `pretrained`.
    """
    members: int = 4
    """K: the number of decoders (sequence), MLPs (ensemble) or adapters (language). Each member has
    a base of its own and trains on its own subset of the episodes.
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
    """W: steps of history in a window (sequence), or tokens (language)."""
    group: int = field(default=1, metadata=OF_IMAGES)
    """Positions of a frame whose codes are drawn at once, independent of each other given those
    before (sequence). More take fewer passes and are less exact; 1 draws one code after another.
    """
    components: int = 3
    """Logistics in the mixture density of a number (sequence)."""
    vocabulary: int = field(default=1024, metadata=ADDED)
    """The most tokens of the tokenizer, which is trained on the training split (language)."""
    pretrained: str | None = field(default=None, metadata=ADDED)
    """A checkpoint to begin with, and its tokenizer (language): a folder of Hugging Face's format,
    a GGUF file or a hub id.
    """
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata=ADDED)

    def validate(self) -> None:
        """Raise UsageError that names the key, its value and the fix."""
        if self.family not in FAMILIES:
            hint = f"got {self.family!r}{nearest(self.family, FAMILIES)}"
            raise UsageError(f"model.family must be one of {', '.join(FAMILIES)}, {hint}")
        dims(self.size)
        least = dict(
            members=1, base_hidden=1, base_steps=0, head_steps=1, context=1, components=1, group=1
        )
        for key, low in least.items():
            if getattr(self, key) < low:
                raise UsageError(f"model.{key} must be >= {low}, got {getattr(self, key)}")
        if self.adapter.rank < 0:
            raise UsageError(f"model.adapter.rank must be >= 0, got {self.adapter.rank}")
        if self.family != LANGUAGE:
            for key in self.added():
                raise UsageError(
                    f"model.{key} must be left out with model.family={self.family}, got"
                    f" {getattr(self, key)}; it is read by model.family={LANGUAGE}"
                )
        elif self.vocabulary < LEAST_VOCABULARY:
            raise UsageError(
                f"model.vocabulary must be >= {LEAST_VOCABULARY} (256 bytes and 3 marks), got"
                f" {self.vocabulary}"
            )
        elif self.members > 1 and not self.adapter.rank:
            raise UsageError(
                f"model.adapter.rank must be >= 1 with model.members={self.members}, because the"
                " members of a language model are its adapters, got 0; or give model.members=1"
            )

    def added(self) -> list[str]:
        """The keys of ADDED that are not at their defaults."""
        return [field.name for field in self._changed() if field.metadata == ADDED]

    def _changed(self) -> list[Field[Any]]:
        """The keys that worlds may be older than and that are not at their defaults."""
        default = ModelConfig()
        added = (field for field in fields(self) if field.metadata.get("added"))
        return [f for f in added if getattr(self, f.name) != getattr(default, f.name)]

    def to_json(self) -> dict[str, Any]:
        """The keys, without those that worlds may be older than and that are at their defaults."""
        changed = {field.name for field in self._changed()}
        absent = {field.name for field in fields(self) if field.metadata.get("added")} - changed
        return {k: v for k, v in asdict(self).items() if k not in absent}

    @staticmethod
    def from_json(values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`. Raises TypeError on an unknown key."""
        adapter = AdapterConfig(**values.get("adapter", {}))
        return ModelConfig(**{**values, "adapter": adapter})
