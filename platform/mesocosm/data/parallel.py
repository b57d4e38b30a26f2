"""A function mapped over items in order, in this process or in tasks of Ray Data."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from mesocosm.cluster import ray_session
from mesocosm.config import RayConfig

T = TypeVar("T")
R = TypeVar("R")
LARGE = 1 << 28
"""Bytes of input from which `workers` defaults to all CPUs."""


def worker_count(workers: int | None, size: int, ray_config: RayConfig) -> int:
    """`workers`, which defaults to 0 below LARGE bytes, else to the cluster's CPU count."""
    if workers is not None or size < LARGE:
        return workers or 0
    import ray

    ray_session.ensure(ray_config)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def resources(workers: int | None) -> dict[str, tuple[float, float]]:
    """`Job.resources` for `workers`. The default requests none."""
    return {f"workers={workers}": (workers, 0)} if workers else {}


def ordered(
    function: Callable[[T], Iterable[R]], items: Sequence[T], workers: int, ray_config: RayConfig
) -> Iterator[R]:
    """All results of `function(item)`, in the order of the items.

    Args:
        workers: Tasks of Ray Data at a time, no further ahead than its memory allows. 0 calls in
            this process.
    """
    if not workers or not items:  # Ray Data refuses a pool of no tasks
        for item in items:
            yield from function(item)
        return
    import ray
    import ray.data  # sets up its own logging, so it comes before the level

    ray_session.ensure(ray_config)
    ray_session.preflight(cpus=workers, key=f"workers={workers}")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1 << 25
    shared = ray.put((function, items))

    def run(rows: dict[str, Any]) -> Iterator[dict[str, Any]]:
        call, every = ray.get(shared)
        for number in rows["id"]:
            for result in call(every[number]):
                yield {"result": np.array([pickle.dumps(result, protocol=5)], object)}

    with ray.data.DataContext.current(context):
        data = ray.data.range(len(items), override_num_blocks=len(items))
        tasks = ray.data.TaskPoolStrategy(size=min(workers, len(items)))
        results = data.map_batches(run, batch_size=1, batch_format="numpy", compute=tasks)
        for row in results.iter_rows():
            yield pickle.loads(row["result"])  # of `run` in this job: no pickle from a file
