"""Ray Train's TorchTrainer without the helper processes that a run here does not need.

Each helper is a Python process that imports Ray Data, and the controller torch as well: 3 to 9 s of
CPU before the first step. `make_trainer` also says how often lost workers are replaced
(`train.max_failures`).

The classes override internals of ray 2.60.0. There is no setting for this: ray-project/ray#55556
removed RAY_TRAIN_RUN_CONTROLLER_AS_ACTOR. With another minor version of Ray, importing this module
raises UsageError.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import ray

from mesocosm import compat

if not compat.is_tested("ray"):  # before the imports of internals, which another version may lack
    raise compat.untested("ray", "training on Ray Train")

from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig

from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint
from mesocosm.train.worker import TrainWork


class Trainer(TorchTrainer):  # type: ignore[misc]
    """No Ray Datasets are passed, so none are managed. A private Ray ends with the driver, which
    therefore runs the controller itself. It has no autoscaler to ask for nodes, and no dashboard,
    without which the cleaner of placement groups only logs a failed query a second.

    Overrides two methods of `ray.train.v2.api.data_parallel_trainer.DataParallelTrainer`.
    """

    def __init__(self, *args: Any, private: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._private = private

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        unused: tuple[type[Any], ...] = (DatasetsCallback,)
        if self._private:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in callbacks if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not self._private:
            return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]
        arguments["scaling_policy"] = _FixedWorkers(self.scaling_config)  # type: ignore[arg-type]
        # Its tracebacks of workers that are started again are not for the user's terminal.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        controller = _Controller(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


class _Workers(WorkerGroup):  # type: ignore[misc]
    """The workers of a controller that is no actor. They ask it for nothing: checkpoints are read
    from storage.

    The method is that of `WorkerGroup`, with `controller_actor=None` for the current actor.
    """

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(tasks)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):  # type: ignore[misc]
    worker_group_cls = _Workers


class _FixedWorkers(FixedScalingPolicy):  # type: ignore[misc]
    """Asks no autoscaler: overrides the three requests of `ScalingPolicy`."""

    def _maybe_send_resource_request(self) -> None:
        pass

    _send_resource_request = _cancel_resource_request = _maybe_send_resource_request


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    work: TrainWork,
    storage: Storage,
    *,
    private: bool,
    start_attempts: int,
) -> Trainer:
    """A trainer that runs `loop` with `work` on every worker; its state lies in the training's
    folder in `storage`.
    """
    # A poll every 2 s and the watch for preempted nodes (a process) cost seconds of every run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    if private:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    filesystem, base = storage.arrow()
    path, _, name = checkpoint.folder_of(work.id).rpartition("/")
    options, gpus = work.train, work.train.gpus_per_worker or 0.0
    resources = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
    scaling = ScalingConfig(
        num_workers=options.workers, use_gpu=gpus > 0, resources_per_worker=resources
    )
    failures = FailureConfig(
        max_failures=options.max_failures, controller_failure_limit=start_attempts
    )
    return Trainer(
        loop,
        private=private,
        train_loop_config={"work": work},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            storage_path=f"{base}/{path}",
            storage_filesystem=filesystem,
            failure_config=failures,
            checkpoint_config=CheckpointConfig(num_to_keep=options.keep_checkpoints),
        ),
    )
