"""Images of observations: the rule for spaces, frames on disk, and jobs that meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.images import CHUNK, FrameWriter, ImageRows, is_image
from mesocosm.datasets.spaces import SpaceCodec, check_spaces
from mesocosm.envs.pixels import STEP_S, PixCart, read_cart, read_grid
from mesocosm.errors import ArtifactError, MesocosmError, UsageError
from mesocosm.evaluate.metrics.coverage import compare, summarise
from mesocosm.evaluate.report import coverage_page
from mesocosm.jobs.pretrain import JOB
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.train.config import PretrainConfig

from .reality import config
from .walks import reasons, report, stored

Array = np.ndarray[Any, Any]
RGB = spaces.Box(0, 255, (6, 8, 3), np.uint8)
GREY = spaces.Box(0, 1, (4, 4, 1), np.float32)
CAMERAS = spaces.Dict(front=RGB, pose=spaces.Box(-9, 9, (2,), np.float32), top=GREY)


def picture(index: int, step: int, shape: tuple[int, ...] = (6, 8, 3)) -> Array:
    rng = np.random.default_rng([index, step])
    return rng.integers(0, 256, shape).astype(np.uint8)


def seen(index: int, step: int) -> dict[str, Array]:
    return {
        "front": picture(index, step),
        "pose": np.array([index, step], np.float32) / 8,
        "top": np.full((4, 4, 1), (index + step) / 64, np.float32),
    }


def episode(index: int, length: int, look: Callable[[int, int], Any] = seen) -> Episode:
    return Episode(
        index=index,
        seed=index,
        behaviour="random",
        observations=[look(index, step) for step in range(length + 1)],
        actions=[np.int64(step % 3) for step in range(length)],
        rewards=np.ones(length),
        outcome="terminated",
    )


@pytest.mark.parametrize(
    ("space", "image"),
    [
        (RGB, True),
        (GREY, True),
        (spaces.Box(0, 255, (1, 1, 1), np.uint8), True),
        (spaces.Box(0, 1, (4, 84, 84), np.float32), False),
        (spaces.Box(-1, 1, (4, 4, 3), np.float32), False),
        (spaces.Box(0, 255, (8, 8), np.uint8), False),
        (spaces.Box(0, 255, (4, 4, 3), np.int16), False),
    ],
)
def test_which_boxes_are_images(space: spaces.Box, image: bool) -> None:
    codec = SpaceCodec(space)
    assert is_image(space) == image
    assert len(codec.image_leaves) == image
    assert codec.numbers == (0 if image else int(np.prod(space.shape)))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 8, 4), "alpha channel .* stack of 4 frames.*wrapper"),
        ((3, 8, 8), "channels come first; transpose"),
        ((4, 84, 84), "stack of frames.*newest frame"),
        ((4, 8, 8, 3), "stack of frames.*newest frame"),
    ],
)
def test_other_layouts_of_pictures_are_refused(shape: tuple[int, ...], words: str) -> None:
    space = spaces.Dict(camera=spaces.Box(0, 255, shape, np.uint8))
    with pytest.raises(UsageError, match=rf"observation\.camera must be .*{words}") as caught:
        SpaceCodec(space)
    assert "\n" not in str(caught.value)


def test_actions_and_tables_hold_no_images() -> None:
    with pytest.raises(UsageError, match="action must not be an image"):
        check_spaces(RGB, RGB)
    table = spaces.Dict(present=spaces.MultiBinary(6), icon=spaces.Box(0, 255, (6, 8, 3), np.uint8))
    with pytest.raises(UsageError, match=r"observation\.things\.icon must not be an image"):
        check_spaces(spaces.Dict(things=table), spaces.Discrete(2))


@pytest.mark.parametrize("shard_rows", [1 << 20, 20])
def test_frames_of_several_cameras_round_trip(write: Callable[..., Path], shard_rows: int) -> None:
    lengths = [5, 16, 40, 1]
    folder = write(
        [episode(k, length) for k, length in enumerate(lengths)],
        observation_space=CAMERAS,
        shard_rows=shard_rows,
    )
    dataset = Dataset([folder])
    assert dataset.image_names == ["obs_image0", "obs_image1"]
    for k, read in enumerate(dataset.iter_episodes()):
        assert len(read) == lengths[k]
        for step, observation in enumerate(read.observations):
            for name, value in seen(k, step).items():
                np.testing.assert_array_equal(observation[name], value)
                assert observation[name].dtype == value.dtype
    table = pq.read_table(folder / "episodes" / "00000.parquet")
    assert table.schema.field("observation").type.get_field_index("front") == -1
    assert table["observation"].to_pylist()[2] == {"pose": [0.0, 0.25]}


def test_images_alone_have_no_column_in_the_table(write: Callable[..., Path]) -> None:
    folder = write([episode(0, 4, picture)], observation_space=RGB)
    table = pq.read_table(folder / "episodes" / "00000.parquet")
    assert "observation" not in table.column_names and len(table) == 5


def test_rows_are_read_in_any_order(write: Callable[..., Path]) -> None:
    folder = write([episode(k, 50, picture) for k in range(3)], observation_space=RGB)
    dataset = Dataset([folder])
    at = np.array([[152, 0], [51, 17], [17, 100]])
    frames = dataset.gather("obs_image0", np.zeros(3, np.int64), at)
    expected = [[picture(*divmod(int(i), 51)) for i in row] for row in at]
    np.testing.assert_array_equal(frames, np.array(expected))
    with pytest.raises(ArtifactError, match=r"obs_image0\.bin.*missing or damaged"):
        path = folder / "shards" / "00000" / "obs_image0.bin"
        path.write_bytes(path.read_bytes()[:-9])
        Dataset([folder]).images(0, "obs_image0")


def test_frames_give_the_same_bytes_however_they_come() -> None:
    frames = np.stack([picture(0, step) for step in range(100)])
    whole, pieces = FrameWriter(), FrameWriter()
    whole.add(frames)
    for start in range(0, 100, 7):
        pieces.add(frames[start : start + 7])
        assert pieces._rest is None or len(pieces._rest) < CHUNK, "raw frames in memory"
    chunks, offsets = whole.close()
    assert pieces.close()[0] == chunks and len(offsets) == 8
    rows = ImageRows(chunks, offsets, 100, RGB, "here")
    np.testing.assert_array_equal(rows[40:60], frames[40:60])
    broken = bytearray(chunks)
    broken[int(offsets[3]) + 8 : int(offsets[3]) + 40] = bytes(32)
    with pytest.raises(ArtifactError, match="damaged"):
        damaged = ImageRows(bytes(broken), offsets, 100, RGB, "here")
        assert (damaged[48:64] == frames[48:64]).all() or pytest.fail("a wrong frame was read")


def test_a_missing_codec_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    without = SimpleNamespace(Codec=SimpleNamespace(is_available=lambda name: False))
    monkeypatch.setattr("mesocosm.datasets.images.pa", without)
    with pytest.raises(UsageError, match="pyarrow with zstd"):
        FrameWriter()


def test_collected_frames_are_small_and_exact(
    collect: Callable[..., Any], root: str, tmp_path: Path
) -> None:
    """At most 400 bytes a drawn frame of 64 x 64, without loss."""
    behaviours = [BehaviourConfig("noisy", noise=0.3, function="mesocosm.envs.pixels:Balancer")]
    reality = {"kwargs": {"size": 64}}
    job = config(
        root, "mesocosm.envs.pixels:PixCart", steps=150, reality=reality, behaviours=behaviours
    )
    dataset = Dataset([collect(job).path])
    files = list(dataset.paths[0].glob("shards/*/obs_image0*"))
    rows = dataset.transitions + len(dataset.table)
    assert sum(file.stat().st_size for file in files) <= 400 * rows
    first = dataset.episode(0)
    env = PixCart(64)
    observation, _ = env.reset(seed=first.seed)
    for action, expected in zip(first.actions, first.observations[1:], strict=True):
        observation, *_ = env.step(action)
        np.testing.assert_array_equal(observation, expected)


class Growing(gymnasium.Env[Array, np.int64]):
    """Frames change their size, or are floats beyond 1, at the third step."""

    observation_space = RGB
    action_space = spaces.Discrete(3)

    def __init__(self, trouble: str = "size"):
        self.trouble = trouble

    def reset(
        self, *, seed: int | None = None, options: Any = None
    ) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self.step_count = 0
        return picture(0, 0), {}

    def step(self, action: np.int64) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self.step_count += 1
        frame = picture(0, self.step_count)
        if self.step_count == 3:
            frame = frame[:-1] if self.trouble == "size" else frame.astype(np.float32)
        return frame, 0.0, False, self.step_count == 4, {}


@pytest.mark.parametrize(("trouble", "words"), [("size", "several shapes"), ("dtype", "dtype")])
def test_episodes_whose_frames_change_are_dropped_with_a_reason(
    collect: Callable[..., Any], root: str, trouble: str, words: str
) -> None:
    job = config(root, f"{__name__}:Growing", steps=24, reality={"kwargs": {"trouble": trouble}})
    with pytest.raises(MesocosmError, match=f"(?s)observation.*{words}") as caught:
        collect(job)
    assert "\n" not in str(caught.value)


def test_curation_sees_frames(
    write_walks: Callable[..., str], curate: Callable[..., Any], root: str
) -> None:
    def almost(index: int, step: int) -> Array:
        """Episode 2 is a copy of episode 1, and episode 3 but for one pixel of one frame."""
        frame = picture(1 if index in (2, 3) else index, step)
        if index == 3 and step == 5:
            frame[0, 0, 0] ^= 1
        return frame

    episodes = [replace(episode(k, 12, almost), seed=0) for k in range(6)]
    write_walks(episodes, observation_space=RGB, valid_fraction=0.0)
    artifact = curate({"op": "exact_duplicates"})
    report(artifact)
    assert list(reasons(artifact)) == [2]
    np.testing.assert_array_equal(
        np.stack(Dataset([artifact.path]).episode(2).observations),
        np.stack(stored(root).episode(3).observations),
    )
    near = curate({"op": "near_duplicates", "tolerance": 0.3}, {"op": "stuck", "steps": 3})
    account = report(near)
    assert list(reasons(near)) == [2, 3]
    assert account["operations"][1]["notes"] == [
        "observation is an image, whose pixels are not examined"
    ]


def test_images_have_no_groups(write_walks: Callable[..., str], curate: Callable[..., Any]) -> None:
    facts: dict[str, Any] = {"observation_space": CAMERAS, "task": ["front"]}
    write_walks([episode(k, 4) for k in range(3)], valid_fraction=0.0, **facts)
    with pytest.raises(UsageError, match=r"observation\.front is an image, which has no groups"):
        curate({"op": "balance", "by": "front"})


@pytest.mark.integration
@pytest.mark.parametrize("space", [RGB, CAMERAS])
def test_coverage_says_what_it_does_not_see(
    write: Callable[..., Path], space: gymnasium.Space[Any], tmp_path: Path
) -> None:
    look = picture if space is RGB else seen
    dataset = Dataset([write([episode(k, 40, look) for k in range(6)], observation_space=space)])
    summary = summarise(dataset, name="pictures")
    assert "image" in summary["notes"][0]
    coverage_page.write(summary, tmp_path)
    assert json.loads((tmp_path / coverage_page.SUMMARY).read_text())["schema"] == 1
    assert (compare(dataset, dataset) is None) == (space is RGB)


def test_pretraining_refuses_images_before_it_starts(
    write_walks: Callable[..., str], root: str
) -> None:
    write_walks([episode(k, 12) for k in range(6)], observation_space=CAMERAS)
    for family in ("ensemble", "sequence", "language"):
        pretrain = PretrainConfig()
        pretrain.storage.root, pretrain.data.datasets = root, ["d0"]
        pretrain.model.family, pretrain.model.members = family, 1
        with pytest.raises(UsageError, match=r"observation\.front is an image"):
            JOB.plan(pretrain)


def test_the_places_of_cart_and_pole_are_in_the_frame() -> None:
    env = PixCart()
    frame, _ = env.reset(seed=1)
    for step in range(8):
        place = read_cart(frame[None])[0]
        x, speed, angle, turn = env._state
        assert abs(place[0] - x) < 0.02 and abs(place[1] - angle) < 0.02, step
        assert abs(speed) * STEP_S < 0.2 and abs(turn) * STEP_S < 0.2
        frame, *_ = env.step(np.int64(step % 2))
    with pytest.raises(UsageError, match=r"reality\.kwargs\.size must be 32 or 64, got 48"):
        PixCart(48)


def test_a_frame_of_the_grid_game_has_one_of_each_sprite(
    collect: Callable[..., Any], root: str
) -> None:
    behaviours = [BehaviourConfig("scripted", function="mesocosm.envs.pixels:catch")]
    job = config(root, "mesocosm.envs.pixels:CoinGrid", steps=120, behaviours=behaviours)
    dataset = Dataset([collect(job).path])
    for read in dataset.iter_episodes():
        shown = read_grid(np.stack(read.observations))
        assert all((where.sum((1, 2)) == 1).all() for where in shown.values())
        assert set(np.unique(read.rewards)) <= {-1.0, 0.0, 1.0}
        assert (read.outcome == "terminated") == (read.rewards[-1] == -1)
