"""Texts, rewards and terminations drawn from a network, by hashed keys."""

from __future__ import annotations

import torch
from torch import Tensor

from mesocosm.model import density, rng
from mesocosm.model.language.cache import KeyCache
from mesocosm.model.language.net import TextNet
from mesocosm.model.language.tokenizer import TextTokenizer


class Drawn:
    """B texts that are being generated."""

    def __init__(self, state: Tensor, size: int):
        """`state`: [B, d], before the texts. `size`: the most tokens of a text, with its mark."""
        batch, device = len(state), state.device
        self.size = size
        self.tokens = torch.zeros(batch, size, dtype=torch.int64, device=device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.nats = torch.zeros(batch, device=device)
        self.worst = torch.zeros(batch, device=device)
        """[B]: the nats of the least likely token"""
        self.cut = torch.zeros(batch, dtype=torch.bool, device=device)
        """[B]: the mark was not drawn, so `nats` and `worst` leave it out"""
        self.final = torch.zeros_like(state)
        """[B, d]: the states at the marks"""

    def add(self, rows: Tensor, index: int, token: Tensor, nats: Tensor, cut: Tensor) -> None:
        """Append a token to `rows`; where `cut`, the mark that ends a text that is too long."""
        self.tokens[rows, index] = token
        self.count[rows] = index + 1
        self.cut[rows] = cut
        nats = torch.where(cut, 0.0, nats)
        self.nats[rows] += nats
        self.worst[rows] = torch.maximum(self.worst[rows], nats)

    def texts(self) -> list[list[int]]:
        """The tokens of each text, without its mark."""
        counts = self.count.tolist()
        return [row[: n - 1] for row, n in zip(self.tokens.tolist(), counts, strict=True)]


class Sampler:
    """Draws from a network with its tokenizer's marks."""

    def __init__(self, net: TextNet, tokenizer: TextTokenizer):
        self._net, self._tokenizer = net, tokenizer
        vocabulary = torch.arange(net.model.shape.vocabulary)
        barred = vocabulary >= tokenizer.size
        for mark in (tokenizer.bos, tokenizer.eoa):
            barred |= vocabulary == mark
        device = next(net.parameters()).device
        self._barred = torch.zeros(len(barred)).masked_fill_(barred, -torch.inf).to(device)

    def write(
        self,
        drawn: Drawn,
        cache: KeyCache,
        rows: Tensor,
        member: Tensor,
        state: Tensor,
        keys: Tensor,
        temperature: float,
        *,
        task_first: bool = False,
    ) -> None:
        """Write texts into `drawn` and `cache`. Finished rows leave the batch.

        Args:
            drawn: Empty.
            cache: Of R rows.
            rows: [B] int64, the cache's row of each text.
            member: [R] int64, the member of each row of the cache.
            state: [B, d], the states before the texts.
            keys: [B] int64; token i is drawn by slot `rng.OBSERVATION` + i.
            temperature: Divides the logits; 0 takes the most likely token.
            task_first: The texts are a task, the mark of an action and an observation.
        """
        model, eoo, eoa = self._net.model, self._tokenizer.eoo, self._tokenizer.eoa
        active = torch.arange(len(rows), device=rows.device)
        ids = torch.zeros(cache.batch, 1, dtype=torch.int64, device=rows.device)
        in_task = torch.full_like(active, task_first, dtype=torch.bool)
        for index in range(drawn.size):
            logits = self._logits(state)
            if task_first:  # a task ends before its observation can
                before = in_task[active]
                plain = model.logits(state)[:, eoa].float()
                logits[:, eoa] = torch.where(before, plain, -torch.inf)
                logits[before, eoo] = -torch.inf
            if temperature == 0.0:
                token = logits.argmax(-1)
            else:
                u = rng.uniform(keys[active], rng.OBSERVATION + index)
                token = density.categorical(logits / temperature, u)
            if index == drawn.size - 2:  # the last place where a task can end
                token = torch.where(in_task[active], eoa, token)
            cut = (token != eoo) & (index == drawn.size - 1)
            token = torch.where(cut, eoo, token)
            nats = -logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
            drawn.add(active, index, token, nats, cut)
            in_task[active] &= token != eoa
            count = torch.zeros(cache.batch, dtype=torch.int64, device=rows.device)
            count[rows[active]], ids[rows[active], 0] = 1, token
            state = model.feed(cache, ids, count, member)[rows[active], 0]
            ended = token == eoo
            if bool(ended.any()):
                drawn.final[active[ended]] = state[ended]
                active, state = active[~ended], state[~ended]
                if not len(active):
                    break

    def token_nats(self, states: Tensor, ids: Tensor) -> Tensor:
        """[N]: -log p of the tokens of observations [N] by the states [N, d] before them."""
        log_p = self._logits(states).log_softmax(-1)
        return -log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    def outcome(
        self, final: Tensor, member: Tensor, keys: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(reward, p_terminated, terminated) [B] by the states at the marks [B, d].

        At temperature 0 they are the most likely reward (the expected one, if rewards are numbers)
        and whether a termination is likelier than not.
        """
        net, rows = self._net, torch.arange(len(member), device=member.device)
        outputs = net.reward_states(final)[member, rows].unsqueeze(0)
        slots = torch.tensor([rng.REWARD, rng.REWARD_VALUE, rng.TERMINATION], device=keys.device)
        u = rng.uniform(keys.unsqueeze(-1), slots)
        p = torch.sigmoid(net.termination_logits(final)[member, rows])
        if temperature != 0.0:
            reward = net.reward.draw(outputs, None, u[..., :2].unsqueeze(0))
        elif net.reward.categorical:
            reward = net.reward.values(outputs)[outputs.argmax(-1)]
        else:
            reward = net.reward.expected(outputs, None)
        ended = p > 0.5 if temperature == 0.0 else u[..., 2] < p
        return reward.squeeze(0), p, ended

    def _logits(self, states: Tensor) -> Tensor:
        """Logits of an observation's tokens; those that no observation has are minus infinity."""
        return self._net.model.logits(states).float() + self._barred
