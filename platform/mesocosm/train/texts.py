"""The texts that a text world learns from: their codec, their tokenizer and their lengths. They are
fitted before the network trains and stored in the training's folder, as one JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mesocosm.config import fingerprint
from mesocosm.data.loading.text_loader import TextLoader
from mesocosm.data.loading.texts import TextCodec, text_episodes
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.model.language.pretrained import load_pretrained
from mesocosm.model.language.stream import start_tokens
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.spec import Spec


@dataclass(frozen=True)
class TextCorpus:
    """A codec with a tokenizer, and the data that they encoded."""

    codec: TextCodec
    tokenizer: TextTokenizer
    longest: int
    """The tokens of the data's longest observation, its mark included."""
    longest_start: int
    """The same of a task and its first observation, with `<bos>` and all marks."""
    longest_step: int
    """The same of the longest action and the longest observation together, so that every logged
    action can be taken in the world."""
    tasks: bool
    """Episodes have a task."""

    @property
    def spec(self) -> Spec:
        return self.codec.spec

    @cached_property
    def id(self) -> str:
        return fingerprint("corpus", self.to_json())

    def to_json(self) -> dict[str, Any]:
        lengths = {"longest": self.longest, "longest_start": self.longest_start}
        lengths["longest_step"] = self.longest_step
        tokenizer = self.tokenizer.to_json()
        return {
            "codec": self.codec.to_json(),
            "tokenizer": tokenizer,
            "tasks": self.tasks,
        } | lengths

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TextCorpus:
        """The inverse of `to_json`."""
        tokenizer = TextTokenizer.from_json(values["tokenizer"])
        rest = {name: value for name, value in values.items() if name not in ("codec", "tokenizer")}
        return TextCorpus(TextCodec.from_json(values["codec"]), tokenizer, **rest)

    @staticmethod
    def fit(dataset: Dataset, model: ModelConfig) -> TextCorpus:
        """Train the tokenizer on the training split, or take that of `model.pretrained`, and
        measure the texts of both splits.

        Raises:
            UsageError: The split is empty, a package is missing, or `model.context` is too short
                for the longest texts.
            ArtifactError: The tokenizer of a checkpoint loses text.
        """
        codec = TextCodec.fit(dataset)
        if model.pretrained is not None:
            tokenizer = load_pretrained(model.pretrained, context=model.context).tokenizer
        else:
            texts: dict[str, None] = {}
            for episode in text_episodes(dataset, codec, "train"):
                texts.update(dict.fromkeys((episode.task, *episode.observations, *episode.actions)))
            texts.pop("", None)
            tokenizer = TextTokenizer.train(texts, model.vocabulary)
        longest = start = longest_action = 0
        tasks = False
        for episode in text_episodes(dataset, codec):
            tasks |= bool(episode.task)
            start = max(start, len(start_tokens(tokenizer, episode.task, episode.observations[0])))
            for action, text in zip(episode.actions, episode.observations[1:], strict=True):
                longest = max(longest, len(tokenizer.encode(text)) + 1)
                longest_action = max(longest_action, len(tokenizer.encode(action)) + 1)
        step = longest_action + longest
        if start + step > model.context:
            raise UsageError(
                f"model.context must be >= {start + step} tokens to hold the longest start, action"
                f" and observation of {', '.join(dataset.ids)}, got {model.context}"
            )
        return TextCorpus(codec, tokenizer, longest, start, step, tasks)

    def loader(
        self, dataset: Dataset, split: Split, model: ModelConfig, batch: int, seed: int
    ) -> TextLoader:
        """The rows of a split, of `model.context` tokens each."""
        shape = (model.context, batch, seed, model.members)
        return TextLoader(dataset, self.codec, self.tokenizer, split, *shape)
