"""How fast training goes: transitions and positions a second, and MFU against a declared or
measured peak.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from mesocosm.model.net import Losses


class Meter:
    """Rates over the steps since the last `read`. `flops` is what one step of the whole group
    computes, `peak` one device's FLOP/s.
    """

    def __init__(self, flops: float, positions: int, peak: float, world_size: int):
        self.flops, self.positions, self.peak, self.world_size = flops, positions, peak, world_size
        self.last = 0.0
        """Seconds of the last step."""
        self._began: float | None = None
        self._steps = 0
        self._transitions = 0.0
        self._elapsed = 0.0
        self._all = (0, 0.0, 0.0)

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, transitions: float) -> None:
        """A step ended that trained on so many valid transitions, over all ranks."""
        assert self._began is not None
        self.last = time.perf_counter() - self._began
        self._elapsed += self.last
        self._steps += 1
        self._transitions += transitions

    def read(self) -> dict[str, float]:
        """`transitions_per_s` (valid ones), `positions_per_s` (B * W a step, padding counted),
        `mfu` (share of the group's peak).
        """
        rates = self._rates(self._steps, self._transitions, self._elapsed)
        self._all = (
            self._all[0] + self._steps,
            self._all[1] + self._transitions,
            self._all[2] + self._elapsed,
        )
        self._steps, self._transitions, self._elapsed = 0, 0.0, 0.0
        return rates

    def overall(self) -> dict[str, float]:
        """The same over all steps that were read."""
        return self._rates(*self._all)

    def _rates(self, steps: int, transitions: float, elapsed: float) -> dict[str, float]:
        elapsed = max(elapsed, 1e-9)
        return {
            "transitions_per_s": transitions / elapsed,
            "positions_per_s": steps * self.positions / elapsed,
            "mfu": steps * self.flops / elapsed / (self.peak * self.world_size),
        }


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of several large matrix products on `device` in the precision that
    training uses.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size, repeats = (8192, 10) if device.type == "cuda" else (512, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / max(time.perf_counter() - began, 1e-9))
    return best


class Sums:
    """Losses of micro-batches, added up in float64, over this rank and then over all."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, losses: Losses, share: float = 1.0) -> None:
        """`share`: the micro-batch's part of the global batch, by which its objective counts."""
        names = ["objective", "transitions", *sorted(losses.nats)]
        values = torch.stack(
            [
                losses.objective.detach(),
                losses.transitions,
                *(losses.nats[name] for name in sorted(losses.nats)),
            ]
        )
        scaled = zip(names, values.double().tolist(), strict=True)
        for name, value in scaled:
            self._sums[name] = self._sums.get(name, 0.0) + (
                value * share if name == "objective" else value
            )

    def reduced(self, device: torch.device, stop: bool = False) -> dict[str, float]:
        """Over all ranks: nats a transition by part, `loss` (their total), `objective`,
        `transitions`, and `stop`: 1 if any rank says so.
        """
        names = sorted(self._sums)
        vector = torch.tensor(
            [*(self._sums[name] for name in names), float(stop)], dtype=torch.float64, device=device
        )
        dist.all_reduce(vector)
        told = dict(zip([*names, "stop"], vector.tolist(), strict=True))
        parts = [name for name in names if name not in ("objective", "transitions")]
        for name in parts:
            told[name] /= max(told["transitions"], 1.0)
        told["loss"] = sum(told[name] for name in parts)
        return told
