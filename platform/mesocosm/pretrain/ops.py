"""Builds ahead what DeepSpeed would compile on first use: `python -m mesocosm.pretrain.ops` (about 40 s, once a machine).

On CPU, DeepSpeed compiles its `shm_comm` op inside `init_distributed`, whatever the optimiser, with `ninja` from PATH.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from types import ModuleType
from typing import Any


def import_deepspeed() -> ModuleType:
    """`import deepspeed`, quickly and quietly.

    DeepSpeed's autotuner, which is not used here, imports mlflow where it is installed: half of the import's 13 s of CPU
    time. It takes mlflow's absence for an answer.
    """
    import torch

    from mesocosm.cluster import worker_env

    os.environ.update(worker_env())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    hidden: dict[str, Any] = {"mlflow": None} if "mlflow" not in sys.modules else {}
    sys.modules.update(hidden)
    try:
        deepspeed = importlib.import_module("deepspeed")
    finally:
        for name in hidden:
            del sys.modules[name]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def main() -> None:
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    print("deepspeed's shm_comm op is built")


if __name__ == "__main__":
    main()
