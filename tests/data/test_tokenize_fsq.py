"""Learned tokenizers of frames: training, the choice of a kind, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from mesocosm.data.tokens import making
from mesocosm.data.tokens.learning import LEVELS, fit_fsq
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.pixels import Balancer, PixCart, read_cart
from mesocosm.errors import UsageError
from mesocosm.jobs.tokenize import JOB
from mesocosm.model.tokenizer.fsq import PatchFSQ
from mesocosm.model.tokenizer.kinds import tokenizer_from_json, tokenizer_to_json
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

from .test_images import Array, episode
from .test_tokenize import SCREEN, configured, screen


@cache
def drive(index: int) -> list[Array]:
    """31 frames of an episode of PixCart by a noisy script."""
    env, act, rng = PixCart(), Balancer(), np.random.default_rng(index)
    act.start(index, rng)
    frame, _ = env.reset(seed=index)
    frames = [frame]
    for _ in range(30):
        action = act(frame, rng) if rng.random() < 0.7 else np.int64(rng.integers(2))
        frame, *_ = env.step(action)
        frames.append(frame)
    return frames


def driven(index: int, step: int) -> Array:
    return drive(index)[step]


@pytest.fixture
def tokenize(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    def make(**keys: Any) -> Artifact:
        a_run.storage = Storage(root)
        return JOB.run(configured(root, **{"patch": 8, "steps": 300, **keys}), a_run)

    return make


def write_carts(write_walks: Callable[..., str], **facts: Any) -> None:
    episodes = [episode(k, 29, driven) for k in range(12)]
    write_walks(episodes, observation_space=PixCart().observation_space, **facts)


@pytest.mark.integration
def test_it_learns_where_the_cart_is() -> None:
    """A few hundred steps show the cart and the pole within some pixels."""
    frames = np.stack([driven(k, t) for k in range(10) for t in range(31)])
    median = np.median(frames, 0).astype(np.uint8)
    before, after = (fit_fsq(frames, median, 8, steps, 0, "observation") for steps in (1, 600))
    new = np.stack([driven(k, t) for k in (10, 11) for t in range(31)])
    errors = []
    for one in (before, after):
        codes = one.encode(new)
        assert codes.shape == (62, 64) and codes.max() < 8 and one.sizes == LEVELS * 16
        wrong = one.decode(codes).astype(np.int64) - new
        errors.append(float((wrong**2).mean()))
    assert errors[1] < 0.2 * errors[0]
    seen, true = read_cart(after.decode(after.encode(new))), read_cart(new)
    assert np.nanmedian(np.abs(seen - true)[:, 0]) < 0.1, "metres; a pixel is .19"


def test_the_same_seed_gives_the_same_bits() -> None:
    frames = np.stack([driven(0, t) for t in range(31)])
    median = frames[0]
    states = [fit_fsq(frames, median, 16, 5, seed, "observation").state() for seed in (1, 1, 2)]
    same = [all((states[0][k] == other[k]).all() for k in other) for other in states[1:]]
    assert same == [True, False]
    one = PatchFSQ.of(states[0])
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer_to_json(one))))
    np.testing.assert_array_equal(again.encode(frames), one.encode(frames))
    np.testing.assert_array_equal(again.decode(one.encode(frames)), one.decode(one.encode(frames)))


def test_frames_that_are_all_alike_are_refused() -> None:
    black = np.zeros((20, 16, 16, 1), np.uint8)
    with pytest.raises(UsageError, match=r"observation uses 1 code in 20 frames.* are black"):
        fit_fsq(black, black[0], 8, 2, 0, "observation")


@pytest.mark.integration
def test_auto_takes_a_dictionary_where_it_fits(
    write_walks: Callable[..., str], tokenize: Callable[..., Artifact]
) -> None:
    write_walks([episode(k, 9, screen) for k in range(6)], observation_space=SCREEN)
    write_carts(write_walks, id="carts")
    kinds = []
    for dataset, keys in (("d0", {"patch": 4}), ("carts", {}), ("d0", {"patch": 4, "codes": 2})):
        artifact = tokenize(datasets=(dataset,), **{"codes": 32, "steps": 20, **keys})
        (one,) = Tokenizers.load(artifact.path).each
        kinds.append(one.kind)
    assert kinds == ["dictionary", "fsq", "fsq"]
    with pytest.raises(UsageError, match="must be of dictionaries to grow, got fsq"):
        tokenize(tokenizer=artifact.id, patch=4)
    with pytest.raises(UsageError, match="to grow, got dictionary and kind"):
        tokenize(tokenizer=tokenize(patch=4).id, patch=4, kind="fsq")


@pytest.mark.integration
def test_a_learned_tokenizer_goes_on_after_its_training(
    write_walks: Callable[..., str],
    tokenize: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
    root: str,
) -> None:
    write_carts(write_walks)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mesocosm.jobs.tokenize.encode", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize(kind="fsq")
    with monkeypatch.context() as patched:
        patched.setattr(making, "fit_fsq", lambda *_: pytest.fail("it was trained again"))
        artifact = tokenize(kind="fsq")
    (image,) = json.loads((artifact.path / "report.json").read_text())["images"]
    assert image["codes"] == 4096 and image["digits"] == 4 and image["bytes_a_frame"] == 64
    assert image["valid"]["psnr"] > 12 and image["valid"]["unseen"] is None
    assert image["train"]["codes_used"] > 2 and image["valid"]["exact"] < 1
    dataset = Dataset([Storage(root).artifact("datasets", "d0").path])
    (path,) = artifact.path.glob("codes/d0/*/obs_image0.npy")
    assert np.load(path).shape == (dataset.transitions + len(dataset.table), 64)
