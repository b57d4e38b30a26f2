"""A text world, and how a vector of environments steps in it.

Texts are generated token by token and then read back as a tokenizer would cut them, so that a
session continues from its texts alone: the cache is a pure function of the texts in the window.
With one device type and one kind of CPU the bits are equal however sessions are batched (see
`llama`), so equal keys and actions give equal texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mesocosm.errors import UsageError
from mesocosm.model import rng
from mesocosm.model.artifact import WORLD, described
from mesocosm.model.language.hf import from_hf, read_state, save_folder
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextLosses, TextNet
from mesocosm.model.language.pretrained import OtherBackbone, load_other
from mesocosm.model.language.sampler import Drawn, Sampler
from mesocosm.model.language.session import EpisodeWindow, TextCarry, TextContext, TextStep, ragged
from mesocosm.model.language.shape import Shape
from mesocosm.model.language.stream import TokenRows
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.spec import Spec

SCHEMA = 1


class TextWorld:
    """A world model of texts in float32, without gradients, for one thread at a time."""

    def __init__(
        self,
        net: TextNet,
        tokenizer: TextTokenizer,
        *,
        window: int,
        longest: int,
        longest_start: int,
        tasks: bool = False,
        codec: dict[str, Any] | None = None,
    ):
        """A world of a trained network.

        Args:
            net: The network; its vocabulary is at least the tokenizer's.
            tokenizer: The tokenizer that the network was trained with.
            window: The most tokens that the network reads.
            longest: The tokens of the data's longest observation, its mark included. A generated
                text ends there at the latest.
            longest_start: The same of a task and its first observation, with `<bos>` and all marks.
            tasks: Episodes have a task, which generated starts then have too.
            codec: Opaque JSON that describes how raw spaces become texts.

        Raises:
            UsageError: The longest texts do not fit in the window.
        """
        if longest_start + longest > window:
            raise UsageError(
                f"model.context must be >= {longest_start + longest} tokens to hold the longest"
                f" start and observation, got {window}"
            )
        self.net: TextNet = net.float().eval().requires_grad_(False)
        self.tokenizer, self.spec, self.codec = tokenizer, net.spec, codec or {}
        self.window, self.longest, self.longest_start = window, longest, longest_start
        self.tasks = tasks
        self.temperature = 1.0
        """0 takes the most likely token and reward."""
        self.disagreement_scale = 1.0
        """The disagreement that counts as 1."""
        self._sampler = Sampler(self.net, tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> TextWorld:
        """Move the weights to `device`, and return self."""
        self.net.to(device)
        self._sampler = Sampler(self.net, self.tokenizer)
        return self

    # Episodes.

    @torch.inference_mode()
    def sample_start(self, keys: Tensor) -> tuple[list[str], list[str]]:
        """Draw (task, o_0) for each of `keys` [B] int64 (`rng.keys`). The task is empty in a world
        without tasks.
        """
        members = self.net.members
        member = (rng.bits(keys, rng.MEMBER) >> 33) % members
        cache = self.net.model.new_cache(len(keys), self.longest_start)
        bos = torch.full((len(keys), 1), self.tokenizer.bos, device=keys.device)
        state = self.net.model.feed(cache, bos, torch.ones_like(keys), member)[:, 0]
        rows = torch.arange(len(keys), device=keys.device)
        drawn = Drawn(state, self.longest_start - 1)  # `<bos>` is the first
        self._sampler.write(
            drawn, cache, rows, member, state, keys, self.temperature, task_first=self.tasks
        )
        tasks, observations = [], []
        for ids in drawn.texts():
            end = ids.index(self.tokenizer.eoa) if self.tokenizer.eoa in ids else -1
            most = self.longest_start - 2 - self.tasks  # less the marks
            task = self.tokenizer.shortened(self.tokenizer.decode(ids[: max(end, 0)]), most)
            most -= len(self.tokenizer.encode(task))
            tasks.append(task)
            observations.append(
                self.tokenizer.shortened(self.tokenizer.decode(ids[end + 1 :]), most)
            )
        return tasks, observations

    def begin(self, task: Sequence[str], observation: Sequence[str], member: Tensor) -> TextCarry:
        """A session of B environments at the start of their episodes; `member` [B] int64 imagines
        each (`rng.member_of`). Raises UsageError for a start that is too long.
        """
        windows = [self._window(*texts) for texts in zip(task, observation, strict=True)]
        rows = len(windows) * self.net.members
        return TextCarry(windows, member, self.net.model.new_cache(rows, self.window))

    def reset(
        self,
        carry: TextCarry,
        mask: Tensor,
        task: Sequence[str],
        observation: Sequence[str],
        member: Tensor,
    ) -> TextCarry:
        """New episodes for the environments where `mask` [B] bool is true; the other rows of the
        arguments are ignored.
        """
        for row in mask.nonzero().squeeze(1).tolist():
            carry.windows[row] = self._window(task[row], observation[row])
        self._forget(carry, mask)
        return replace(carry, member=torch.where(mask, member, carry.member))

    def restore(self, context: TextContext) -> TextCarry:
        """The carry of this context: its future steps have the same bits."""
        carry = self.begin(context.task, context.start, context.member.to(self.device))
        for window, steps in zip(carry.windows, context.steps, strict=True):
            if context.whole:
                window.replay(steps, self.longest, self.window)
                continue
            for action, observation in steps:
                window.add(action, observation)
        self._catch_up(carry, carry.rows)
        return carry

    def copy_rows(self, carry: TextCarry, rows: Tensor, member: Tensor) -> TextCarry:
        """A carry of N copies of the environments of another one, which stays as it is.

        Args:
            carry: The carry of B environments.
            rows: [N] int64 in 0 .. B-1, the environment that each row copies.
            member: [N] int64, the member that imagines each row from here on.
        """
        members = self.net.members
        places = rows.unsqueeze(1) * members + torch.arange(members, device=rows.device)
        windows = [carry.windows[row].copy() for row in rows.tolist()]
        return TextCarry(windows, member, carry.cache.select(places.flatten()))

    @torch.inference_mode()
    def step(
        self, carry: TextCarry, action: Sequence[str], keys: Tensor, *, disagreement: bool = True
    ) -> tuple[TextCarry, TextStep]:
        """One step of B environments, each by its own member alone.

        A terminated environment continues until `reset`.

        Args:
            carry: Of `begin`, `reset`, `restore` or an earlier step; it is changed in place.
            action: [B] texts.
            keys: [B] int64 from `rng.keys(seed, env, episode, step)`.
            disagreement: Also ask all members what they think of the texts, which takes more time
                and changes nothing else.

        Raises:
            UsageError: An action is too long for the window. The carry is then unchanged.
        """
        self.require_room(carry, action)
        moved = [
            window.room_for(len(window.action_tokens(text)) + self.longest, self.window)
            for window, text in zip(carry.windows, action, strict=True)
        ]
        if any(moved):
            self._forget(carry, torch.tensor(moved, device=self.device))
        for window, text in zip(carry.windows, action, strict=True):
            window.tokens += window.action_tokens(text)
        rows, members = carry.rows, self._members(carry)
        read = [len(window.tokens) for window in carry.windows]
        state = self._catch_up(carry, rows)
        drawn = Drawn(state, self.longest)
        self._sampler.write(drawn, carry.cache, rows, members, state, keys, self.temperature)
        texts, again = [], []
        for row, (window, ids) in enumerate(zip(carry.windows, drawn.texts(), strict=True)):
            written = self.tokenizer.decode(ids)
            text = self.tokenizer.shortened(written, self.longest - 1)
            if text != written:
                drawn.cut[row] = True
            window.add(action[row], text)
            texts.append(text)
            again.append(window.tokens[read[row] : -1] != ids)
        if any(again):
            self._read_again(carry, drawn, state, torch.tensor(again, device=self.device), read)
        reward, p, ended = self._sampler.outcome(drawn.final, carry.member, keys, self.temperature)
        apart = None
        if disagreement:
            apart = drawn.worst if self.net.members == 1 else self._spread(carry, drawn, read)
            apart = apart / self.disagreement_scale
        step = TextStep(texts, reward, ended, p, drawn.worst, apart, drawn.cut, drawn.count)
        return carry, step

    def observe(self, carry: TextCarry, observation: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Replace the observations of the last step by others, cut at the longest of the data.
        `carry` is changed in place.

        Returns:
            (the most likely or expected reward, the probability of termination) [B] after them.
        """
        texts = [self.tokenizer.shortened(text, self.longest - 1) for text in observation]
        before = [w.replace_last(text) for w, text in zip(carry.windows, texts, strict=True)]
        stay = torch.tensor(before, device=self.device).repeat_interleave(self.net.members)
        carry.cache.rewind(torch.minimum(carry.cache.length, stay))
        state, keys = self._catch_up(carry, carry.rows), torch.zeros_like(carry.member)
        reward, p, _ = self._sampler.outcome(state, carry.member, keys, temperature=0.0)
        return reward, p

    # Likelihoods.

    def losses(self, rows: TokenRows) -> TextLosses:
        """Nats by part on rows, see `TextLosses`."""
        return self.net.losses(rows)

    # Inside a step.

    def _window(self, task: str, start: str) -> EpisodeWindow:
        window = EpisodeWindow(self.tokenizer, task, start)
        longest = self.window - self.longest
        if len(window.tokens) > longest:
            raise UsageError(
                f"a start must have at most {longest} tokens (model.context={self.window} less the"
                f" longest observation), got {len(window.tokens)}: {start[:60]!r}"
            )
        return window

    def require_room(self, carry: TextCarry, actions: Sequence[str]) -> None:
        """Raise UsageError where an action is too long for the window."""
        for window, action in zip(carry.windows, actions, strict=True):
            length = len(window.action_tokens(action))
            most = self.window - self.longest - window.start_length
            if length > most:
                raise UsageError(
                    f"an action must have at most {most} tokens here (model.context={self.window}"
                    f" less the start and the longest observation), got {length}: {action[:60]!r}"
                )

    def _members(self, carry: TextCarry) -> Tensor:
        """[B * K] int64: the member of each row of the cache."""
        return torch.arange(self.net.members, device=self.device).repeat(len(carry.windows))

    def _forget(self, carry: TextCarry, mask: Tensor) -> None:
        """Empty the cache's rows of the environments of `mask`."""
        mask = mask.to(self.device).repeat_interleave(self.net.members)
        carry.cache.rewind(torch.where(mask, 0, carry.cache.length))

    def _pending(self, carry: TextCarry, rows: Tensor) -> list[list[int]]:
        """By row of the cache, the tokens that it has not read; empty for rows not in `rows`."""
        lengths, chosen = carry.cache.length.tolist(), set(rows.tolist())
        return [
            carry.windows[row // self.net.members].tokens[length:] if row in chosen else []
            for row, length in enumerate(lengths)
        ]

    @torch.inference_mode()
    def _catch_up(self, carry: TextCarry, rows: Tensor) -> Tensor:
        """Let `rows` of the cache read their windows to the end: the states there."""
        ids, count = ragged(self._pending(carry, rows), self.device)
        states = self.net.model.feed(carry.cache, ids, count, self._members(carry))
        return states[rows, (count[rows] - 1).clamp(min=0)]

    def _read_again(
        self, carry: TextCarry, drawn: Drawn, state: Tensor, mask: Tensor, read: list[int]
    ) -> None:
        """Read the texts of the rows of `mask` as the tokenizer cuts them, where the network wrote
        other tokens (broken bytes, or a token where two would do).
        """
        lengths = carry.cache.length.clone()
        chosen = mask.nonzero().squeeze(1)
        lengths[carry.rows[chosen]] = torch.tensor(read, device=self.device)[chosen]
        carry.cache.rewind(lengths)
        ids, count = ragged(self._pending(carry, carry.rows[chosen]), self.device)
        states = self.net.model.feed(carry.cache, ids, count, self._members(carry))
        for row in chosen.tolist():
            place = int(carry.rows[row])
            length = int(count[place])
            before = torch.cat((state[row : row + 1], states[place, : length - 1]))
            nats = self._sampler.token_nats(before, ids[place, :length])
            nats[-1] = torch.where(drawn.cut[row], 0.0, nats[-1])
            drawn.nats[row], drawn.worst[row] = nats.sum(), nats.max()
            drawn.count[row], drawn.final[row] = length, states[place, length - 1]

    def _spread(self, carry: TextCarry, drawn: Drawn, read: list[int]) -> Tensor:
        """[B]: the standard deviation over members of the nats a token of the last texts."""
        members = self.net.members
        everyone = torch.arange(carry.cache.batch, device=self.device)
        pending = self._pending(carry, everyone)
        ids, count = ragged(pending, self.device)
        states = self.net.model.feed(carry.cache, ids, count, self._members(carry))
        lengths = [len(w.tokens) - before for w, before in zip(carry.windows, read, strict=True)]
        cut: list[int] = drawn.cut.int().tolist()  # the marks that were not drawn
        places: list[int] = []
        columns: list[int] = []
        for row, tokens in enumerate(pending):
            env = row // members
            scored = range(len(tokens) - lengths[env], len(tokens) - cut[env]) if tokens else ()
            places += [row] * len(scored)
            columns += scored
        place, column = torch.tensor([places, columns], dtype=torch.int64, device=self.device)
        token_nats = self._sampler.token_nats(states[place, column - 1], ids[place, column])
        nats = drawn.nats.repeat_interleave(members)  # of the member that wrote the text
        nats = torch.where(count > 0, 0.0, nats).index_add(0, place, token_nats)
        count = (torch.tensor(lengths, device=self.device) - drawn.cut.int()).clamp(min=1)
        per_token = nats.view(-1, members) / count.unsqueeze(1)
        return per_token.std(1, correction=0)

    # Files.

    def save(self, folder: Path) -> None:
        """Write a checkpoint of Hugging Face's format (config.json, model.safetensors,
        tokenizer.json), which other engines read. Next to it are heads.safetensors (heads and
        adapters), world.json and codec.json.
        """
        network, tokenizer = self.net.backbone, self.tokenizer
        rank = 0
        if isinstance(network, Llama):
            rank = network.rank
            marks = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eoo}
            save_folder(network, folder, marks)
        else:
            cast(OtherBackbone, network).save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
        about = {
            "schema": SCHEMA,
            "spec": self.spec.to_json(),
            "config": {"family": "language", "members": self.net.members},
            "llama": isinstance(network, Llama),
            "shape": self.net.model.shape.to_json(),
            "members": self.net.members,
            "rank": rank,
            "window": self.window,
            "longest": self.longest,
            "longest_start": self.longest_start,
            "tasks": self.tasks,
            "temperature": self.temperature,
            "disagreement_scale": self.disagreement_scale,
        }
        (folder / WORLD).write_text(json.dumps(about, indent=1))
        (folder / "codec.json").write_text(json.dumps(self.codec))
        heads = {name: t.contiguous() for name, t in self.net.heads().items()}
        save_file(heads, folder / "heads.safetensors")

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu") -> TextWorld:
        """Load a world. Raises ArtifactError if a file is missing or damaged, or the schema is
        another.
        """
        with described(folder, SCHEMA, texts=True) as about:
            network: torch.nn.Module
            if about["llama"]:
                shape = Shape(**about["shape"])
                network = Llama(shape, members=about["members"], rank=about["rank"])
                from_hf(network, read_state(folder))
            else:
                network = load_other(folder)
            net = TextNet(network, Spec.from_json(about["spec"]))
            net.load_heads(load_file(folder / "heads.safetensors"))
            world = TextWorld(
                net,
                TextTokenizer.load(folder / "tokenizer.json"),
                window=about["window"],
                longest=about["longest"],
                longest_start=about["longest_start"],
                tasks=about["tasks"],
                codec=json.loads((folder / "codec.json").read_text()),
            )
            world.temperature = float(about["temperature"])
            world.disagreement_scale = float(about["disagreement_scale"])
            world = world.to(device)
        return world
