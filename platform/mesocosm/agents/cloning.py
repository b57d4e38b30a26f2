"""Behaviour cloning: an agent that chooses as the best logged episodes did. Torch, no Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mesocosm import checks
from mesocosm.config import ADDED, JobConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.envs.config import RealityConfig
from mesocosm.errors import UsageError
from mesocosm.policies.candidates import INFOS, CandidateEpisodes, Candidates, check_spaces
from mesocosm.policies.scorer import SCORER, CandidatePolicy
from mesocosm.policies.stored import StoredPolicy
from mesocosm.runs.tracking import Run

BATCH = 128
"""Logged choices in a batch"""
HIDDEN_IDS = 0.3
"""The share of token ids that are dropped from a batch. Without it a few hundred choices are
memorised: 43% of easy chores are solved instead of 57%, from 900 choices.
"""
REPORT_EVERY = 50
"""Steps between two reports"""
CLONED = "clone"
"""The algorithm's name in the policy"""


@dataclass
class CloneConfig(JobConfig):
    datasets: list[str] = field(default_factory=list)
    """The logs."""
    share: float = 0.2
    """The share of the training split's episodes that is cloned: the episodes with the highest
    returns.
    """
    candidates: str | None = None
    """`module:function`, as in `train-agent`: lists the commands from which the actions of text
    logs were chosen. `infos` is not allowed, because logs hold no infos. None for logs of numbers,
    categories and tables.
    """
    max_candidates: int = 32
    """The most candidates of a step. Further ones are left out."""
    tokenizer: str | None = field(default=None, metadata=ADDED)
    """`tokenizers/ID` of `mesocosm tokenize`: the agent sees images as the codes of this tokenizer,
    as agents in a world do. None if no observation is an image.
    """
    steps: int = 600
    """Updates, each on 128 logged choices."""
    lr: float = 1e-3
    """Adam's learning rate."""
    episodes: int = field(default=0, metadata=ADDED)
    """Real episodes in which the agent is judged, choosing greedily. 0 takes no real step."""
    reality: RealityConfig = field(default_factory=RealityConfig, metadata=ADDED)
    """The environment that judges the agent in `episodes` episodes. Defaults to that of the logs.
    """


@dataclass(frozen=True)
class LoggedChoices:
    """N steps at which a logged action was one of the candidates."""

    rows: Tensor
    """[N, shape.width] float32"""
    chosen: Tensor
    """[N] int64, the candidate's number"""
    episodes: int
    others: int
    """Steps whose action was not a candidate"""


@dataclass(frozen=True)
class Cloned:
    """A clone, before it is stored."""

    policy: StoredPolicy
    weights: dict[str, Tensor]
    """The training state, from which PPO may start (`init`)"""
    metrics: dict[str, float]


def check(config: CloneConfig) -> None:
    """Raise UsageError at the first invalid value. Reads no storage."""
    if not config.datasets:
        raise UsageError("datasets must name at least one dataset, got []; try datasets=[ID]")
    checks.within(config, 0, 1, "share", open="[")
    checks.at_least(config, 2, "max_candidates")
    checks.at_least(config, 1, "steps")
    checks.within(config, 0, math.inf, "lr", open="[]")
    checks.at_least(config, 0, "episodes")
    if config.episodes == 1:
        raise UsageError("episodes must be 0 or >= 2, got 1: an interval needs two")
    if not config.episodes and config.reality != RealityConfig():
        raise UsageError("episodes must be >= 2 with reality, got 0; leave reality out, or set it")
    if config.candidates == INFOS:
        raise UsageError("candidates must be module:function, got infos; logs hold no infos")


def best_episodes(dataset: Dataset, split: Split, share: float) -> NDArray[np.int64]:
    """The indices of the best episodes of a split, highest return first.

    Args:
        dataset: The logs.
        split: `train` or `valid`.
        share: The share of its episodes, rounded up; of equal returns the earlier ones.
    """
    numbers = dataset.episodes(split)
    returns = dataset.table["total_reward"][numbers]
    return numbers[np.argsort(-returns, kind="stable")][: math.ceil(share * len(numbers))]


