"""Default settings of algorithms: RLlib's own suit long runs on Atari. A config's values win."""

from __future__ import annotations

from typing import Any

Settings = dict[str, dict[str, Any]]
ON_POLICY = ("PPO", "APPO", "IMPALA")
REPLAY = ("SAC", "DQN")
ALGORITHMS = (*ON_POLICY, *REPLAY)
"""Algorithms whose policy can be exported"""

_PPO: dict[str, Any] = {"lr": 1e-3, "lambda_": 0.95, "clip_param": 0.2, "vf_clip_param": 1e6}
"""RLlib clips the squared error of the value at 10: returns above 3 would have no gradient"""
_BATCH = "train_batch_size_per_learner"
_WARMUP = "num_steps_sampled_before_learning_starts"
_UPDATE = "target_network_update_freq"
_SAC_RATES = ("actor_lr", "critic_lr", "alpha_lr")

IMAGINED: Settings = {
    "PPO": _PPO
    | {"minibatch_size": 256, "num_epochs": 8}
    | {"entropy_coeff": 0.005, "kl_coeff": 0.2, "kl_target": 0.03},
    "SAC": dict.fromkeys(_SAC_RATES, 7e-4) | {_BATCH: 256, _WARMUP: 1024},
    "DQN": {"lr": 1e-3, _BATCH: 256, _WARMUP: 1024, _UPDATE: 1024},
}
"""In a world, where steps are cheap and come by hundreds at once"""

REAL: Settings = {
    "PPO": _PPO | {"minibatch_size": 64, "num_epochs": 10, "use_kl_loss": False},
    # Haarnoja et al. (arXiv 1812.05905), one update a step; learning starts early, as short runs
    # need. Batches of 64: RLlib builds an episode object for every sampled transition, and 256 of
    # them cost a tenth of a second an update.
    "SAC": dict.fromkeys(_SAC_RATES, 1e-3) | {_BATCH: 64, "training_intensity": 64, _WARMUP: 256},
    # RL Baselines3 Zoo, CartPole-v1: 128 updates of 64 every 256 steps.
    "DQN": {"lr": 2.3e-3, _BATCH: 64, "training_intensity": 32, _WARMUP: 1000, _UPDATE: 20}
    | {"epsilon": [[0, 1.0], [8000, 0.04]]},
}
"""In reality, where every step has a price"""

SHAPE = {"PPO": (4, 256), "APPO": (4, 64), "IMPALA": (4, 64), "SAC": (1, 8), "DQN": (1, 256)}
"""(environments, steps of each between updates) in reality"""

_SMALL = {"fcnet_hiddens": [64, 64], "vf_share_layers": False}
_WIDE = {"fcnet_hiddens": [256, 256], "fcnet_activation": "relu"}
MODEL: Settings = dict.fromkeys(ON_POLICY, _SMALL) | dict.fromkeys(REPLAY, _WIDE)


def params(table: Settings, algo: str, overrides: dict[str, Any], batch: int) -> dict[str, Any]:
    """The table's settings under `overrides`; a default minibatch is at most the `batch`."""
    merged = {**table.get(algo, {}), **overrides}
    if "minibatch_size" in merged and "minibatch_size" not in overrides:
        merged["minibatch_size"] = min(merged["minibatch_size"], batch)
    return merged


def model(algo: str, overrides: dict[str, Any]) -> dict[str, Any]:
    return {**MODEL[algo], **overrides}
