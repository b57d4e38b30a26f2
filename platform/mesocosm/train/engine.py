"""The DeepSpeed engine: its config, how it starts and resumes, and how float32 weights leave it."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mesocosm import compat
from mesocosm.model import mup
from mesocosm.train import checkpoint
from mesocosm.train.checkpoint import TrainingProgress
from mesocosm.train.config import TrainConfig

BETAS = (0.9, 0.95)
PROCESS_GIB = 0.7
"""Host memory of a worker without a network: what torch, DeepSpeed and Ray take (0.7 to 0.8 GiB
resident, torch 2.13, Linux).
"""


def import_deepspeed() -> ModuleType:
    """`import deepspeed`, quickly and quietly, with nothing to compile (see `compat`)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    with compat.mlflow_hidden():
        deepspeed = importlib.import_module("deepspeed")
    compat.list_no_ops(deepspeed)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


@dataclass(frozen=True)
class Rank:
    """This worker's place in the group."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def cpu_has_bf16() -> bool:
    """True where oneDNN computes in bf16 on this machine's CPU."""
    onednn = torch.backends.mkldnn.is_available()
    return onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def stage(options: TrainConfig) -> int:
    """The ZeRO stage that runs: bf16 needs an optimiser that keeps float32 masters, as stage 1 does
    and stage 0 does not.
    """
    return max(options.zero_stage, 1) if options.precision == "bf16" else options.zero_stage


def least_gib(total: int, options: TrainConfig, workers: int, *, on_gpu: bool) -> float:
    """The least host memory in GiB of all workers together: their processes and, on CPU, weights,
    float32 gradients and AdamW's two moments (with bf16 float32 masters) of `total` parameters,
    sharded by the ZeRO stage. Activations and data come on top.
    """
    weight, master = (2, 4) if options.precision == "bf16" else (4, 0)
    states = 0.0
    # (bytes a parameter, the stage that shards them): moments and masters, gradients, weights.
    for size, sharded in ((8 + master, 1), (4, 2), (weight, 3)):
        states += total * size * (workers if stage(options) < sharded else 1)
    return workers * PROCESS_GIB + (0.0 if on_gpu else states / 2**30)


def start(
    net: nn.Module, options: TrainConfig, rank: Rank, resume_from: Path | None
) -> tuple[Any, list[float], TrainingProgress | None]:
    """Start the engine, from the checkpoint in the local folder `resume_from`, if any.

    Returns:
        The engine, each parameter group's full learning rate, and the checkpoint's progress.
    """
    deepspeed = import_deepspeed()
    progress = None
    if resume_from is not None:
        checkpoint.verify(resume_from)
        progress = checkpoint.read_progress(resume_from)
    # Stage 0 has no shards; those of the other stages fit one world size.
    same_size = progress is None or progress.world_size == rank.world_size
    universal = progress is not None and progress.zero_stage > 0 and not same_size
    groups = mup.param_groups(net, options.lr, options.weight_decay)
    rates = [group["lr"] for group in groups]
    constants = [{name: group[name] for name in ("weight_decay", "eps")} for group in groups]
    config = {
        "train_batch_size": options.batch,
        "train_micro_batch_size_per_gpu": options.batch // (rank.world_size * options.accumulate),
        "gradient_accumulation_steps": options.accumulate,
        "gradient_clipping": options.clip,
        "zero_optimization": {"stage": stage(options), "overlap_comm": False},
        "bf16": {"enabled": options.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**12,
    }
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=config, dist_init_required=False
    )
    if resume_from is None or progress is None:
        return engine, rates, None
    if universal:
        _load_universal(engine, resume_from, rank)
        # Stage 3 gives every group the constants of the first, and all of them one step counter,
        # which each then increments.
        for group, constant in zip(engine.optimizer.param_groups, constants, strict=True):
            group.update(constant)
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = torch.as_tensor(state["step"]).clone()
    else:
        checkpoint.load_running(engine, resume_from / "ds", checkpoint.TAG)
    if same_size:
        checkpoint.load_random(resume_from, rank.rank)
    return engine, rates, replace(progress, world_size=rank.world_size)


def _load_universal(engine: Any, resume_from: Path, rank: Rank) -> None:
    """Convert a checkpoint of another world size once on each node, and load it on all ranks."""
    folder = ""
    if rank.local_rank == 0:
        folder = tempfile.mkdtemp(prefix="mesocosm-universal-")
        checkpoint.to_universal(resume_from, Path(folder))
    folders = [""] * rank.world_size
    dist.all_gather_object(folders, folder)
    shared = Path(folders[rank.rank - rank.local_rank])
    checkpoint.load_running(engine, shared, checkpoint.UNIVERSAL)
    dist.barrier()
    if rank.local_rank == 0:
        shutil.rmtree(shared)


def step(engine: Any) -> float:
    """Take the optimiser's step, and return the gradient's global norm before clipping."""
    if engine.zero_optimization_stage():
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO, DeepSpeed clips and keeps no norm.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    return float(norm)


def weights(engine: Any, rank: Rank) -> dict[str, Tensor] | None:
    """All trained parameters in float32 on the CPU, on rank 0; None elsewhere. Every rank must
    call it: shards are gathered, one parameter at a time.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    net: nn.Module = engine.module
    sharded = engine.zero_optimization_stage()
    full: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        value = safe_get_full_fp32_param(parameter) if sharded else parameter
        if rank.rank == 0:
            full[name] = value.detach().float().cpu().clone().contiguous()
    return full if rank.rank == 0 else None
