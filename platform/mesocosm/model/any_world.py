"""Worlds of every family, loaded by what their world.json says."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mesocosm.model.artifact import TEXTS, WORLD
from mesocosm.model.language.world import TextWorld
from mesocosm.model.world import World

AnyWorld = World | TextWorld


def load_any(folder: Path, device: torch.device | str = "cpu") -> AnyWorld:
    """Load a world of windows or of texts.

    Raises:
        ArtifactError: A file is missing or damaged.
        UsageError: A package that it needs is missing, or a known function cannot be imported.
    """
    return (TextWorld if is_text(folder) else World).load(folder, device)


def is_text(folder: Path) -> bool:
    """True if a world is one of texts; False also where its world.json cannot be read."""
    try:
        return TEXTS in json.loads((folder / WORLD).read_text())
    except (OSError, ValueError, TypeError):
        return False
