"""What is fitted before the network trains: the codec, the frozen base. Kept in the run's folder,
so that a resume uses the very same.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save

from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model import counts
from mesocosm.model.base import MAX_TRANSITIONS, Base, Transitions
from mesocosm.model.config import ModelConfig
from mesocosm.model.spec import Spec
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
from mesocosm.train.config import TrainConfig

BASE = "base.safetensors"
CODEC = "codec.json"
FLOPS = "flops.json"


def open_datasets(storage: Storage, ids: list[str], cache_gib: float | None = None) -> Dataset:
    """The finished datasets, as one; their shards are fetched and verified when they are read.
    Raises UsageError or ArtifactError naming what is missing, damaged or of another environment.
    """
    most = None if cache_gib is None else int(cache_gib * 2**30)
    return Dataset([open_partial(storage, "datasets", id, most) for id in ids])


def fit_codec(dataset: Dataset) -> Codec:
    """`Codec.fit`, the first to read the data: before anything starts, so that UsageError says what
    is damaged.
    """
    try:
        return Codec.fit(dataset)
    except ArtifactError as error:
        raise UsageError(str(error)) from error


def narrowed(dataset: Dataset, unique: int | None, seed: int) -> Dataset:
    """`dataset` with so many transitions to train on; None: all. The codec is fitted before, on
    all, so that nats stay comparable.
    """
    return dataset if unique is None else dataset.unique(unique, seed)


def transitions(dataset: Dataset, codec: Codec, limit: int = MAX_TRANSITIONS) -> Transitions:
    """At most `limit` transitions of the training split, spread evenly over it, in order."""
    episodes = dataset.episodes("train")
    lengths: NDArray[np.int64] = dataset.table["length"][episodes].astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    chosen = np.arange(total) if total <= limit else np.arange(limit) * total // limit
    position = np.searchsorted(ends, chosen, "right")
    number = episodes[position]
    rows = dataset.table["first_row"][number] + chosen - (ends - lengths)[position]
    pairs = rows[:, None] + np.arange(2)
    found = dataset.gathered(
        dataset.table["shard"][number],
        {"obs_num": pairs, "obs_cat": pairs, "act_num": rows, "act_cat": rows},
    )
    dataset.turn(())
    options = codec.option_rows(dataset.options, dataset.option_numbers, dataset.option_values)
    numbers, categories = found["obs_num"], found["obs_cat"]
    return (
        codec.observation_parts(numbers[:, 0], categories[:, 0]),
        codec.action_parts(found["act_num"], found["act_cat"]),
        codec.task_parts(numbers[:, 0], categories[:, 0], options[number]),
        codec.observation_parts(numbers[:, 1], categories[:, 1]),
        torch.from_numpy(dataset.table["hash"][number].astype(np.int64)),
    )


def fitted_codec(storage: Storage, folder: str, dataset: Dataset) -> Codec:
    """The codec in the run's folder, or one fitted on the training split and kept there."""
    kept = storage.read(f"{folder}/{CODEC}")
    if kept is not None:
        return Codec.from_json(json.loads(kept))
    codec = fit_codec(dataset)
    storage.write(f"{folder}/{CODEC}", json.dumps(codec.to_json()).encode())
    return codec


def step_flops(spec: Spec, model: ModelConfig, options: TrainConfig) -> int:
    """FLOPs of one step of the whole group, by counting (model/counts.py)."""
    return counts.flops_per_batch(
        spec, model, options.batch, model.context, events=events_of(spec, options)
    )


def events_of(spec: Spec, options: TrainConfig) -> int:
    return options.events if spec.terminal_rate > 0 else 0


def while_workers_start(
    storage: Storage,
    folder: str,
    dataset: Dataset,
    codec: Codec,
    model: ModelConfig,
    options: TrainConfig,
    seed: int,
) -> None:
    """Seconds of work that the workers need done and need not do: counting FLOPs, then the base,
    for which they wait.
    """
    storage.write(f"{folder}/{FLOPS}", json.dumps(step_flops(codec.spec, model, options)).encode())
    fit_base(storage, folder, dataset, codec, model, seed)


def read_flops(storage: Storage, folder: str) -> int:
    """What `while_workers_start` counted; there once the base is."""
    return int(json.loads(storage.read(f"{folder}/{FLOPS}") or b"0"))


def fit_base(
    storage: Storage, folder: str, dataset: Dataset, codec: Codec, config: ModelConfig, seed: int
) -> None:
    """Fit the base, unless the run's folder holds it."""
    if storage.read(f"{folder}/{BASE}") is None:
        base = Base.fit(codec.spec, config, transitions(dataset, codec), seed)
        storage.write(f"{folder}/{BASE}", save(base.state_dict()))


def read_base(storage: Storage, folder: str, spec: Spec, config: ModelConfig) -> Base | None:
    """The base in the run's folder; None as long as it is not there."""
    kept = storage.read(f"{folder}/{BASE}")
    if kept is None:
        return None
    base = Base(spec, config)
    base.load_state_dict(load(kept))
    return base.eval()
