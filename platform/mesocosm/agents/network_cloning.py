"""Behaviour cloning of numbers, categories, tables and images: PPO's own network, fitted to the
actions of the best logged episodes. It needs RLlib's module and starts no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from ray.rllib.core.columns import Columns
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional

from mesocosm.agents import settings
from mesocosm.agents.cloning import BATCH, CLONED, CloneConfig, Cloned, best_episodes, fit
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.encoders import seen_spaces
from mesocosm.agents.learner_access import copied_weights
from mesocosm.agents.rllib import check_agent, export_module
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.masks import has_mask
from mesocosm.datasets.split import Split
from mesocosm.policies.heads import ActionMap, flatten_batch, stack
from mesocosm.policies.images import ImageEncoder
from mesocosm.runs.tracking import Run

Rows = tuple[Tensor, Tensor]
"""Flat observations [N, width] float32, and head actions [N] or [N, n] (`heads.ActionMap`)"""


def logged_rows(
    dataset: Dataset, actions: ActionMap, split: Split, share: float, encoder: ImageEncoder | None
) -> Rows:
    """The steps of the best episodes of a split.

    Args:
        dataset: The logs, with at least one episode in the split.
        actions: The map between the dataset's actions and those of a network.
        split: `train` or `valid`.
        share: As in `cloning.best_episodes`.
        encoder: How the network sees images.
    """
    spaces: tuple[Space[Any], Space[Any]] = dataset.observation_space, dataset.action_space
    seen = seen_spaces(spaces, encoder)[0]
    rows, taken = list[Any](), list[Any]()
    for number in best_episodes(dataset, split, share).tolist():
        episode = dataset.episode(number)
        batch = stack(spaces[0], episode.observations[: len(episode.actions)])
        rows.append(flatten_batch(seen, batch if encoder is None else encoder.of_episode(batch)))
        taken += episode.actions
    chosen = np.ascontiguousarray(actions.to_head(stack(spaces[1], taken)))
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(chosen)


def clone_network(
    config: CloneConfig, dataset: Dataset, encoder: ImageEncoder | None, run: Run
) -> Cloned:
    """Fit PPO's network, as `train-agent` makes it by default, to the best episodes.

    The loss is the negative log likelihood of the logged actions under the policy's distribution.
    The value function is not trained.

    Args:
        config: The settings; `candidates` is None.
        dataset: Logs whose spaces an agent of `train-agent` takes.
        encoder: How the network sees images.
        run: Receives the progress.

    Returns:
        The clone. Its metrics: `episodes`, `choices` (steps), `loss` and `valid_loss`, the mean
        nats of an action in the cloned and in the best held-out episodes, and for discrete actions
        `accuracy` and `valid_accuracy`, the shares of steps whose whole action is the likeliest.

    Raises:
        UsageError: An agent cannot use the spaces.
    """
    spaces = seen_spaces((dataset.observation_space, dataset.action_space), encoder)
    setup = replace(settings.imagined(AgentConfig()), spaces=spaces)
    actions = ActionMap(spaces[1], has_mask(spaces[0]))
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        module = check_agent(setup, spaces)
    rows, chosen = logged_rows(dataset, actions, "train", config.share, encoder)
    generator = torch.Generator().manual_seed(config.seed)

    def loss() -> Tensor:
        batch = torch.randint(len(rows), (BATCH,), generator=generator)
        return _nats(_outputs(module, rows[batch]), chosen[batch], actions)

    fit(module, loss, config, run)
    metrics = {"episodes": float(len(best_episodes(dataset, "train", config.share)))}
    metrics |= {"choices": float(len(rows))} | _measured(module, (rows, chosen), actions, "")
    if len(dataset.episodes("valid")):
        held_out = logged_rows(dataset, actions, "valid", config.share, encoder)
        metrics |= _measured(module, held_out, actions, "valid_")
    policy = export_module(CLONED, module, spaces, encoder)
    return Cloned(policy, copied_weights(module), metrics)


def _outputs(module: Any, rows: Tensor) -> Tensor:
    """The parameters of the policy's distribution."""
    outputs: Tensor = module.forward_train({Columns.OBS: rows})[Columns.ACTION_DIST_INPUTS]
    return outputs


def _nats(outputs: Tensor, chosen: Tensor, actions: ActionMap) -> Tensor:
    """The mean negative log likelihood of head actions."""
    if actions.counts is None:
        mean, log_std = outputs.chunk(2, -1)
        return -Normal(mean, log_std.exp()).log_prob(chosen).sum(-1).mean()  # type: ignore[no-untyped-call]
    pairs = _components(outputs, chosen, actions.counts)
    return torch.stack([functional.cross_entropy(part, value) for part, value in pairs]).sum()


def _components(
    outputs: Tensor, chosen: Tensor, counts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits [N, count], choices [N]) of each component of discrete actions."""
    choices = chosen.reshape(len(chosen), -1).unbind(-1)
    return zip(outputs.split(list(counts), -1), choices, strict=True)


@torch.no_grad()
def _measured(module: Any, data: Rows, actions: ActionMap, prefix: str) -> dict[str, float]:
    rows, chosen = data
    outputs = _outputs(module, rows)
    metrics = {f"{prefix}loss": float(_nats(outputs, chosen, actions))}
    if actions.counts is not None:
        parts = _components(outputs, chosen, actions.counts)
        hits = torch.stack([part.argmax(-1) == value for part, value in parts]).all(0)
        metrics[f"{prefix}accuracy"] = float(hits.float().mean())
    return metrics
