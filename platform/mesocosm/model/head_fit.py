"""The fit of the base's reward and termination networks, on single transitions.

Both learn more slowly than the dynamics: the number of steps that the dynamics need is too small
for them. So each has its own training before the network's, with early stopping on held-out
episodes (`fitting`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mesocosm.model import mup
from mesocosm.model.base import Base
from mesocosm.model.fitting import Report, StoppedFit, fit, of_part, silent
from mesocosm.model.heads import RewardHead, TerminationHead, bce, head_inputs, reward_outputs
from mesocosm.model.net import unroll
from mesocosm.model.rng import fitted_by
from mesocosm.model.tensors import Transition, Windows

BATCH = 128
"""Single transitions in a step, and as many events, a third of which are terminal."""
LR = 6e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01


def fit_heads(
    base: Base,
    draw: Callable[[int], Windows],
    held_out: Windows,
    most: int,
    seed: int,
    report: Report = silent,
) -> None:
    """Fit both networks in place, on the CPU; the same input gives the same bits.

    Args:
        base: The base, whose numbers' change may be fitted already.
        draw: Windows of one transition each for a step, with events if the data terminate.
        held_out: The same, of which each member is judged by the episodes that it leaves out.
        most: The most steps of a network.
        seed: Of the first weights.
        report: Called with the progress in words.
    """
    spec, members = base.spec, base.members
    events = held_out.events
    episodes = held_out.episode if events is None else torch.cat((held_out.episode, events.episode))
    without = ~fitted_by(episodes, members).any(1, keepdim=True)
    reward, termination = RewardHead(spec, members, 0), TerminationHead(spec, members, 0)

    def trained(episode: Tensor) -> Tensor:
        return (fitted_by(episode, members) | without).float()

    def rewards(windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        transition, outcome = unroll(windows)
        outputs = base.reward(head_inputs(transition, outcome.observation))
        loss = -reward.log_prob(outputs, None, windows.reward.flatten())
        return loss, windows.mask.flatten().float(), trained(windows.episode)

    def terminations(windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        events = windows.events
        assert events is not None
        single = Transition(events.observation, events.action, events.task)
        outputs = base.termination(head_inputs(single, events.next_observation))
        loss = bce(termination.logit(outputs), events.terminated)
        return loss, events.weight, trained(events.episode)

    if reward_outputs(spec) > 1:
        judged = bool((1 - trained(held_out.episode)).any())
        progress = of_part(report, "reward")
        base.record(
            "reward", _fit(base.reward, rewards, draw, held_out, judged, most, seed, progress)
        )
    if events is not None:
        ends = events.terminated > 0.5
        judged = bool((1 - trained(events.episode[ends])).any())
        progress = of_part(report, "termination")
        result = _fit(base.termination, terminations, draw, held_out, judged, most, seed, progress)
        base.record("termination", result)


def _fit(
    network: nn.Module,
    losses: Callable[[Windows], tuple[Tensor, Tensor, Tensor]],
    draw: Callable[[int], Windows],
    held_out: Windows,
    judged: bool,
    most: int,
    seed: int,
    report: Report,
) -> StoppedFit:
    """Fit `network` by `losses`: losses [K, N], weights [N], and 1 [K, N] where a member trains on
    the transition. `judged`: transitions that matter are held out.
    """
    mup.init_(network, seed)
    network.requires_grad_(True)
    groups = mup.param_groups(network, LR, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)

    def train(step: int) -> Tensor:
        loss, weight, keep = losses(draw(step))
        return (loss * weight * keep).sum() / weight.numel()

    def judge() -> Tensor:
        loss, weight, keep = losses(held_out)
        weight = weight * (1 - keep)
        return (loss * weight).sum() / weight.sum()

    result = fit(optimizer, train, judge if judged else None, most, report)
    network.requires_grad_(False)
    return result
