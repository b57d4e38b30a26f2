"""Settings that a config need not name: RLlib's own defaults suit long runs on Atari. What a config
names wins, key by key.
"""

from __future__ import annotations

from typing import Any

ON_POLICY = ("PPO", "APPO", "IMPALA")
REPLAY = ("SAC", "DQN")
ALGORITHMS = (*ON_POLICY, *REPLAY)
"""Those whose policy can be exported."""

_PPO: dict[str, Any] = {"lr": 1e-3, "lambda_": 0.95, "clip_param": 0.2, "vf_clip_param": 1e6}
"""RLlib clips the squared error of the value at 10: returns above 3 would stop teaching it."""

IMAGINED: dict[str, dict[str, Any]] = {
    "PPO": {
        **_PPO,
        "minibatch_size": 256,
        "num_epochs": 8,
        "entropy_coeff": 0.005,
        "kl_coeff": 0.2,
        "kl_target": 0.03,
    },
    "SAC": {
        "actor_lr": 7e-4,
        "critic_lr": 7e-4,
        "alpha_lr": 7e-4,
        "train_batch_size_per_learner": 256,
        "num_steps_sampled_before_learning_starts": 1024,
    },
    "DQN": {
        "lr": 1e-3,
        "train_batch_size_per_learner": 256,
        "num_steps_sampled_before_learning_starts": 1024,
        "target_network_update_freq": 1024,
    },
}
"""In a world, where steps are cheap and come by hundreds at once."""

REAL: dict[str, dict[str, Any]] = {
    "PPO": {**_PPO, "minibatch_size": 64, "num_epochs": 10, "use_kl_loss": False},
    # Haarnoja et al. (arXiv 1812.05905), one update a step; learning starts early, as short runs
    # need. Batches of 64: RLlib builds an
    # episode object for every sampled transition, and 256 of them cost a tenth of a second an
    # update.
    "SAC": {
        "actor_lr": 1e-3,
        "critic_lr": 1e-3,
        "alpha_lr": 1e-3,
        "train_batch_size_per_learner": 64,
        "training_intensity": 64,
        "num_steps_sampled_before_learning_starts": 256,
    },
    # RL Baselines3 Zoo, CartPole-v1: 128 updates of 64 every 256 steps.
    "DQN": {
        "lr": 2.3e-3,
        "train_batch_size_per_learner": 64,
        "training_intensity": 32,
        "num_steps_sampled_before_learning_starts": 1000,
        "target_network_update_freq": 20,
        "epsilon": [[0, 1.0], [8000, 0.04]],
    },
}
"""In reality, where every step is paid for."""

SHAPE = {"PPO": (4, 256), "APPO": (4, 64), "IMPALA": (4, 64), "SAC": (1, 8), "DQN": (1, 256)}
"""(environments, steps of each between updates) in reality."""

_SMALL = {"fcnet_hiddens": [64, 64], "vf_share_layers": False}
_WIDE = {"fcnet_hiddens": [256, 256], "fcnet_activation": "relu"}
MODEL: dict[str, dict[str, Any]] = {
    "PPO": _SMALL,
    "APPO": _SMALL,
    "IMPALA": _SMALL,
    "SAC": _WIDE,
    "DQN": _WIDE,
}


def params(
    table: dict[str, dict[str, Any]], algo: str, own: dict[str, Any], batch: int
) -> dict[str, Any]:
    """The table's settings under the config's own. A recommended minibatch is no larger than the
    `batch`.
    """
    merged = {**table.get(algo, {}), **own}
    if "minibatch_size" in merged and "minibatch_size" not in own:
        merged["minibatch_size"] = min(merged["minibatch_size"], batch)
    return merged


def model(algo: str, own: dict[str, Any]) -> dict[str, Any]:
    return {**MODEL[algo], **own}
