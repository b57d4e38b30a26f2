"""The memory of the key caches of text worlds, which sessions may not exceed."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from mesocosm.errors import UsageError
from mesocosm.model.language.cache import BLOCK
from mesocosm.model.language.world import TextWorld

SHARE = 0.25
"""The share of the memory that the caches of a process may take. A step copies the part that it
reads, up to twice.
"""
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the most bytes of a container, of cgroups 2 and 1."""
MIB, GIB = 1 << 20, 1 << 30


@cache
def cache_limit(device: torch.device) -> int:
    """The most bytes of key caches of one process on a device."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory)
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMITS:
        with suppress(OSError, ValueError):  # not a container, or one without a limit ("max")
            sizes.append(int(Path(file).read_text()))
    return int(SHARE * min(sizes))


def cache_bytes(world: TextWorld) -> int:
    """The bytes of the key cache of one environment whose window is full."""
    columns = -(-world.window // BLOCK) * BLOCK
    return world.net.members * columns * world.net.model.token_bytes


def check_memory(id: str, world: TextWorld, num_envs: int) -> None:
    """Raise UsageError where the caches of `num_envs` environments of the world `id` might not fit
    in memory.
    """
    each, limit = cache_bytes(world), cache_limit(world.device)
    if num_envs * each > limit:
        members = f", members={world.net.members}" if world.net.members > 1 else ""
        raise UsageError(
            f"num_envs must be <= {limit // each} in world {id}, got {num_envs}: the key cache of"
            f" an environment takes up to {each / MIB:,.1f} MiB (context={world.window}{members})"
            f" of {limit / GIB:,.1f} GiB; lower num_envs, or pretrain with a shorter model.context"
        )
