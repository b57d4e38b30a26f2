"""The codec and the frozen base with the start model, which are fitted before the network trains.
They are stored in the training's folder, so that a resume uses the same ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.text_loader import TextLoader
from mesocosm.data.loading.windows import start_parts
from mesocosm.data.tokens.reading import tokenized
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.split import Split
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model import counts, head_fit
from mesocosm.model.base import MAX_TRANSITIONS, Base, Transitions
from mesocosm.model.config import LANGUAGE, SEQUENCE, ModelConfig
from mesocosm.model.fitting import Report, silent
from mesocosm.model.spec import Spec
from mesocosm.model.start import ANCHORS
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
from mesocosm.train.config import DataConfig, TrainConfig
from mesocosm.train.texts import TextCorpus

BASE = "base.safetensors"
JUDGED = 2048
"""Transitions, and terminal events, that stop the fits of the reward and termination networks."""
CODEC = "codec.json"
AnyCodec = Codec | TextCorpus
"""The fitted form of the data; a `TextCorpus` for the family of texts."""
AnyLoader = Loader | TextLoader


def open_datasets(
    storage: Storage, ids: list[str], cache_gib: float | None = None, tokenizer: str | None = None
) -> Dataset:
    """The finished datasets, as one; their shards are fetched and verified when they are read.

    Args:
        storage: Where they are.
        ids: Of the datasets.
        cache_gib: `data.cache_gib`.
        tokenizer: The tokenizer by whose codes images are read.

    Raises:
        UsageError, ArtifactError: A dataset or the tokenizer is missing, damaged or of another
            environment.
    """
    limit = None if cache_gib is None else int(cache_gib * 2**30)
    dataset = Dataset([open_partial(storage, "datasets", id, limit) for id in ids])
    if tokenizer is None:
        return dataset
    return tokenized(dataset, storage, tokenizer, "data.tokenizer")


@dataclass(frozen=True)
class TrainingData:
    """The datasets and the tokenizer of a job, open and checked."""

    dataset: Dataset
    """The datasets, in which images are the codes of the tokenizer, if there is one."""
    config: DataConfig
    """The config with the tokenizer's whole id."""
    inputs: dict[str, list[str]]
    """Ids of the datasets and of the tokenizer, by kind."""


def open_data(storage: Storage, data: DataConfig, model: ModelConfig) -> TrainingData:
    """Open the datasets and the tokenizer that a job learns from.

    Raises:
        UsageError: One of them is missing, damaged or of another environment, or the model cannot
            learn a leaf (`check_leaves`).
    """
    try:
        dataset = open_datasets(storage, data.datasets, data.cache_gib, data.tokenizer)
        inputs = {"datasets": dataset.ids}
        if data.tokenizer is not None:
            inputs["tokenizers"] = [storage.find_commit("tokenizers", data.tokenizer)["id"]]
            data = replace(data, tokenizer=inputs["tokenizers"][0])
    except ArtifactError as error:
        raise UsageError(str(error)) from error
    check_leaves(dataset.observation_codec, dataset.action_codec, model)
    return TrainingData(dataset, data, inputs)


def check_leaves(observation: SpaceCodec, action: SpaceCodec, model: ModelConfig) -> None:
    """Raise UsageError where a model cannot learn a leaf (an image without a tokenizer, or a text
    too long for slots), or has groups without an image.

    Args:
        observation: The codec of observations.
        action: The codec of actions.
        model: Its family and group are read.
    """
    family = model.family
    for codec in (observation, action):
        codec.check_images()
        if family != LANGUAGE:
            codec.check_slots()
    if observation.tokenizers and family != SEQUENCE:
        raise UsageError(
            f"model.family must be {SEQUENCE} with data.tokenizer, got {family}: the codes of a"
            " frame are drawn one after another, which no other family does"
        )
    if model.group > 1 and not observation.tokenizers:
        raise UsageError(
            f"model.group must be left out without data.tokenizer, got {model.group}; it is read by"
            " worlds of images"
        )


def narrowed(dataset: Dataset, unique: int | None, seed: int) -> Dataset:
    """`dataset` with `unique` transitions to train on; None: all. Fit the codec before, on all, so
    that nats stay comparable.
    """
    return dataset if unique is None else dataset.unique(unique, seed)


def fit_codec(dataset: Dataset, model: ModelConfig) -> AnyCodec:
    """Fit the codec of a family, the first to read the data. Raises UsageError if they are
    damaged.
    """
    try:
        if model.family == LANGUAGE:
            return TextCorpus.fit(dataset, model)
        return Codec.fit(dataset)
    except ArtifactError as error:
        raise UsageError(str(error)) from error


def codec_from_json(values: dict[str, Any], family: str) -> AnyCodec:
    """A stored codec of a family."""
    return TextCorpus.from_json(values) if family == LANGUAGE else Codec.from_json(values)


