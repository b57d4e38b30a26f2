"""The file that describes a world of any kind, and the errors of reading its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mesocosm.errors import ArtifactError, UsageError

WORLD = "world.json"
TEXTS = "llama"
"""The key of world.json that only worlds of texts have: whether the network is one of ours."""


@contextmanager
def described(folder: Path, schema: int, *, texts: bool = False) -> Iterator[dict[str, Any]]:
    """Read a world's folder inside this context, which gives what world.json says.

    Args:
        folder: The world's folder.
        schema: The schema that this version reads.
        texts: The world must be one of texts; otherwise it must not.

    Raises:
        ArtifactError: The schema is another, or a file is missing or damaged.
        UsageError: The world is of the other kind.
    """
    try:
        about = json.loads((folder / WORLD).read_text())
        if (TEXTS in about) != texts:
            needed = "be" if texts else "not be"
            raise UsageError(
                f"world {folder.name!r} must {needed} a world of texts (model.family=language);"
                " give another world"
            )
        if about["schema"] != schema:
            raise ArtifactError(
                f"world {str(folder)!r} must have schema {schema}, got {about['schema']};"
                " pretrain it again"
            )
        yield about
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"world {str(folder)!r} cannot be read: {reason}") from error
