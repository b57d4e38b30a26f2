"""From trained weights to a text world: the scale of its disagreement, and the check that its
episodes end and are rewarded where those of the data are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.errors import ArtifactError
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import new_text_net
from mesocosm.model.language.net import StepPredictions
from mesocosm.model.language.stream import TokenRows
from mesocosm.model.language.world import TextWorld
from mesocosm.train.export import EXCEEDED, FEW, TerminationCheck
from mesocosm.train.texts import TextCorpus

BATCH = 8
ROWS = 256
"""The most rows of a split that are read."""


@dataclass(frozen=True)
class TextCheck:
    """A world's predictions of the steps of logged episodes, compared."""

    termination: TerminationCheck
    events: int
    """Steps whose reward is not the most frequent one."""
    hits: int
    """The events whose logged reward is the most likely one."""
    false_events: int
    """Other steps to which the world gives another reward than the most frequent one."""

    @property
    def metrics(self) -> dict[str, float]:
        """The share of events that it gets right, and false ones for each event."""
        if not self.events:
            return {}
        return {
            "reward_recall": self.hits / self.events,
            "false_rewards": self.false_events / self.events,
        }


def load_trained_text(weights: Path, corpus: TextCorpus, config: ModelConfig) -> TextWorld:
    """The world with the float32 `weights` file; frozen weights are those of `model.pretrained`.

    Raises:
        ArtifactError: The file has other tensors than the network trains.
    """
    net = new_text_net(corpus.spec, config)
    state = load_file(weights)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    if different := sorted(state.keys() ^ trained):
        raise ArtifactError(f"the trained weights lack {different[0]!r}, or have it in addition")
    net.load_state_dict(state, strict=False)
    return TextWorld(
        net,
        corpus.tokenizer,
        window=config.context,
        longest=corpus.longest,
        longest_start=corpus.longest_start,
        tasks=corpus.tasks,
        codec=corpus.codec.to_json(),
    )


@torch.inference_mode()
def calibrate_text(
    world: TextWorld, dataset: Dataset, corpus: TextCorpus, config: ModelConfig
) -> None:
    """Set `world.disagreement_scale`, so that the disagreement of a fraction EXCEEDED of held-out
    steps, after true texts, is above 1. The scale is 1 if members never differ.
    """
    spreads: list[Tensor] = []
    for split in ("valid", "train"):
        if sum(map(len, spreads)) < FEW and len(dataset.episodes(split)):
            pairs = _predicted(world, dataset, corpus, config, split)
            spreads = [predicted.uncertainty for _, predicted in pairs]
    scale = float(torch.quantile(torch.cat(spreads).double(), 1 - EXCEEDED))
    world.disagreement_scale = scale if scale > 0 else 1.0


@torch.inference_mode()
def check_text(
    world: TextWorld, dataset: Dataset, corpus: TextCorpus, config: ModelConfig
) -> TextCheck:
    """Check on the validation split, or on the training split if that holds no terminal."""
    values = world.spec.reward_values
    check = TextCheck(TerminationCheck(0, 0, 0.0, "validation"), 0, 0, 0)
    for split in ("valid", "train"):
        if check.termination.terminals or not len(dataset.episodes(split)):
            continue
        pairs = list(_predicted(world, dataset, corpus, config, split))
        ended = torch.cat([rows.ended[rows.steps] for rows, _ in pairs])
        called = torch.cat([predicted.p_terminated for _, predicted in pairs]) > 0.5
        termination = TerminationCheck(
            terminals=int(ended.sum()),
            hits=int((ended & called).sum()),
            false_alarms=float((called & ~ended).sum()),
            measured_on="validation" if split == "valid" else "training",
        )
        events = hits = false = 0
        if values is not None:
            logged = torch.tensor(values)[torch.cat([r.reward[r.steps] for r, _ in pairs]).long()]
            given = torch.cat([predicted.reward for _, predicted in pairs])
            usual = logged.mode().values
            event = logged != usual
            events, hits = int(event.sum()), int((event & (given == logged)).sum())
            false = int((~event & (given != usual)).sum())
        check = TextCheck(termination, events, hits, false)
    return check


def _predicted(
    world: TextWorld, dataset: Dataset, corpus: TextCorpus, config: ModelConfig, split: Split
) -> Iterator[tuple[TokenRows, StepPredictions]]:
    loader = corpus.loader(dataset, split, config, BATCH, 0)
    for rows in loader.eval_batches(most=ROWS):
        yield rows, world.net.predictions(rows)
