"""Trains a learned tokenizer on patches of the training split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mesocosm.data.tokens.reconstruction import MOVING
from mesocosm.errors import UsageError
from mesocosm.model.tokenizer.frames import cut
from mesocosm.model.tokenizer.fsq import PatchFSQ, PatchNetworks, scaled

Array = NDArray[Any]
LEVELS = (8, 8, 8, 8)
BATCH, LR, WEIGHT = 256, 2e-3, 8.0
MOVED = 0.9
"""The share of a batch that is drawn from patches that differ from the median frame's. They are
few, but the world must predict them.
"""


def fit_fsq(
    frames: Array,
    median: Array,
    patch: int,
    steps: int,
    seed: int,
    name: str,
    progress: Callable[[int], None] = lambda step: None,
) -> PatchFSQ:
    """Train a tokenizer. The same input gives the same bits on one kind of CPU.

    The loss is a smooth L1 of the pixels, in which moving pixels, of the frame or of its
    reconstruction, weigh 1 + WEIGHT.

    Args:
        frames: uint8 [B, H, W, C] of the training split.
        median: uint8 [H, W, C].
        patch: Pixels of a patch's side.
        steps: Of AdamW.
        seed: Of the weights and the batches.
        name: The image's leaf, for messages.
        progress: Called with the steps so far.

    Raises:
        UsageError: Fewer than 2 codes of positions are used.
    """
    flat = cut(frames, patch)
    still = np.broadcast_to(cut(median[None], patch), flat.shape).reshape(-1, flat.shape[-1])
    flat = flat.reshape(-1, flat.shape[-1])
    moved = np.flatnonzero((np.abs(flat.astype(np.int16) - still) > MOVING).any(1))
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = PatchNetworks(flat.shape[1], LEVELS)
    settings: Any = {"lr": LR, "betas": (0.9, 0.99), "weight_decay": 1e-4, "fused": True}
    optimizer = torch.optim.AdamW(networks.parameters(), **settings)
    many = int(BATCH * MOVED) if len(moved) else 0
    edge = MOVING / 127.5
    for step in range(steps):
        falling = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 50) * falling
        rows = rng.integers(0, len(flat), BATCH - many)
        if many:
            rows = np.concatenate([moved[rng.integers(0, len(moved), many)], rows])
        x, m = scaled(flat[rows]), scaled(still[rows])
        y = networks(x)
        moving = ((x - m).abs() > edge) | ((y.detach() - m).abs() > edge)
        weight = 1 + WEIGHT * moving.float()
        loss = (weight * F.smooth_l1_loss(y, x, beta=0.1, reduction="none")).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        progress(step + 1)
    height, width, channels = frames.shape[1:]
    tokenizer = PatchFSQ((height, width, channels), patch, networks)
    codes = tokenizer.encode(frames[:: max(1, len(frames) // 256)]).reshape(-1, len(LEVELS))
    if len(np.unique(codes, axis=0)) < 2:
        problem = "all of them are black" if not frames.any() else "the codes have collapsed"
        raise UsageError(
            f"{name} uses 1 code in {len(frames)} frames, and a world needs at least 2: {problem};"
            " correct the camera, or give other steps or another seed"
        )
    return tokenizer
