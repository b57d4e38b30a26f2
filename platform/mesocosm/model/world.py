"""An exported world: network, frozen base, spec and codec, and how a vector of environments steps
in it.

State is an explicit `Carry`. Its cache is a pure function of its `Context`, a bounded list of
steps, so that a world which lost a session goes on from the context with the same bits (same device
type, threads and batch shape). Columns of the cache are steps of the whole vector. When all W are
full, the cache is computed anew from the tokens of the last W // 2, in one pass, at the first
columns; so nothing of an evicted step lives on in deeper layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mesocosm.errors import ArtifactError
from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.heads import inputs
from mesocosm.model.layers import Constant
from mesocosm.model.net import BaseOut, Cache, Losses, Transition, WorldNet, apply_base, build
from mesocosm.model.spec import Parts, PartSpec, Spec, Windows

SCHEMA = 2


@dataclass(frozen=True)
class Context:
    """All that the future of a session depends on, beside its keys: pure data, float32 and int64,
    on the CPU or the world's device.
    """

    clock: int
    """Steps of the session so far."""
    past_observation: Parts
    """[B, C, ...]: o_t of the steps in columns 0 .. C-1 of the present window (C = 0 without
    history)
    """
    past_action: Parts
    """[B, C, ...]"""
    start_column: Tensor
    """[B] int64: where each environment's present episode begins"""
    observation: Parts
    """[B, ...] where each environment is"""
    task: Parts
    """[B, ...]"""
    member: Tensor
    """[B] int64"""

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Flat arrays for a wire without pickle."""
        arrays: dict[str, NDArray[Any]] = {"clock": np.asarray(self.clock, dtype=np.int64)}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Parts):
                arrays[f"{f.name}.numbers"], arrays[f"{f.name}.categories"] = (
                    value.numbers.cpu().numpy(),
                    value.categories.cpu().numpy(),
                )
            elif isinstance(value, Tensor):
                arrays[f.name] = value.cpu().numpy()
        return arrays

    @staticmethod
    def from_numpy(arrays: Mapping[str, NDArray[Any]]) -> Context:
        """The inverse of `to_numpy`. Raises ValueError naming a missing or ill-typed array."""

        def tensor(name: str, dtype: type) -> Tensor:
            if name not in arrays or arrays[name].dtype != dtype:
                found = arrays[name].dtype if name in arrays else "nothing"
                raise ValueError(f"context array {name!r} must be {np.dtype(dtype)}, found {found}")
            return torch.from_numpy(np.array(arrays[name]))

        def parts(name: str) -> Parts:
            return Parts(
                tensor(f"{name}.numbers", np.float32), tensor(f"{name}.categories", np.int64)
            )

        return Context(
            clock=int(tensor("clock", np.int64)),
            start_column=tensor("start_column", np.int64),
            member=tensor("member", np.int64),
            **{
                name: parts(name)
                for name in ("past_observation", "past_action", "observation", "task")
            },
        )


@dataclass(frozen=True)
class Carry:
    """The state of B environments between steps. `World.step` consumes it: the cache and the tokens
    are written in place.
    """

    clock: int
    position: int
    """The column that the next step writes; W: the cache is rebuilt first."""
    cache: Cache | None
    past_observation: Parts
    """[B, W, ...] of which `position` columns are written"""
    past_action: Parts
    start_column: Tensor
    observation: Parts
    task: Parts
    member: Tensor

    @property
    def context(self) -> Context:
        """A copy that later steps do not touch."""

        def copy(parts: Parts) -> Parts:
            return Parts(parts.numbers.clone(), parts.categories.clone())

        past = slice(0, self.position)
        return Context(
            clock=self.clock,
            past_observation=copy(self.past_observation[:, past]),
            past_action=copy(self.past_action[:, past]),
            start_column=self.start_column.clone(),
            observation=copy(self.observation),
            task=copy(self.task),
            member=self.member.clone(),
        )


@dataclass(frozen=True)
class StepOut:
    """What a step gave to each of B environments."""

    observation: Parts
    """[B, ...] o_{t+1}, normalised"""
    reward: Tensor
    """[B] float32, raw units"""
    terminated: Tensor
    """[B] bool, drawn with probability `p_terminated`"""
    p_terminated: Tensor
    """[B] float32"""
    duration: Tensor
    """[B] float32, raw units; zeros without durations"""
    disagreement: Tensor
    """[B] float32: how far the members' expectations are apart (`net.spread`), 1 being what a tenth
    of held-out transitions exceed; 0 for one member
    """
    diverged: Tensor
    """[B] bool: what was drawn was not finite, as unstable dynamics come to be far from the data.
    The environment stays where it was, with no reward and not terminated; its episode should be cut
    there.
    """


class World:
    """See the module. Float32, without gradients; one thread at a time."""

    def __init__(self, net: WorldNet, base: Base, codec: dict[str, Any] | None = None):
        """`codec`: opaque JSON that says how raw spaces become parts."""
        self.net = net.float().eval().requires_grad_(False)
        self.base = base.eval()
        self.spec: Spec = net.spec
        self.config: ModelConfig = net.config
        self.codec = codec or {}
        self.disagreement_scale = 1.0
        """`net.spread` that counts as a disagreement of 1 (pretrain/export.py measures it)."""
        self._task_grid, self._observation_grid = (
            _Grid(self.spec.task),
            _Grid(self.spec.observation),
        )
        self._head_slots = Constant(torch.tensor([rng.REWARD, rng.REWARD_VALUE, rng.TERMINATION]))

    @property
    def device(self) -> torch.device:
        return self.base.residual_scale.device

    def to(self, device: torch.device | str) -> World:
        self.net.to(device)
        self.base.to(device)
        return self

    # -- stepping
    # ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample_start(self, keys: Tensor) -> tuple[Parts, Parts]:
        """(task, o_0) for each of `keys` [B] int64 (`rng.keys`): draws from the task distribution."""
        task, observation = self.net.start.draw(keys)
        return self._task_grid(task), self._observation_grid(observation)

    @torch.inference_mode()
    def begin(self, task: Parts, observation: Parts, member: Tensor) -> Carry:
        """A session of B environments at the start of their episodes; `member` [B] int64 imagines
        each (`rng.member_of`).
        """
        batch, device = len(member), member.device
        columns = self.net.memory
        return Carry(
            clock=0,
            position=0,
            cache=self.net.new_cache(batch),
            past_observation=Parts.empty(self.spec.observation, batch, columns, device=device),
            past_action=Parts.empty(self.spec.action, batch, columns, device=device),
            start_column=torch.zeros(batch, dtype=torch.int64, device=device),
            observation=observation,
            task=task,
            member=member,
        )

    @torch.inference_mode()
    def step(self, carry: Carry, action: Parts, keys: Tensor) -> tuple[Carry, StepOut]:
        """One step of B environments; keys [B] int64 by `rng.keys(seed, env, episode, step)`. A
        terminated environment steps on until `reset`.
        """
        if self.net.memory:
            carry = self._rebuilt(carry) if carry.position == self.net.memory else carry
            _write(carry.past_observation, carry.position, carry.observation)
            _write(carry.past_action, carry.position, action)
        token = Transition(carry.observation, action, carry.task)
        features = self.net.advance(carry.cache, carry.position, carry.start_column, token)
        base = BaseOut(self.base(carry.observation, action, carry.task), self.base.residual_scale)
        draw = self.net.draw(features, token, base, carry.member, keys)
        following = self._observation_grid(draw.observation)
        parts = inputs(carry.observation, action, carry.task, following)
        u = rng.uniform(keys.unsqueeze(1), self._head_slots(keys))
        reward = self.net.reward.draw(parts, features, carry.member, u[:, :2])
        p_terminated, terminated = self.net.termination.draw(parts, features, carry.member, u[:, 2])
        duration = (
            draw.duration * self.spec.duration_scale + self.spec.duration_mean
            if self.spec.durations
            else draw.duration
        )
        finite = torch.isfinite(following.numbers.sum(-1) + reward + duration + draw.disagreement)
        observation = following.where(finite, carry.observation)
        reward, p_terminated, duration, disagreement = (
            torch.where(finite, x, 0.0)
            for x in (reward, p_terminated, duration, draw.disagreement / self.disagreement_scale)
        )
        position = carry.position + 1 if self.net.memory else 0
        carry = replace(carry, clock=carry.clock + 1, position=position, observation=observation)
        return carry, StepOut(
            observation, reward, terminated & finite, p_terminated, duration, disagreement, ~finite
        )

    @torch.inference_mode()
    def reset(
        self, carry: Carry, mask: Tensor, task: Parts, observation: Parts, member: Tensor
    ) -> Carry:
        """New episodes for the environments where `mask` [B] bool is true; the others' rows of the
        arguments are not read.
        """
        return replace(
            carry,
            start_column=torch.where(mask, carry.position, carry.start_column),
            task=task.where(mask, carry.task),
            observation=observation.where(mask, carry.observation),
            member=torch.where(mask, member, carry.member),
        )

    @torch.inference_mode()
    def restore(self, context: Context) -> Carry:
        """The carry whose context this is: its future steps have the same bits. Raises ValueError
        if the context's columns do not fit its clock.
        """
        device = self.device
        task, observation, member = (
            context.task.to(device),
            context.observation.to(device),
            context.member.to(device),
        )
        carry = replace(
            self.begin(task, observation, member),
            clock=context.clock,
            start_column=context.start_column.to(device),
        )
        rebuilt, columns = self._columns(context.clock)
        if context.past_observation.numbers.shape[1] != columns:
            found = context.past_observation.numbers.shape[1]
            raise ValueError(
                f"context of {found} columns at clock {context.clock}: a window of"
                f" {self.net.memory} steps has {columns} there"
            )
        for column in range(columns):
            _write(carry.past_observation, column, context.past_observation[:, column].to(device))
            _write(carry.past_action, column, context.past_action[:, column].to(device))
        if rebuilt:
            self.net.rebuild(
                carry.cache, carry.start_column, self._tokens(carry, slice(0, rebuilt))
            )
        for column in range(rebuilt, columns):
            token = Transition(
                carry.past_observation[:, column], carry.past_action[:, column], task
            )
            self.net.advance(carry.cache, column, carry.start_column, token)
        return replace(carry, position=columns)

    def _columns(self, clock: int) -> tuple[int, int]:
        """At a clock: how many columns the last rebuild filled, and how many are filled now."""
        window = self.net.memory
        if clock <= window or not window:
            return 0, min(clock, window)
        keep = window // 2
        return keep, keep + (clock - window - 1) % (window - keep) + 1

    def _tokens(self, carry: Carry, columns: slice) -> Transition:
        """Tokens of past columns, each with its environment's present task: columns of another task
        are of an episode that nobody sees.
        """
        observation = carry.past_observation[:, columns]
        steps = observation.numbers.shape[1]
        task = Parts(
            carry.task.numbers.unsqueeze(1).expand(-1, steps, -1),
            carry.task.categories.unsqueeze(1).expand(-1, steps, -1),
        )
        return Transition(observation, carry.past_action[:, columns], task)

    def _rebuilt(self, carry: Carry) -> Carry:
        window = self.net.memory
        keep = window // 2
        kept = self._tokens(carry, slice(window - keep, window))
        start_column = (carry.start_column - (window - keep)).clamp(min=0)
        fresh = replace(
            carry,
            position=keep,
            cache=self.net.new_cache(len(carry.member)),
            past_observation=Parts.empty(
                self.spec.observation, len(carry.member), window, device=carry.member.device
            ),
            past_action=Parts.empty(
                self.spec.action, len(carry.member), window, device=carry.member.device
            ),
            start_column=start_column,
        )
        if keep:
            _write(fresh.past_observation, slice(0, keep), kept.observation)
            _write(fresh.past_action, slice(0, keep), kept.action)
            self.net.rebuild(fresh.cache, start_column, self._tokens(fresh, slice(0, keep)))
        return fresh

    # -- likelihood
    # --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def losses(self, windows: Windows) -> Losses:
        """Nats by part on windows, see `net.Losses`."""
        losses: Losses = self.net(windows, apply_base(self.base, windows))
        return losses

    # -- files
    # -------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """world.json, codec.json, model.safetensors, base.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": SCHEMA,
            "spec": self.spec.to_json(),
            "config": asdict(self.config),
            "disagreement_scale": self.disagreement_scale,
        }
        (folder / "world.json").write_text(json.dumps(about, indent=1))
        (folder / "codec.json").write_text(json.dumps(self.codec))
        save_file(
            {name: value.contiguous() for name, value in self.net.state_dict().items()},
            folder / "model.safetensors",
        )
        save_file(
            {name: value.contiguous() for name, value in self.base.state_dict().items()},
            folder / "base.safetensors",
        )

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu") -> World:
        """Raises ArtifactError on a missing file, another schema, or weights that do not fit the
        spec.
        """
        try:
            about = json.loads((folder / "world.json").read_text())
            if about["schema"] != SCHEMA:
                raise ArtifactError(
                    f"world {str(folder)!r} has schema {about['schema']}, this version reads"
                    f" {SCHEMA}; pretrain it again"
                )
            spec, config = Spec.from_json(about["spec"]), ModelConfig(**about["config"])
            net, base = build(spec, config), Base(spec, config)
            net.load_state_dict(load_file(folder / "model.safetensors"))
            base.load_state_dict(load_file(folder / "base.safetensors"))
            codec = json.loads((folder / "codec.json").read_text())
            scale = float(about["disagreement_scale"])
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(
                f"world {str(folder)!r} cannot be read: {' '.join(str(error).split())}"
            ) from error
        world = World(net, base, codec).to(device)
        world.disagreement_scale = scale
        return world


class _Grid:
    """Rounds drawn integers to what an agent sees of them, so that the world goes on from that and
    from nothing between.
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
        numbers[:, self._columns] = (
            zeros + torch.round((numbers[:, self._columns] - zeros) / bins) * bins
        )
        return Parts(numbers, parts.categories)


def _write(past: Parts, column: int | slice, value: Parts) -> None:
    for into, what in ((past.numbers, value.numbers), (past.categories, value.categories)):
        if what.shape[-1]:
            into[:, column] = what
