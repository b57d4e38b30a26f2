"""Worlds of images: the data of their codes, and a small one trained in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coin_grid import write
from factories import SMALL_WORLD
from gymnasium import spaces

from mesocosm.config import override
from mesocosm.data.analysis.evidence import evidence
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.text_batch import refuse_images
from mesocosm.data.loading.windows import start_parts
from mesocosm.data.tokens.counting import PatchCounts
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.slots import SlotRows
from mesocosm.envs.pixels import read_grid
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.mup import init_, param_groups
from mesocosm.model.net import apply_base
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.model.tokenizer.frames import cut
from mesocosm.model.tokenizer.kinds import tokenizer_from_json, tokenizer_to_json
from mesocosm.model.world import World
from mesocosm.runs import tracking
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage
from mesocosm.train.config import PretrainConfig
from mesocosm.train.export import calibrate, check_termination, widen
from mesocosm.train.pretrain import JOB

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def codec(games: Dataset, dictionary: PatchDictionary) -> Codec:
    return Codec.fit(games.tokenized([dictionary]))


def test_windows_hold_codes(
    games: Dataset, dictionary: PatchDictionary, codec: Codec, tmp_path: Path
) -> None:
    """As the tokenizer's artifact holds them, or encoded where they are read: in memory or not."""
    for shard, name in enumerate(games.shards):
        (tmp_path / name).mkdir()
        codes = dictionary.encode(games.images(shard, "obs_image0")[:]).astype(np.uint8)
        np.save(tmp_path / name / "obs_image0.npy", codes)

    def stored(place: str, image: str) -> Path | None:
        return tmp_path / place.partition("/")[2] / f"{image}.npy"

    batches = []
    for view in (games.tokenized([dictionary]), games.tokenized([dictionary], stored)):
        assert isinstance(view.array(0, "obs_cat"), np.ndarray)
        batches.append(Loader(view, codec, "train", 8, 16, 0).batch(0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mesocosm.datasets.shards.IN_MEMORY", 0)
        view = games.tokenized([dictionary])
        assert isinstance(view.array(0, "obs_cat"), SlotRows)
        batches.append(Loader(view, codec, "train", 8, 16, 0).batch(0))
    for batch in batches:
        assert batch.observation.categories.shape == (16, 9, 25)
        assert torch.equal(batch.observation.categories, batches[0].observation.categories)
    frames = codec.decode_observation(batches[0].observation[:, 3])
    shown = read_grid(frames)
    assert frames.dtype == np.uint8 and all((w.sum((1, 2)) == 1).all() for w in shown.values())
    assert games.image_names and not games.observation_codec.tokenizers, "the dataset is as before"
    starts = [start_parts(view, codec)[1] for view in (games, games.tokenized([dictionary]))]
    assert torch.equal(starts[0].categories, starts[1].categories)
    (tmp_path / games.shards[0] / "obs_image0.npy").write_bytes(b"")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        games.tokenized([dictionary], stored).array(0, "obs_cat")
    np.save(tmp_path / games.shards[0] / "obs_image0.npy", np.zeros((3, 25), np.uint8))
    with pytest.raises(ArtifactError, match=r"does not fit the dataset.*tokenize --force"):
        games.tokenized([dictionary], stored).array(0, "obs_cat")


def test_the_codec_holds_its_tokenizer(
    games: Dataset, dictionary: PatchDictionary, codec: Codec
) -> None:
    (span,) = codec.spec.observation.images
    assert (span.start, span.length) == (0, 25) and not codec.spec.observation.numbers
    again = Codec.from_json(json.loads(json.dumps(codec.to_json())))
    assert again.id == codec.id and again.spec == codec.spec
    frames = np.stack(games.episode(3).observations)
    parts = again.observation(frames)
    np.testing.assert_array_equal(again.decode_observation(parts), frames)
    other = PatchDictionary((40, 40, 3), 8, dictionary.table[:-1])
    assert Codec.fit(games.tokenized([other])).id != codec.id
    copied = tokenizer_from_json(tokenizer_to_json(dictionary))
    assert isinstance(copied, PatchDictionary)
    np.testing.assert_array_equal(copied.table, dictionary.table)


def test_images_beside_numbers_categories_and_texts(tmp_path: Path) -> None:
    """Also as a task; floats are the nearest of 256 levels."""
    space = spaces.Dict(
        camera=spaces.Box(0, 255, (8, 8, 3), np.uint8),
        map=spaces.Box(0, 1, (4, 8, 1), np.float32),
        mode=spaces.Discrete(3),
        pose=spaces.Box(-9, 9, (2,), np.float32),
        word=spaces.Text(3, min_length=0, charset="ab"),
    )
    tiles = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)

    def seen(index: int, step: int) -> dict[str, Any]:
        kind = tiles[[(index + step + i) % 5 for i in range(4)]]
        rows = [np.concatenate(kind[:2], 1), np.concatenate(kind[2:], 1)]
        return {
            "camera": np.concatenate(rows),
            "map": np.full((4, 8, 1), np.float32(index % 4) / 255, np.float32),
            "mode": np.int64(step % 3),
            "pose": np.array([index, step], np.float32) / 9,
            "word": "ab"[: step % 3],
        }

    episodes = [
        Episode(
            index=k,
            seed=k,
            behaviour="random",
            observations=[seen(k, t) for t in range(8)],
            actions=[np.int64(t % 3) for t in range(7)],
            rewards=np.ones(7),
            outcome="terminated",
        )
        for k in range(8)
    ]
    dataset = Dataset([write(tmp_path, episodes, space, task=["map"])])
    tokenizers = []
    for name, leaf in zip(dataset.image_names, dataset.observation_codec.image_leaves, strict=True):
        counts = PatchCounts(leaf.name, 4)
        counts.add(dataset.images(0, name)[:])
        tokenizers.append(counts.dictionary((leaf.shape[0], 8, leaf.shape[2]), 16))
    view = dataset.tokenized(tokenizers)
    codec = Codec.fit(view)
    assert codec.spec.observation.categories == (5, 5, 5, 5, 3, 3, 3, 3)
    assert codec.spec.task.categories == (4, 4) and codec.spec.task.images[0].columns == 2
    assert codec.spec.observation.texts[0].start == 5
    windows = Loader(view, codec, "train", 7, 4, 0).batch(0)
    shown = codec.decode_observation(windows.observation[:, 2], windows.task)
    first = episodes[round(float(shown["pose"][0, 0] * 9))].observations[2]
    assert shown["word"][0] == first.pop("word") and shown["map"].dtype == np.float32
    for key, value in first.items():
        np.testing.assert_allclose(shown[key][0], value, atol=1e-5)


@pytest.mark.integration
def test_a_small_world_of_images_learns_and_shows_frames(
    games: Dataset, dictionary: PatchDictionary, codec: Codec, tmp_path: Path
) -> None:
    model = ModelConfig(size="10k", members=1, context=4, base=False, head_steps=1)
    view = games.tokenized([dictionary])
    loader = Loader(view, codec, "train", 4, 8, 0)
    net, base = build(codec.spec, model), Base(codec.spec, model)
    init_(net, 0)
    base.start.fit(*start_parts(view, codec))
    optimizer = torch.optim.AdamW(param_groups(net, 1e-2, 0.01), betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(30):
        batch = loader.batch(step)
        loss = net(batch, apply_base(base, batch)).objective
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 100.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.7 * losses[0], losses
    world = World(net, base, codec.to_json())
    widen(world, view, codec, None)
    calibrate(world, view, codec)
    assert check_termination(world, view, codec, 0).measured_on
    assert evidence(view).transitions > 0
    world.save(tmp_path)
    env = WorldVectorEnv(4, World.load(tmp_path), horizon=5)
    frames, _ = env.reset(seed=0)
    assert frames.shape == (4, 40, 40, 3) and frames.dtype == np.uint8
    for _ in range(3):
        frames, reward, *_ = env.step(np.ones(4, np.int64))
    assert np.isfinite(reward).all()
    assert dictionary.known(cut(frames, 8).reshape(-1, 192)).all()
    env.close()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["data.tokenizer=null"], r"observation is an image .*data\.tokenizer=ID"),
        (["data.tokenizer=missing"], "missing"),
        (["model.family=ensemble"], "family must be sequence with data.tokenizer, got ensemble"),
        (["model.family=language", "model.members=1"], "must be sequence .*, got language"),
        (["model.group=0"], "model.group must be >= 1, got 0"),
        (["data.datasets=[other]"], "is for the images .* fit another one"),
        (["data.datasets=[other]", "data.tokenizer=null", "model.group=5"], "model.group must be"),
    ],
)
def test_wrong_configs_are_refused(
    tmp_path: Path, games: Dataset, dictionary: PatchDictionary, keys: list[str], words: str
) -> None:
    config = override(stored(tmp_path, games, dictionary), keys)
    with pytest.raises(UsageError, match=words) as caught:
        JOB.plan(config)
    assert "\n" not in str(caught.value)


