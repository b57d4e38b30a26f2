"""Tokenizers of frames: the dictionary, and the job `tokenize`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.data.tokens import counting, making
from mesocosm.data.tokens.counting import PatchCounts
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.jobs.tokenize import JOB, TokenizeConfig
from mesocosm.model.tokenizer.dictionary import PatchDictionary, hashed
from mesocosm.model.tokenizer.frames import as_bytes, as_dtype, cut, paste
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

from .test_images import Array, episode

Tokenize = Callable[..., Artifact]
SIDE = 12
SCREEN = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
TILES = np.random.default_rng(5).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
"""Six kinds of tiles of 4 x 4 pixels."""


def screen(index: int, step: int, kinds: int = 4) -> Array:
    """A frame of 3 x 3 tiles, of which the middle one changes."""
    frame = np.tile(TILES[0], (3, 3, 1))
    frame[4:8, 4:8] = TILES[(index + step) % kinds]
    return frame


def more(index: int, step: int) -> Array:
    """Frames with two kinds of tiles more."""
    return screen(index, step, 6)


@pytest.fixture
def tokenize(root: str, a_run: tracking.Run) -> Tokenize:
    """`tokenize(key=value)` makes a tokenizer of d0."""

    def make(**keys: Any) -> Artifact:
        a_run.storage = Storage(root)
        return JOB.run(configured(root, **keys), a_run)

    return make


def configured(root: str, datasets: tuple[str, ...] = ("d0",), **keys: Any) -> TokenizeConfig:
    config = TokenizeConfig(**{"patch": 4, **keys})
    config.data.datasets = list(datasets)
    config.storage.root = root
    return config


def codes_of(artifact: Artifact, dataset: str = "d0", image: str = "obs_image0") -> Array:
    files = sorted(artifact.path.glob(f"codes/{dataset}/*/{image}.npy"))
    return np.concatenate([np.load(file) for file in files])


def test_patches_and_hashes() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3)).astype(np.uint8)
    patches = cut(frames, 4)
    assert patches.shape == (5, 6, 48)
    np.testing.assert_array_equal(patches[2, 4].reshape(4, 4, 3), frames[2, 4:8, 4:8])
    np.testing.assert_array_equal(paste(patches, (8, 12, 3), 4), frames)
    rows = np.eye(255, 27, dtype=np.uint8)  # one byte of 27 is set, in the last word's rest too
    assert len(np.unique(hashed(rows[:28]))) == 28
    pairs = np.random.default_rng(1).integers(0, 2, (4096, 48)).astype(np.uint8) << 7
    assert len(np.unique(hashed(pairs))) == len(np.unique(pairs, axis=0)), "top bits alone"
    floats = np.linspace(0, 1, 256).reshape(1, 16, 16, 1).astype(np.float32)
    assert as_bytes(floats).ravel().tolist() == list(range(256))
    np.testing.assert_array_equal(as_dtype(as_bytes(floats), floats.dtype), floats)


def test_the_nearest_patch_stands_for_one_without_a_code() -> None:
    table = np.array([[0] * 16, [100] * 16, [200] * 16], np.uint8)
    tokenizer = PatchDictionary((4, 8, 1), 4, table)
    frames = np.zeros((1, 4, 8, 1), np.uint8)
    frames[0, :, 4:] = 140
    codes, known = tokenizer.lookup(frames)
    assert codes.tolist() == [[0, 1]] and known.tolist() == [[True, False]]
    assert tokenizer.decode(codes)[0, 0, :, 0].tolist() == [0] * 4 + [100] * 4
    assert tokenizer.sizes == (3, 3) and tokenizer.grid == (1, 2)


def test_a_dictionary_is_exact_where_frames_are_of_tiles(
    write_walks: Callable[..., str], tokenize: Tokenize, root: str, a_run: tracking.Run
) -> None:
    write_walks([episode(k, 9, screen) for k in range(8)], observation_space=SCREEN, shard_rows=25)
    artifact = tokenize()
    report = json.loads((artifact.path / "report.json").read_text())
    (image,) = report["images"]
    assert image["grid"] == [3, 3] and image["codes"] == 4 and image["bytes_a_frame"] == 9
    for split in ("train", "valid"):
        assert image[split]["exact"] == 1.0 and image[split]["psnr"] is None
        assert image[split]["unseen"] == 0.0 and image[split]["codes_used"] == 4
    assert image["train"]["frames"] + image["valid"]["frames"] == 80
    codes = codes_of(artifact)
    assert codes.dtype == np.uint8 and codes.shape == (80, 9)
    (tokenizer,) = Tokenizers.load(artifact.path).each
    frames = np.stack([screen(k, t) for k in range(8) for t in range(10)])
    np.testing.assert_array_equal(tokenizer.decode(codes.astype(np.int64)), frames)
    np.testing.assert_array_equal(tokenizer.encode(frames), codes)
    page = (artifact.path / "tokenizer.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "100.0% of held-out frames" in page
    assert tokenize().id == artifact.id, "it is made once"
    lines = (a_run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["tokenizer/exact"] == 1.0
    assert not Storage(root).list(making.FOLDER)


def test_frames_of_several_images(write_walks: Callable[..., str], tokenize: Tokenize) -> None:
    def look(index: int, step: int) -> dict[str, Array]:
        grey = np.full((4, 8, 1), ((index + step) % 3) / 255, np.float32)
        return {"a": screen(index, step), "b": np.float32(step), "c": grey}

    space = spaces.Dict(
        a=SCREEN, b=spaces.Box(0, 99, (), np.float32), c=spaces.Box(0, 1, (4, 8, 1), np.float32)
    )
    write_walks([episode(k, 9, look) for k in range(6)], observation_space=space)
    artifact = tokenize()
    images = json.loads((artifact.path / "report.json").read_text())["images"]
    assert [image["name"] for image in images] == ["observation.a", "observation.c"]
    assert [image["codes"] for image in images] == [4, 3]
    assert codes_of(artifact, image="obs_image1").shape == (60, 2)


def test_a_grown_dictionary_keeps_its_codes(
    write_walks: Callable[..., str], tokenize: Tokenize, golden: Any
) -> None:
    facts: dict[str, Any] = {"observation_space": SCREEN}
    write_walks([episode(k, 9, screen) for k in range(6)], **facts)
    write_walks([episode(k, 9, more) for k in range(6)], "d1", **facts)
    old = tokenize()
    grown = tokenize(datasets=("d0", "d1"), tokenizer=old.id)
    (before,), (after,) = (Tokenizers.load(a.path).each for a in (old, grown))
    assert max(before.sizes) == 4 and max(after.sizes) == 6
    assert isinstance(before, PatchDictionary) and isinstance(after, PatchDictionary)
    np.testing.assert_array_equal(after.table[:4], before.table)
    np.testing.assert_array_equal(codes_of(grown), codes_of(old))
    report = json.loads((grown.path / "report.json").read_text())["images"][0]
    assert report["train"]["exact"] == 1.0
    weights = golden.of_weights(grown.path / "tokenizer.safetensors")
    codes = golden.of_files(grown.path / "codes" / "d1")
    golden.check("tokenize", {"codes": codes, "table": weights})
    assert grown.meta["inputs"] == {"datasets": ["d0", "d1"], "tokenizers": [old.id]}
    with pytest.raises(UsageError, match="patch must be 4, as in tokenizer="):
        tokenize(tokenizer=old.id, patch=2)
    with pytest.raises(UsageError, match="codes must be >= 4, those of observation"):
        tokenize(tokenizer=old.id, codes=3)


def test_a_killed_job_goes_on(
    write_walks: Callable[..., str], tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    """What is stored is not made again, and the tokenizer is the same to the byte."""
    write_walks([episode(k, 9, screen) for k in range(8)], observation_space=SCREEN, shard_rows=25)
    whole = tokenize()
    expected = _bytes(whole)
    encode, calls = PatchDictionary.encode, list[int]()

    def killed(self: PatchDictionary, frames: Array) -> Array:
        calls.append(len(frames))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, frames)

    with monkeypatch.context() as patched:
        patched.setattr(PatchDictionary, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize(force=True)
    assert Storage(root).list(making.FOLDER)
    with monkeypatch.context() as patched:
        patched.setattr(PatchCounts, "add", lambda *_: pytest.fail("counted again"))
        again = tokenize(force=True)
    assert _bytes(again) == expected


def _bytes(artifact: Artifact) -> dict[str, bytes]:
    """The content of each file, by its path."""
    files = (p for p in artifact.path.rglob("*") if p.is_file() and p.name != "COMMIT.json")
    return {str(path.relative_to(artifact.path)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"patch": 5}, r"patch must divide the 12 x 12 pixels of observation, got 5; try one of 1"),
        ({"codes": 1}, r"codes must be in \[2, 65536\], got 1"),
        ({"kind": "vq"}, r"kind must be one of auto, dictionary, fsq; got 'vq'"),
        ({"steps": 0}, r"steps must be >= 1, got 0"),
        ({"codes": 1 << 17}, r"codes must be in \[2, 65536\], got 131072"),
        ({"tokenizer": "nothing"}, r"nothing"),
        ({"datasets": ()}, r"data\.datasets must name a dataset"),
    ],
)
def test_wrong_keys_are_refused(
    write_walks: Callable[..., str], root: str, keys: dict[str, Any], words: str
) -> None:
    write_walks([episode(k, 9, screen) for k in range(6)], observation_space=SCREEN)
    with pytest.raises(UsageError, match=words) as caught:
        JOB.plan(configured(root, **keys))
    assert "\n" not in str(caught.value)


def test_more_codes_than_memory_are_refused(
    write_walks: Callable[..., str], root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_walks([episode(k, 9, screen) for k in range(6)], observation_space=SCREEN)
    monkeypatch.setattr("mesocosm.jobs.tokenize.MEMORY", 4800)
    with pytest.raises(UsageError, match=r"codes=101 .*lower codes to 100"):
        JOB.plan(configured(root, codes=101))


@pytest.mark.parametrize(("level", "words"), [(0, "are black"), (9, "are equal")])
def test_frames_that_are_all_alike_are_refused(
    write_walks: Callable[..., str], tokenize: Tokenize, level: int, words: str
) -> None:
    frames = [episode(k, 9, lambda i, t: np.full((SIDE, SIDE, 3), level, np.uint8)) for k in (0, 1)]
    write_walks(frames, observation_space=SCREEN)
    with pytest.raises(UsageError, match=rf"observation uses 1 code in 20 frames.*{words}"):
        tokenize()


def test_pictures_without_sprites_are_refused(
    write_walks: Callable[..., str], tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "MOST_CODES", 50)

    def noise(index: int, step: int) -> Array:
        return np.random.default_rng([index, step]).integers(0, 256, SCREEN.shape).astype(np.uint8)

    write_walks([episode(k, 9, noise) for k in range(6)], observation_space=SCREEN)
    with pytest.raises(UsageError, match=r"more than 50 distinct patches of 4 x 4 .* kind=fsq"):
        tokenize(kind="dictionary")


def test_data_without_images_and_other_images_are_refused(
    write_walks: Callable[..., str], tokenize: Tokenize
) -> None:
    from .walks import walk

    write_walks([walk(k) for k in range(3)], "walks")
    with pytest.raises(UsageError, match="must have an image in their observation"):
        tokenize(datasets=("walks",))
    write_walks([episode(k, 9, screen) for k in range(6)], observation_space=SCREEN)
    other = spaces.Box(0, 255, (8, 8, 1), np.uint8)
    small = [episode(k, 9, lambda i, t: np.full((8, 8, 1), t, np.uint8)) for k in range(6)]
    write_walks(small, "d1", observation_space=other)
    with pytest.raises(UsageError, match=r"is for the images .* fit another one"):
        tokenize(datasets=("d1",), tokenizer=tokenize().id)


def test_a_damaged_tokenizer_is_reported(tmp_path: Path) -> None:
    table = np.arange(48, dtype=np.uint8).reshape(3, 16)
    Tokenizers(("observation",), (PatchDictionary((4, 4, 1), 4, table),)).save(tmp_path)
    assert Tokenizers.load(tmp_path).each[0].sizes == (3,)
    (tmp_path / "tokenizer.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a tokenizer, or it is damaged"):
        Tokenizers.load(tmp_path)


@pytest.mark.integration
def test_the_grid_game_is_exact_on_new_frames(
    collect: Callable[..., Artifact], tokenize: Tokenize, root: str
) -> None:
    """Nine kinds of cells are seen in few frames."""
    from mesocosm.policies.behaviours import BehaviourConfig

    from .reality import config

    behaviours = [BehaviourConfig("noisy", noise=0.5, function="mesocosm.envs.pixels:catch")]
    logs = [
        config(root, "mesocosm.envs.pixels:CoinGrid", steps=400, behaviours=behaviours, seed=seed)
        for seed in (0, 1)
    ]
    first, second = (collect(job) for job in logs)
    artifact = tokenize(datasets=(first.id,), patch=8)
    (tokenizer,) = Tokenizers.load(artifact.path).each
    assert len(tokenizer.sizes) == 25 and max(tokenizer.sizes) <= 12
    for new in Dataset([second.path]).iter_episodes():
        frames = np.stack(new.observations)
        np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(frames)), frames)
