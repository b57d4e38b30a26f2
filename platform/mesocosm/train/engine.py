"""The DeepSpeed engine: how it is configured, started, resumed, and how float32 weights leave it."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mesocosm.model import mup
from mesocosm.model.net import WorldNet
from mesocosm.train import checkpoint
from mesocosm.train.checkpoint import Progress
from mesocosm.train.config import TrainConfig

BETAS = (0.9, 0.95)
PROCESS_GIB = 0.7
"""Host memory of a worker that holds no network: what torch, DeepSpeed and Ray take (0.7 to 0.8 GiB
resident, torch 2.13, Linux).
"""


def import_deepspeed() -> ModuleType:
    """`import deepspeed`, quickly and quietly, with nothing to compile.

    Its autotuner imports mlflow where that is installed: half of the import's 13 s of CPU time; it
    takes mlflow's absence for an answer. On CPU, `init_distributed` probes compilers and builds (40
    s, needs ninja) an op for inference alone, if it is listed as compatible; the optimiser here is
    torch's own, so no op is.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    hidden: dict[str, Any] = {"mlflow": None} if "mlflow" not in sys.modules else {}
    sys.modules.update(hidden)
    try:
        deepspeed = importlib.import_module("deepspeed")
    finally:
        for name in hidden:
            del sys.modules[name]
    vars(importlib.import_module("deepspeed.ops"))["__compatible_ops__"] = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


@dataclass(frozen=True)
class Rank:
    """Which of the group's workers this is."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def stage(options: TrainConfig) -> int:
    """The ZeRO stage that runs: bf16 wants an optimiser that keeps float32 masters, which stage 1
    is and stage 0 is not.
    """
    return max(options.zero_stage, 1) if options.precision == "bf16" else options.zero_stage


def least_gib(total: int, options: TrainConfig, workers: int, *, on_gpu: bool) -> float:
    """GiB of host memory that so many workers want together, at the least: their processes and, on
    CPU, weights, float32 gradients and AdamW's two moments (with bf16 float32 masters) of `total`
    parameters, as ZeRO's stage shares them. Activations and data come on top.
    """
    weight, master = (2, 4) if options.precision == "bf16" else (4, 0)
    copies = [
        workers if stage(options) < sharded else 1 for sharded in (1, 2, 3)
    ]  # of moments and masters, of gradients, of weights
    states = (
        0
        if on_gpu
        else total
        * sum(each * count for each, count in zip((8 + master, 4, weight), copies, strict=True))
    )
    return workers * PROCESS_GIB + states / 2**30


def settings(options: TrainConfig, world_size: int, universal: bool) -> dict[str, Any]:
    """DeepSpeed's config."""
    return {
        "train_batch_size": options.batch,
        "train_micro_batch_size_per_gpu": options.batch // (world_size * options.accumulate),
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.clip,
        "zero_optimization": {"stage": stage(options), "overlap_comm": False},
        "bf16": {"enabled": options.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**12,
    }


def start(
    net: WorldNet, options: TrainConfig, own: Rank, kept: Path | None, id: str
) -> tuple[Any, list[float], Progress | None]:
    """The engine, each parameter group's full learning rate, and the progress of the checkpoint
    `kept` (a local folder) that it went on from.
    """
    deepspeed = import_deepspeed()
    before = None
    if kept is not None:
        checkpoint.verify(kept)
        before = checkpoint.read_progress(kept)
    universal = before is not None and checkpoint.needs_universal(before, own.world_size)
    groups = mup.param_groups(net, options.lr, options.weight_decay)
    rates = [group["lr"] for group in groups]
    constants = [{name: group[name] for name in ("weight_decay", "eps")} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS)
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=optimizer,
        config=settings(options, own.world_size, universal),
        dist_init_required=False,
    )
    if kept is None or before is None:
        return engine, rates, None
    if universal:
        folder = _universal(kept, own)
        checkpoint.load_running(engine, folder, checkpoint.UNIVERSAL)
        dist.barrier()
        if own.local_rank == 0:
            shutil.rmtree(folder)
        # Stage 3 gives every group the first one's constants, and all of them one step counter,
        # which each then counts up.
        for group, constant in zip(engine.optimizer.param_groups, constants, strict=True):
            group.update(constant)
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = torch.as_tensor(state["step"]).clone()
    else:
        checkpoint.load_running(engine, kept / "ds", checkpoint.TAG)
    if before.world_size == own.world_size:
        checkpoint.load_random(kept, own.rank)
    return engine, rates, replace(before, world_size=own.world_size)


def _universal(kept: Path, own: Rank) -> Path:
    """Convert a checkpoint once on each node; the ranks of the node share the folder."""
    made = ""
    if own.local_rank == 0:
        made = tempfile.mkdtemp(prefix="mesocosm-universal-")
        checkpoint.to_universal(kept, Path(made))
    folders = [""] * own.world_size
    dist.all_gather_object(folders, made)
    return Path(folders[own.rank - own.local_rank])


def step(engine: Any) -> float:
    """Take the optimiser's step; the gradient's global norm before it was clipped."""
    if engine.zero_optimization_stage():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO, DeepSpeed clips and keeps no norm.
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in engine.module.parameters() if p.grad is not None]
    )
    engine.step()
    return float(norm)


def weights(engine: Any, own: Rank) -> dict[str, Tensor] | None:
    """All float32 parameters and buffers on the CPU, on rank 0; None elsewhere. Every rank must
    call it: shards are gathered, one parameter at a time.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    net: WorldNet = engine.module
    full: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        value = (
            safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter
        )
        if own.rank == 0:
            full[name] = value.detach().float().cpu().clone().contiguous()
    if own.rank != 0:
        return None
    kept = net.state_dict().keys()
    return full | {
        name: buffer.detach().cpu().clone() for name, buffer in net.named_buffers() if name in kept
    }