def test_a_dry_run_counts_the_parameters(
    tmp_path: Path, games: Dataset, dictionary: PatchDictionary
) -> None:
    config = stored(tmp_path, games, dictionary)
    plan, grouped = JOB.plan(config), JOB.plan(override(config, ["model.group=5"]))
    assert plan["total_params"] == grouped["total_params"] and plan["world"] != grouped["world"]


def test_other_jobs_refuse_worlds_of_images(codec: Codec) -> None:
    with pytest.raises(UsageError, match="evaluate cannot use a world of images yet"):
        refuse_images(codec, "evaluate")


@pytest.mark.usefixtures("ray_local")
def test_pretrain_makes_a_world_of_images(
    tmp_path: Path, games: Dataset, dictionary: PatchDictionary
) -> None:
    """The whole job: codes that were stored, groups, and frames out of the world's folder alone."""
    keys = [*SMALL_WORLD, "model.context=4", "model.group=5", "model.size=10k", "train.steps=4"]
    config = override(stored(tmp_path, games, dictionary), keys)
    with tracking.start("pretrain", config, quiet=True) as run:
        artifact = JOB.run(config, run)
    assert artifact.meta["inputs"] == {"datasets": ["d0"], "tokenizers": ["cells"]}
    shutil.rmtree(tmp_path / "tokenizers")
    env = WorldVectorEnv(3, World.load(artifact.path), horizon=3)
    frames, _ = env.reset(seed=0)
    frames, *_ = env.step(np.ones(3, np.int64))
    assert frames.shape == (3, 40, 40, 3)
    patches = cut(frames, 8).reshape(-1, 192)
    assert dictionary.known(patches).all(), "every cell is one of the dictionary's"
    env.close()


def stored(root: Path, games: Dataset, dictionary: PatchDictionary) -> PretrainConfig:
    """The config of a pretraining of games, which are stored with their tokenizer."""
    storage = Storage(str(root))
    numbers = spaces.Box(-9, 9, (2,), np.float32)
    other = [
        Episode(k, k, "random", [np.ones(2)] * 6, [np.int64(0)] * 5, np.ones(5), "terminated")
        for k in range(4)
    ]

    def copied(folder: Path) -> None:
        shutil.copytree(games.paths[0], folder, dirs_exist_ok=True)

    def written(folder: Path) -> None:
        write(folder.parent, other, numbers, folder.name)

    storage.make("datasets", "d0", {}, copied)
    storage.make("datasets", "other", {}, written)
    storage.make("tokenizers", "cells", {}, Tokenizers(("observation",), (dictionary,)).save)
    config = PretrainConfig()
    config.storage.root = str(root)
    config.data.datasets, config.data.tokenizer = ["d0"], "cells"
    config.model = ModelConfig(size="10k", members=2, context=4)
    return config