def logged_choices(
    dataset: Dataset, candidates: Candidates, split: Split, share: float
) -> LoggedChoices:
    """The choices of the best episodes of a split.

    Args:
        dataset: A dataset with text observations and actions.
        candidates: Lists the commands.
        split: `train` or `valid`.
        share: As in `best_episodes`.

    Raises:
        UsageError: The spaces are not texts.
    """
    check_spaces(dataset.observation_space, dataset.action_space, "candidates")
    space: Any = dataset.action_space
    best = best_episodes(dataset, split, share)
    rows: list[NDArray[np.float32]] = []
    chosen: list[int] = []
    others = 0
    for number in best.tolist():
        episode = dataset.episode(number)
        memory = CandidateEpisodes(candidates.source, candidates.shape, space, 1)
        for text, command in zip(episode.observations, episode.actions, strict=False):
            row = memory.observe([text])[0]
            if command in memory.commands[0]:
                rows.append(row)
                chosen.append(memory.number_of(0, command))
            else:
                others += 1
            memory.note(0, command)
    width = candidates.shape.width
    stacked = np.stack(rows) if rows else np.zeros((0, width), np.float32)
    return LoggedChoices(torch.from_numpy(stacked), torch.tensor(chosen), len(best), others)


def fit(
    network: torch.nn.Module, loss: Callable[[], Tensor], config: CloneConfig, run: Run
) -> None:
    """Take `config.steps` steps of Adam down the loss of a batch, which `loss` draws."""
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    with run.progress("clone", config.steps) as update:
        for step in range(1, config.steps + 1):
            value = loss()
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % REPORT_EVERY == 0 or step == config.steps:
                run.log({"clone/loss": value.item()}, step=step)
                update(step, f"loss {value.item():.3f}")


def clone(config: CloneConfig, dataset: Dataset, candidates: Candidates, run: Run) -> Cloned:
    """Train a scorer on the choices of the best episodes.

    Args:
        config: The settings.
        dataset: The logs.
        candidates: Lists the commands.
        run: Receives the progress.

    Returns:
        The clone. Its metrics: `episodes`, `choices` and `others` (`LoggedChoices`), `accuracy` and
        `valid_accuracy`, the shares of choices that it makes too, in the cloned and in the best
        held-out episodes.

    Raises:
        UsageError: No logged action is a candidate.
    """
    data = logged_choices(dataset, candidates, "train", config.share)
    if not len(data.rows):
        raise UsageError(
            f"candidates={candidates.source.name} lists none of the {data.others} actions of the"
            f" best episodes of datasets={config.datasets}; give the environment's own function"
        )
    if data.others:
        run.say(
            f"{data.others} of {data.others + len(data.rows)} logged actions are not among the"
            " candidates and are left out"
        )
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        spaces: tuple[Any, Any] = dataset.observation_space, dataset.action_space
        policy = CandidatePolicy(CLONED, *spaces, candidates.source, candidates.shape)
    network = policy.network

    def loss() -> Tensor:
        batch = torch.randint(len(data.rows), (BATCH,), generator=generator)
        rows = data.rows[batch]  # a copy
        shown = torch.rand(BATCH, candidates.shape.ids, generator=generator) >= HIDDEN_IDS
        rows[:, : candidates.shape.ids] *= shown
        return functional.cross_entropy(network(rows)[0], data.chosen[batch])

    fit(network, loss, config, run)
    held_out = logged_choices(dataset, candidates, "valid", config.share)
    metrics = {
        "episodes": float(data.episodes),
        "choices": float(len(data.rows)),
        "others": float(data.others),
        "accuracy": _accuracy(policy, data),
    }
    if len(held_out.rows):
        metrics["valid_accuracy"] = _accuracy(policy, held_out)
    state = network.state_dict().items()
    weights = {f"{SCORER}.{name}": tensor.detach().contiguous() for name, tensor in state}
    return Cloned(policy, weights, metrics)


@torch.no_grad()
def _accuracy(policy: CandidatePolicy, data: LoggedChoices) -> float:
    batches = zip(data.rows.split(1024), data.chosen.split(1024), strict=True)
    right = [
        (policy.network(rows)[0].argmax(-1) == chosen).sum().item() for rows, chosen in batches
    ]
    return float(sum(right) / len(data.rows))
