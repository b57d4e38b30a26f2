"""An exported world (network, frozen base, spec, codec), and how a vector of environments steps in
it.

State is an explicit `Carry`. Its cache is a pure function of its `Context`, a bounded list of
steps: a world that lost a session continues from the context with the same bits (given the same
device type, threads and batch shape). Columns of the cache are steps of the whole vector. When all
W are full, the cache is recomputed from the tokens of the last W // 2, in one pass, at the first
columns, so that nothing of an evicted step survives in deeper layers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mesocosm.model import rng
from mesocosm.model.artifact import WORLD, described
from mesocosm.model.base import Base
from mesocosm.model.carry import Carry, Context, Prediction, StepOut
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.groups import MemberGroups
from mesocosm.model.known import Known
from mesocosm.model.layers import Constant, read
from mesocosm.model.net import BaseOut, WindowLosses, WorldNet, apply_base
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.tensors import Outcome, Parts, Transition, Windows

SCHEMA = 4


class World:
    """A world model in float32, without gradients, for one thread at a time."""

    def __init__(self, net: WorldNet, base: Base, codec: dict[str, Any] | None = None):
        """`codec`: opaque JSON that describes how raw spaces become parts."""
        self.net: WorldNet = net.float().eval().requires_grad_(False)
        self.base = base.eval()
        self.spec: Spec = net.spec
        self.config: ModelConfig = net.config
        self.codec = codec or {}
        self.disagreement_scale = 1.0
        """The `net.spread` that counts as a disagreement of 1 (`train.export` measures it)."""
        self.known: Known | None = None
        """Functions that replace the learned reward or termination in `step` and `predict`."""
        self._task_grid = _Grid(self.spec.task)
        self._observation_grid = _Grid(self.spec.observation)
        self._head_slots = Constant(torch.tensor([rng.REWARD, rng.REWARD_VALUE, rng.TERMINATION]))

    @property
    def device(self) -> torch.device:
        return self.base.residual_scale.device

    def to(self, device: torch.device | str) -> World:
        """Move the weights to `device`, and return self."""
        self.net.to(device)
        self.base.to(device)
        return self

    @torch.inference_mode()
    def sample_start(self, keys: Tensor) -> tuple[Parts, Parts]:
        """Draw (task, o_0) for each of `keys` [B] int64 (`rng.keys`)."""
        task, observation = self.base.start.draw(keys)
        return self._task_grid(task), self._observation_grid(observation)

    @torch.inference_mode()
    def begin(self, task: Parts, observation: Parts, member: Tensor) -> Carry:
        """A session of B environments at the start of their episodes; `member` [B] int64 imagines
        each (`rng.member_of`).
        """
        batch, columns, device = len(member), self.net.memory, member.device
        return Carry(
            clock=0,
            past_observation=Parts.empty(self.spec.observation, batch, columns, device=device),
            past_action=Parts.empty(self.spec.action, batch, columns, device=device),
            start_column=torch.zeros(batch, dtype=torch.int64, device=device),
            observation=observation,
            task=task,
            member=member,
            groups=MemberGroups(member, self.config.members),
            position=0,
            cache=self.net.new_cache(batch),
        )

    @torch.inference_mode()
    def step(
        self, carry: Carry, action: Parts, keys: Tensor, *, disagreement: bool = True
    ) -> tuple[Carry, StepOut]:
        """One step of B environments, each by its own member alone.

        A terminated environment continues until `reset`.

        Args:
            keys: [B] int64 from `rng.keys(seed, env, episode, step)`.
            disagreement: Also ask all members what they expect, for `StepOut.disagreement`. It
                takes more time and changes nothing else.
        """
        spec, groups = self.spec, carry.groups
        if self.net.memory:
            carry = self._rebuilt(carry) if carry.position == self.net.memory else carry
            _write(carry.past_observation, carry.position, carry.observation)
            _write(carry.past_action, carry.position, action)
        token = Transition(carry.observation, action, carry.task)
        features = self.net.advance(carry.cache, carry.position, carry.start_column, token)
        grouped, grouped_keys = groups.split_transition(token), groups.split(keys)
        grouped_features = None if features is None else groups.split(features)
        base = BaseOut(self.base.of_groups(grouped), self.base.residual_scale, self.base.widening)
        drawn = self.net.draw(grouped_features, grouped, base, grouped_keys)
        following = self._observation_grid(drawn.observation)
        inputs = read(grouped.observation, grouped.action, grouped.task, following)
        u = rng.uniform(grouped_keys.unsqueeze(-1), self._head_slots(grouped_keys))
        grouped_reward = self.net.reward.draw(
            self.base.reward(inputs), grouped_features, u[..., :2]
        )
        logit = self.net.termination.logit(self.base.termination(inputs), grouped_features)
        grouped_p = torch.sigmoid(logit)
        reward, p, ended, duration = map(
            groups.join, (grouped_reward, grouped_p, u[..., 2] < grouped_p, drawn.duration)
        )
        observation = groups.join_parts(following)
        if self.known is not None:
            known_reward, known_end = self.known.outcomes(token, observation)
            reward = reward if known_reward is None else known_reward
            if known_end is not None:
                p, ended = known_end.float(), known_end
        if spec.durations:
            duration = spec.seconds(duration)
        finite = torch.isfinite(observation.numbers.sum(-1) + reward + duration)
        apart = None
        if disagreement:
            outcome = Outcome(observation, groups.join(drawn.duration))
            apart = torch.where(finite, self._disagreement(features, token, outcome), 0.0)
        observation = observation.where(finite, carry.observation)
        reward, p, duration = (torch.where(finite, x, 0.0) for x in (reward, p, duration))
        position = carry.position + 1 if self.net.memory else 0
        carry = replace(carry, clock=carry.clock + 1, position=position, observation=observation)
        return carry, StepOut(observation, reward, ended & finite, p, duration, apart, ~finite)

    def _disagreement(self, features: Tensor | None, token: Transition, outcome: Outcome) -> Tensor:
        """[B] float32, on the world's scale; the largest float where a member's is not finite."""
        change = self.base(token.observation, token.action, token.task)
        base = BaseOut(change, self.base.residual_scale, self.base.widening)
        apart = self.net.disagreement(features, token, outcome, base) / self.disagreement_scale
        most = torch.finfo(apart.dtype).max
        return apart.nan_to_num(nan=most, posinf=most)

    def predict(
        self,
        observation: Parts,
        action: Parts,
        task: Parts,
        groups: MemberGroups,
        *,
        disagreement: bool = False,
    ) -> Prediction:
        """The expected next step, differentiable with respect to the numbers of all arguments.

        Args:
            observation: [B, ...], normalised.
            action: [B, ...], normalised.
            task: [B, ...], normalised.
            groups: The groups of the members [B] that predict.
            disagreement: Also ask all members what they expect, which takes more time.

        Raises:
            ValueError: The world has history, or predicts categories.
        """
        spec = self.spec
        if self.net.memory or spec.observation.categories:
            raise ValueError(
                "predict needs a world without history that observes numbers only (model.family="
                f"ensemble), got family {self.config.family!r} with"
                f" {len(spec.observation.categories)} categories"
            )
        token = Transition(observation, action, task)
        grouped = groups.split_transition(token)
        base = BaseOut(self.base.of_groups(grouped), self.base.residual_scale, self.base.widening)
        expected = self.net.expected(None, grouped, base)
        following = expected.observation
        inputs = read(grouped.observation, grouped.action, grouped.task, following)
        reward = groups.join(self.net.reward.expected(self.base.reward(inputs), None))
        p = groups.join(torch.sigmoid(self.net.termination.logit(self.base.termination(inputs))))
        duration = groups.join(expected.duration)
        if spec.durations:
            duration = spec.seconds(duration).clamp(min=0.0)
        following, apart = groups.join_parts(following), None
        if self.known is not None:
            known_reward, known_end = self.known.outcomes(token, following)
            reward = reward if known_reward is None else known_reward
            p = p if known_end is None else known_end.float()
        if disagreement:
            apart = self._disagreement(None, token, Outcome(following, duration))
        return Prediction(following.numbers, reward, p, duration, apart)

    @torch.inference_mode()
    def reset(
        self, carry: Carry, mask: Tensor, task: Parts, observation: Parts, member: Tensor
    ) -> Carry:
        """New episodes for the environments where `mask` [B] bool is true; the other rows of the
        arguments are ignored.
        """
        member = torch.where(mask, member, carry.member)
        return replace(
            carry,
            start_column=torch.where(mask, carry.position, carry.start_column),
            task=task.where(mask, carry.task),
            observation=observation.where(mask, carry.observation),
            member=member,
            groups=MemberGroups(member, self.config.members),
        )

    @torch.inference_mode()
    def restore(self, context: Context) -> Carry:
        """The carry of this context: its future steps have the same bits. Raises ValueError if the
        context's columns do not fit its clock.
        """
        device = self.device
        task, observation = context.task.to(device), context.observation.to(device)
        carry = replace(
            self.begin(task, observation, context.member.to(device)),
            clock=context.clock,
            start_column=context.start_column.to(device),
        )
        rebuilt, columns = self._columns(context.clock)
        actual = context.past_observation.numbers.shape[1]
        if actual != columns:
            raise ValueError(
                f"context must have {columns} columns at clock {context.clock} (a window of"
                f" {self.net.memory} steps), got {actual}"
            )
        _write(carry.past_observation, slice(0, columns), context.past_observation.to(device))
        _write(carry.past_action, slice(0, columns), context.past_action.to(device))
        if rebuilt:
            tokens = self._tokens(carry, slice(0, rebuilt))
            self.net.rebuild(carry.cache, carry.start_column, tokens)
        for column in range(rebuilt, columns):
            past = carry.past_observation[:, column], carry.past_action[:, column]
            self.net.advance(carry.cache, column, carry.start_column, Transition(*past, task))
        return replace(carry, position=columns)

    @torch.inference_mode()
    def copy_rows(self, carry: Carry, rows: Tensor, member: Tensor) -> Carry:
        """A carry of N copies of the environments of another one, which stays as it is.

        Args:
            carry: The carry of B environments.
            rows: [N] int64 in 0 .. B-1, the environment that each row copies.
            member: [N] int64, the member that imagines each row from here on.
        """
        cache = carry.cache  # [layers, 2, W, B, ...]
        return replace(
            carry,
            past_observation=carry.past_observation[rows],
            past_action=carry.past_action[rows],
            start_column=carry.start_column[rows],
            observation=carry.observation[rows],
            task=carry.task[rows],
            member=member,
            groups=MemberGroups(member, self.config.members),
            cache=None if cache is None else cache.index_select(3, rows),
        )

    def _columns(self, clock: int) -> tuple[int, int]:
        """The number of columns that the last rebuild filled, and the number filled now, at a
        clock.
        """
        window = self.net.memory
        if clock <= window or not window:
            return 0, min(clock, window)
        keep = window // 2
        return keep, keep + (clock - window - 1) % (window - keep) + 1

    def _tokens(self, carry: Carry, columns: slice) -> Transition:
        """Tokens of past columns, each with its environment's present task: columns of another task
        belong to an episode that nothing attends to.
        """
        observation = carry.past_observation[:, columns]
        task = carry.task.repeat(observation.numbers.shape[1])
        return Transition(observation, carry.past_action[:, columns], task)

    def _rebuilt(self, carry: Carry) -> Carry:
        """Move the last W // 2 columns to the front and recompute the cache from them."""
        keep = self.net.memory // 2
        evicted = self.net.memory - keep
        carry = replace(
            carry,
            position=keep,
            cache=self.net.new_cache(len(carry.member)),
            past_observation=carry.past_observation.roll(-evicted),
            past_action=carry.past_action.roll(-evicted),
            start_column=(carry.start_column - evicted).clamp(min=0),
        )
        if keep:
            tokens = self._tokens(carry, slice(0, keep))
            self.net.rebuild(carry.cache, carry.start_column, tokens)
        return carry

    @torch.no_grad()
    def losses(self, windows: Windows) -> WindowLosses:
        """Nats by part on windows, see `net.WindowLosses`."""
        losses: WindowLosses = self.net(windows, apply_base(self.base, windows))
        return losses

    def save(self, folder: Path) -> None:
        """Write world.json, codec.json, model.safetensors and base.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": SCHEMA,
            "spec": self.spec.to_json(),
            "config": self.config.to_json(),
            "disagreement_scale": self.disagreement_scale,
        }
        if self.known is not None:
            about["known"] = self.known.to_json()
        (folder / WORLD).write_text(json.dumps(about, indent=1))
        (folder / "codec.json").write_text(json.dumps(self.codec))
        for name, module in (("model", self.net), ("base", self.base)):
            state = {key: value.contiguous() for key, value in module.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu") -> World:
        """Load a world, and import its known functions.

        Raises:
            ArtifactError: A file is missing, the schema is another, the weights do not fit the
                spec, or a known function has changed.
            UsageError: A known function cannot be imported.
        """
        with described(folder, SCHEMA) as about:
            spec, config = Spec.from_json(about["spec"]), ModelConfig.from_json(about["config"])
            net, base = build(spec, config), Base(spec, config)
            net.load_state_dict(load_file(folder / "model.safetensors"))
            base.load_state_dict(load_file(folder / "base.safetensors"))
            world = World(net, base, json.loads((folder / "codec.json").read_text()))
            world.disagreement_scale = float(about["disagreement_scale"])
            if "known" in about:
                world.known = Known.from_json(about["known"], folder.name)
            world = world.to(device)
        return world


class _Grid:
    """Rounds drawn integers to the values that an agent sees, so that the world continues from
    those.
    """

    def __init__(self, part: PartSpec):
        self._columns = [i for i, zero in enumerate(part.grid) if zero is not None]
        self._zeros = Constant(torch.tensor([zero for zero in part.grid if zero is not None]))
        self._bins = Constant(torch.tensor([part.bins[i] for i in self._columns]))

    def __call__(self, parts: Parts) -> Parts:
        if not self._columns:
            return parts
        numbers = parts.numbers.clone()
        zeros, bins = self._zeros(numbers), self._bins(numbers)
        steps = torch.round((numbers[..., self._columns] - zeros) / bins)
        numbers[..., self._columns] = zeros + steps * bins
        return Parts(numbers, parts.categories)


def _write(past: Parts, column: int | slice, value: Parts) -> None:
    past.numbers[:, column], past.categories[:, column] = value.numbers, value.categories
