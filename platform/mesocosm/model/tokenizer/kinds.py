"""The kinds of tokenizers, and tokenizers as JSON, which a world's codec holds."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.model.tokenizer.frames import FrameTokenizer
from mesocosm.model.tokenizer.fsq import PatchFSQ

KINDS: Mapping[str, Any] = {PatchDictionary.kind: PatchDictionary, PatchFSQ.kind: PatchFSQ}


def tokenizer_to_json(tokenizer: FrameTokenizer) -> dict[str, Any]:
    """A tokenizer as plain JSON; its arrays as base64."""
    arrays = {
        name: {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        }
        for name, array in tokenizer.state().items()
    }
    return {"kind": tokenizer.kind, "arrays": arrays}


def tokenizer_from_json(values: Mapping[str, Any]) -> FrameTokenizer:
    """The inverse of `tokenizer_to_json`."""
    state = {}
    for name, array in values["arrays"].items():
        flat = np.frombuffer(base64.b64decode(array["data"]), np.dtype(array["dtype"]))
        state[name] = flat.reshape(array["shape"])
    tokenizer: FrameTokenizer = KINDS[values["kind"]].of(state)
    return tokenizer
