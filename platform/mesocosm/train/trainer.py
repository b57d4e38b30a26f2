"""Ray Train's TorchTrainer without the helper processes that a run here has no use for.

Each helper is a Python process that imports Ray Data, some 3 s of CPU, on the way to the first
step. Written against the internals of ray 2.60, to which the package is pinned.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy


class Trainer(TorchTrainer):  # type: ignore[misc]
    """No Ray Datasets are passed, so none are managed. In a private Ray (`private`), which ends
    with the driver, there is no autoscaler to ask for nodes, and no dashboard, without which the
    cleaner of placement groups only logs a failed query a second.
    """

    def __init__(self, *args: Any, private: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._unused: tuple[type[Any], ...] = (
            (DatasetsCallback, PlacementGroupCleanerCallback) if private else (DatasetsCallback,)
        )
        self._private = private

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [callback for callback in callbacks if not isinstance(callback, self._unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self._private:
            arguments["scaling_policy"] = _FixedWorkers(self.scaling_config)  # type: ignore[arg-type]
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


class _FixedWorkers(FixedScalingPolicy):  # type: ignore[misc]
    """Asks no autoscaler."""

    def _maybe_send_resource_request(self) -> None:
        pass

    def _send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass
