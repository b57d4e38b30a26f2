"""Mesocosm: agents learn in a learned world model and take few steps in the real environment.

The public Python API. Each name is imported when it is first used, so that `import mesocosm` is
fast and imports neither torch nor Ray:

    import mesocosm

    world = mesocosm.load_world("worlds/ID")
    envs = mesocosm.WorldVectorEnv(64, world, horizon=200)
    observations, infos = envs.reset(seed=0)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesocosm.api import fit_law, load_dataset, load_planner, load_policy, load_world
    from mesocosm.datasets.dataset import Dataset
    from mesocosm.envs.ledger import Ledger
    from mesocosm.errors import MesocosmError, UsageError
    from mesocosm.model.language.world import TextWorld
    from mesocosm.model.world import World
    from mesocosm.policies.policy import Policy
    from mesocosm.scaling.law import Law
    from mesocosm.serve.plans import ServedPlanner
    from mesocosm.serve.single_env import WorldEnv
    from mesocosm.serve.world_env import WorldVectorEnv
    from mesocosm.store.artifacts import Storage

__version__ = "0.4.0"

__all__ = [
    "Dataset",
    "Law",
    "Ledger",
    "MesocosmError",
    "Policy",
    "ServedPlanner",
    "Storage",
    "TextWorld",
    "UsageError",
    "World",
    "WorldEnv",
    "WorldVectorEnv",
    "__version__",
    "fit_law",
    "load_dataset",
    "load_planner",
    "load_policy",
    "load_world",
]

_MODULES = {
    "Dataset": "datasets.dataset",
    "Law": "scaling.law",
    "Ledger": "envs.ledger",
    "MesocosmError": "errors",
    "Policy": "policies.policy",
    "ServedPlanner": "serve.plans",
    "Storage": "store.artifacts",
    "TextWorld": "model.language.world",
    "UsageError": "errors",
    "World": "model.world",
    "WorldEnv": "serve.single_env",
    "WorldVectorEnv": "serve.world_env",
    "fit_law": "api",
    "load_dataset": "api",
    "load_planner": "api",
    "load_policy": "api",
    "load_world": "api",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
