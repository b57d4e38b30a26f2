"""A learned tokenizer of patches: finite scalar quantisation (FSQ; Mentzer et al. 2023, arXiv
2309.15505).

A small network maps each patch to d numbers, each of which is rounded to one of L levels: the d
digits of a position. Another network maps them back to pixels. Linear layers on patches, because
small convolutions are several times as slow on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mesocosm.model.tokenizer.frames import cut, paste

Array = NDArray[Any]
BLOCK = 8192
"""Patches that are encoded or decoded at once."""


class PatchNetworks(nn.Module):
    """The two networks of patches.

    Args:
        values: Of a patch: pixels times channels.
        levels: L of each digit.
    """

    levels: Tensor

    def __init__(self, values: int, levels: tuple[int, ...]):
        super().__init__()
        hidden = min(256, max(96, values * 2 // 3))
        width, digits = hidden // 2, len(levels)
        self.encoder = nn.Sequential(
            nn.Linear(values, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width),
            nn.SiLU(),
            # Without it the codes collapsed to one at higher rates.
            nn.LayerNorm(width),
            nn.Linear(width, digits),
        )
        self.decoder = nn.Sequential(
            nn.Linear(digits, width),
            nn.SiLU(),
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, values),
        )
        last, first = self.encoder[-1], self.decoder[0]
        assert isinstance(last, nn.Linear) and isinstance(first, nn.Linear)
        nn.init.normal_(last.weight, 0, 1.5 * width**-0.5)
        nn.init.zeros_(last.bias)
        nn.init.normal_(first.weight, 0, 1.5)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32))

    def digits(self, patches: Tensor) -> Tensor:
        """[N, d] float32, whole: the digits of patches [N, values] in [-1, 1]."""
        return torch.round(torch.sigmoid(self.encoder(patches)) * (self.levels - 1))

    def pixels(self, digits: Tensor) -> Tensor:
        """Patches [N, values] of digits [N, d]."""
        decoded: Tensor = self.decoder(2 * digits / (self.levels - 1) - 1)
        return decoded

    def forward(self, patches: Tensor) -> Tensor:
        """Patches [N, values] reconstructed; rounding passes its gradient straight through."""
        exact = torch.sigmoid(self.encoder(patches)) * (self.levels - 1)
        return self.pixels(exact + (torch.round(exact) - exact).detach())


class PatchFSQ:
    """Made by `data.tokens.learning` or from its state.

    Args:
        shape: [height, width, channels] of a frame.
        patch: Pixels of a patch's side, which divides height and width.
        networks: Trained.
    """

    kind = "fsq"

    def __init__(self, shape: tuple[int, int, int], patch: int, networks: PatchNetworks):
        self.shape, self.patch = shape, patch
        self.networks = networks.eval().requires_grad_(False)
        self.grid = shape[0] // patch, shape[1] // patch
        levels = tuple(int(level) for level in networks.levels.tolist())
        self.digits = len(levels)
        self.sizes = levels * (self.grid[0] * self.grid[1])

    def encode(self, frames: Array) -> Array:
        """Codes [B, n] int64 of frames uint8 [B, height, width, channels]: the digits of each
        position, row by row.
        """
        flat = cut(frames, self.patch).reshape(-1, self.patch**2 * self.shape[2])
        codes = np.empty((len(flat), self.digits), np.int64)
        with torch.inference_mode():
            for start in range(0, len(flat), BLOCK):
                block = scaled(flat[start : start + BLOCK])
                codes[start : start + BLOCK] = self.networks.digits(block).numpy()
        return codes.reshape(len(frames), len(self.sizes))

    def decode(self, codes: Array) -> Array:
        """Frames uint8 [B, height, width, channels] of codes [B, n]."""
        flat = codes.reshape(-1, self.digits)
        patches = np.empty((len(flat), self.patch**2 * self.shape[2]), np.uint8)
        with torch.inference_mode():
            for start in range(0, len(flat), BLOCK):
                digits = torch.from_numpy(flat[start : start + BLOCK].astype(np.float32))
                pixels = (self.networks.pixels(digits).clamp(-1, 1) + 1) * 127.5
                patches[start : start + BLOCK] = pixels.round().to(torch.uint8).numpy()
        return paste(patches, self.shape, self.patch)

    def features(self, codes: Array) -> Array:
        """[B, n] float32 in [-1, 1]: the digits of codes [B, n], from the lowest level to the
        highest.
        """
        highest = np.array(self.sizes, np.float32) - 1
        scaled_digits: Array = 2 * codes.astype(np.float32) / highest - 1
        return scaled_digits

    def state(self) -> dict[str, Array]:
        """The weights and levels, the patch's side and the frame's shape."""
        weights = {name: value.numpy() for name, value in self.networks.state_dict().items()}
        return weights | {"patch": np.array([self.patch]), "shape": np.array(self.shape, np.int64)}

    @staticmethod
    def of(state: Mapping[str, Array]) -> PatchFSQ:
        """The tokenizer of a state."""
        height, width, channels = state["shape"].tolist()
        patch = state["patch"].item()
        levels = tuple(int(level) for level in state["levels"].tolist())
        networks = PatchNetworks(patch**2 * channels, levels)
        weights = {name: torch.from_numpy(np.array(state[name])) for name in networks.state_dict()}
        networks.load_state_dict(weights)
        return PatchFSQ((height, width, channels), patch, networks)


def scaled(patches: Array) -> Tensor:
    """Patches uint8 as float32 in [-1, 1]."""
    return torch.from_numpy(patches.astype(np.float32) / 127.5 - 1.0)