def fitted_codec(storage: Storage, folder: str, dataset: Dataset, model: ModelConfig) -> AnyCodec:
    """The codec in the training's folder, or a new one, which is stored there."""
    stored = storage.read(f"{folder}/{CODEC}")
    if stored is not None:
        return codec_from_json(json.loads(stored), model.family)
    codec = fit_codec(dataset, model)
    storage.write(f"{folder}/{CODEC}", json.dumps(codec.to_json()).encode())
    return codec


def make_loader(
    dataset: Dataset,
    codec: AnyCodec,
    split: Split,
    model: ModelConfig,
    batch: int,
    seed: int,
    data: DataConfig | None = None,
) -> AnyLoader:
    """The windows of a split, or its rows of tokens.

    Args:
        dataset: The data.
        codec: Fitted on all of the data.
        split: `train` or `valid`.
        model: Its context is read, and its members by the family of texts.
        batch: Windows or rows of a step, over all workers.
        seed: Of the order.
        data: The order; by default all windows are shuffled.
    """
    if isinstance(codec, TextCorpus):
        return codec.loader(dataset, split, model, batch, seed)
    data = data or DataConfig()
    shape = (model.context, batch, seed)
    weights = data.weights if split == "train" else None
    return Loader(dataset, codec, split, *shape, block=data.block, weights=weights)


def fit_base(
    storage: Storage,
    path: str,
    dataset: Dataset,
    codec: Codec,
    config: ModelConfig,
    seed: int,
    data: DataConfig | None = None,
    report: Report = silent,
) -> Base:
    """The base stored at `path`, or a new one, which is stored there. `data`: the order of the
    data. `report` is called with the progress in words.
    """
    base = read_base(storage, path, codec.spec, config)
    if base is None:
        base = fitted_base(dataset, codec, config, seed, data, report)
        storage.write(path, save(base.state_dict()))
    return base.eval()


def fitted_base(
    dataset: Dataset,
    codec: Codec,
    config: ModelConfig,
    seed: int,
    data: DataConfig | None = None,
    report: Report = silent,
) -> Base:
    """A base fitted on the training split: the start model, the change of the numbers, then reward
    and termination, on batches of single transitions in the order of `data`.
    """
    base = Base.fit(codec.spec, config, transitions(dataset, codec), seed, report)
    base.start.fit(*start_parts(dataset, codec, limit=ANCHORS))
    data = data or DataConfig()
    events = head_fit.BATCH if codec.spec.terminal_rate > 0 else 0

    def load(batch: int, events: int) -> Loader:
        shape = (1, batch, seed, events)
        return Loader(dataset, codec, "train", *shape, block=data.block, weights=data.weights)

    judged = next(load(JUDGED, 0).eval_batches(most=JUDGED))
    if events:
        judged = replace(judged, events=load(1, 3 * JUDGED).batch(0).events)
    draw = load(head_fit.BATCH, events).batch
    head_fit.fit_heads(base, draw, judged, config.head_steps, seed, report)
    return base


def read_base(storage: Storage, path: str, spec: Spec, config: ModelConfig) -> Base | None:
    """The base stored at `path`; None until it is stored."""
    stored = storage.read(path)
    if stored is None:
        return None
    base = Base(spec, config)
    base.load_state_dict(load(stored))
    return base.eval()


def transitions(dataset: Dataset, codec: Codec, limit: int = MAX_TRANSITIONS) -> Transitions:
    """At most `limit` transitions of the training split, spread evenly over it, in order."""
    table, episodes = dataset.table, dataset.episodes("train")
    lengths: NDArray[np.int64] = table["length"][episodes].astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    chosen = np.arange(total) if total <= limit else np.arange(limit) * total // limit
    position = np.searchsorted(ends, chosen, "right")
    number = episodes[position]
    rows = table["first_row"][number] + chosen - (ends - lengths)[position]
    pairs = rows[:, None] + np.arange(2)
    columns = {"obs_num": pairs, "obs_cat": pairs, "act_num": rows, "act_cat": rows}
    data = dataset.gathered(table["shard"][number], columns)
    dataset.turn(())
    options = codec.option_rows(dataset.options, dataset.option_numbers, dataset.option_values)
    numbers, categories = data["obs_num"], data["obs_cat"]
    return (
        codec.observation_parts(numbers[:, 0], categories[:, 0]),
        codec.action_parts(data["act_num"], data["act_cat"]),
        codec.task_parts(numbers[:, 0], categories[:, 0], options[number]),
        codec.observation_parts(numbers[:, 1], categories[:, 1]),
        torch.from_numpy(table["hash"][number].astype(np.int64)),
    )


def step_flops(spec: Spec, model: ModelConfig, options: TrainConfig) -> int:
    """FLOPs of one step of the whole group, counted exactly (model/counts.py)."""
    return counts.flops_per_batch(spec, model, options.batch, model.context)
