"""The part that sessions of all kinds of worlds share: the end of an episode and the start of the
next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.model import rng
from mesocosm.serve.protocol import Message, put


class EpisodeSession:
    """One client's B environments in a world."""

    carry: Any
    clock = 0
    """Steps since `begin`"""
    reply: Message
    """Reply to the step before `clock`"""
    stepping = False
    """True during a step of a text world, in which others may use the process."""
    request_digest = b""
    """Digest of the request that `reply` answers; empty right after `begin` and `restore`"""

    def __init__(self, world: Any, members: int, seed: int, first_env: int, batch: int):
        self.world, self.seed = world, seed
        self.env = first_env + np.arange(batch)
        self._members = members

    def member(self, episode: NDArray[np.int64]) -> Tensor:
        """[B] the member that imagines each `episode` [B]."""
        member = rng.member_of(self.seed, self.env, episode, self._members)
        return torch.from_numpy(member).to(self.world.device)

    def starts(
        self, request: Message, episode: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> tuple[Any, Any]:
        """(task, observation) [B] that begin `episode` [B], as the client chose them or drawn.

        Drawn rows outside `mask` [B] are zeros, or empty.
        """
        raise NotImplementedError

    def stepped(self, request: Message, reply: Message, observation: Any) -> Message:
        """Complete the reply to a step, and begin new episodes: for those that end here (SAME_STEP)
        or ended before (NEXT_STEP).

        Args:
            request: The step's request.
            reply: Its outcomes alone, an array [B] each; it is changed in place.
            observation: [B] the observations after the step.
        """
        names = list(reply)
        same_step, mask = request["mode"] == "SameStep", request["cut"]
        if same_step:
            mask = mask | reply["terminated"] | reply["diverged"]
            if "disagreement" in reply:
                mask = mask | (reply["disagreement"] > request["max_disagreement"])
        if mask.any():
            if same_step:
                put(reply, "final", observation)
            else:
                for name in names:
                    reply[name] = np.where(mask, np.zeros(1, reply[name].dtype), reply[name])
            episode = request["episode"] + 1
            task, start = self.starts(request, episode, mask)
            chosen = torch.from_numpy(mask).to(self.world.device)
            self.carry = self.world.reset(self.carry, chosen, task, start, self.member(episode))
            observation = start.where(chosen, observation)
            put(reply, "task", task)
        put(reply, "observation", observation)
        return reply
