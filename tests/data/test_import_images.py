"""Importing images: folders of PNG or JPEG, Parquet with bytes, lists of numbers, and Minari."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces
from PIL import Image

from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.envs.pixels import CoinGrid
from mesocosm.pictures import png
from mesocosm.store.artifacts import Artifact

from .logs import Rows, checksums, columns, each, planned, refused, report
from .pictures import HEIGHT, WIDTH, episode_folder, frame, jpeg
from .test_import_formats import minari_dataset

Import = Callable[..., Artifact]
SHAPE = (HEIGHT, WIDTH, 3)


def seen_of(dataset: Dataset, number: int) -> list[Any]:
    return list(dataset.episode(number).observations)


# -- folders


def test_folders_of_pictures(folder: Path, import_logs: Import) -> None:
    """One more frame than rows is the observation after the last action."""
    for number, suffix in enumerate((".csv", ".jsonl", ".parquet")):
        episode_folder(folder, number, 20, suffix=suffix, behaviour=lambda step: "me")
    result = import_logs(folder)
    dataset = Dataset([result.path])
    assert dataset.observation_space == spaces.Box(0, 255, SHAPE, np.uint8)
    for k, episode in enumerate(dataset.iter_episodes()):
        assert len(episode) == 20 and episode.outcome == "terminated"
        assert episode.behaviour == "me" and episode.actions[3] == 1
        for t, observation in enumerate(episode.observations):
            assert np.array_equal(observation, frame(k, t)), (k, t)
    row = columns(report(result))["observation"]
    assert row["type"] == "frames" and "first one's size" in row["how"]
    assert import_logs(folder / "episode-0", folder / "episode-1", folder / "episode-2").id == (
        result.id
    )


def test_cameras_beside_numbers(folder: Path, import_logs: Import) -> None:
    """As many frames as rows: the last row's action leads nowhere."""
    speeds: dict[str, Any] = {"observation__speed": lambda step: step / 4}
    for number in range(2):
        episode_folder(folder, number, 6, cameras=("left", "right"), frames=6, **speeds)
    dataset = Dataset([import_logs(folder).path])
    space = dataset.observation_space
    assert isinstance(space, spaces.Dict) and set(space) == {"left", "right", "speed"}
    episode = dataset.episode(1)
    assert len(episode) == 5 and episode.outcome == "unfinished"
    assert episode.observations[5]["speed"] == 1.25
    assert np.array_equal(episode.observations[5]["right"], frame(1, 5))
    (folder / "episode-1" / "left" / "000006.png").write_bytes(png(frame(1, 6)))
    refused(r"episode-1/left' has 7 frames for 6 rows of its table; give one for each row", folder)
    (folder / "episode-0" / "right").rename(folder / "episode-0" / "back")
    (folder / "episode-1" / "right").rename(folder / "episode-1" / "back")
    (folder / "episode-1" / "left" / "000006.png").unlink()
    renamed: Any = Dataset([import_logs(folder).path]).observation_space
    assert set(renamed) == {"left", "back", "speed"}


def test_grey_jpeg_turned_by_its_camera(folder: Path, import_logs: Import) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn

    def turned(picture: Any) -> bytes:
        return jpeg(np.ascontiguousarray(np.rot90(picture[:, :, 1:2])), exif=exif, quality=95)

    episode_folder(folder, 0, 4, encode=turned)
    (first, *_) = seen_of(Dataset([import_logs(folder).path]), 0)
    assert first.shape == (HEIGHT, WIDTH, 1)
    assert np.abs(first.astype(int) - frame(0, 0)[:, :, 1:2]).mean() < 4


def test_pictures_of_a_known_environment(folder: Path, import_logs: Import) -> None:
    env = CoinGrid()
    rng = np.random.default_rng(0)
    observation, seen = env.reset(seed=0)[0], []
    path = episode_folder(folder, 0, 8, frames=0, action=lambda step: int(step % 5))
    for step in range(9):
        seen.append(observation)
        (path / f"{step}.png").write_bytes(png(observation))
        observation = env.step(int(rng.integers(3)))[0]
    id = "mesocosm.envs.pixels:CoinGrid"
    refused(r"action must be in the environment's Discrete", folder, env=id)
    path = episode_folder(folder, 0, 8, frames=0)
    dataset = Dataset([import_logs(folder, env=id).path])
    assert dataset.observation_space == env.observation_space
    assert np.array_equal(np.stack(seen_of(dataset, 0)), np.stack(seen))


Break = Callable[[Path], Any]


def resized(path: Path) -> None:
    (path / "000003.png").write_bytes(png(frame(1, 3, (WIDTH, HEIGHT, 3))))


def with_alpha(path: Path) -> None:
    (path / "000003.png").write_bytes(png(frame(1, 3, (HEIGHT, WIDTH, 4))))


def palette_with_alpha(path: Path) -> None:
    Image.fromarray(frame(1, 3)).quantize(8).save(path / "000003.png", transparency=0)


def deep(path: Path) -> None:
    Image.fromarray(frame(1, 3)[:, :, 0].astype(np.uint16) * 257).save(path / "000003.png")


def cut(path: Path) -> None:
    data = (path / "000003.png").read_bytes()
    (path / "000003.png").write_bytes(data[: len(data) // 2])


def text(path: Path) -> None:
    (path / "000003.png").write_text("no image")


def lost(path: Path) -> None:
    (path / "000003.png").unlink()
    (path / "000006.png").write_bytes(png(frame(1, 6)))


def fewer(path: Path) -> None:
    (path / "000005.png").unlink()
    (path / "000004.png").unlink()


@pytest.mark.parametrize(
    ("break_one", "reason", "words"),
    [
        (resized, "wrong shape", r"must be \[24, 32, 3\] in all frames, got \[32, 24, 3\]"),
        (with_alpha, "alpha channel", r"000003\.png' has an alpha channel"),
        (palette_with_alpha, "alpha channel", r"has an alpha channel"),
        (deep, "unreadable frame", r"is I;16, which is not 8 bits of grey or RGB"),
        (cut, "unreadable frame", r"000003\.png' cannot be read as PNG or JPEG \("),
        (text, "unreadable frame", r"cannot be read as PNG or JPEG \(cannot identify"),
        (lost, "unreadable episode", r"000002\.png' and '000004\.png' a frame is missing"),
        (fewer, "unreadable episode", r"has 4 frames for 5 rows of its table; give one for each"),
    ],
)
def test_a_faulty_frame(
    break_one: Break, reason: str, words: str, folder: Path, import_logs: Import
) -> None:
    for number in range(3):
        episode_folder(folder, number, 5)
    break_one(folder / "episode-1")
    refused(rf"'{folder}/episode-1' row \d: .*{words}.* of episode '", folder)
    (left,) = planned(folder, bad="drop")["left out"]
    assert (left["reason"], left["episodes"]) == (reason, 1)
    dataset = Dataset([import_logs(folder, bad="drop").path])
    assert len(dataset.table) == 2
    assert np.array_equal(seen_of(dataset, 1)[5], frame(2, 5)), "the wrong episode is left out"


def test_folders_that_are_no_episodes(folder: Path) -> None:
    path = episode_folder(folder, 0, 3)
    (path / "steps.csv").rename(folder / "steps.csv")
    refused("has pictures but no table of steps next to them", path)
    (folder / "steps.csv").rename(path / "steps.csv")
    (path / "more.jsonl").write_text("{}\n")
    refused(r"one table of its steps next to its pictures, got more\.jsonl, steps\.csv", folder)
    (path / "more.jsonl").unlink()
    (path / "steps.csv").write_text("action,reward\n")
    refused("episode-0' has no row; give every step", folder)
    for file in path.glob("*.png"):
        file.write_text("no image")
    episode_folder(folder, 0, 3, frames=0)
    refused("column 'observation' holds no picture that can be read .*cannot identify", folder)


@pytest.mark.integration
def test_a_killed_import_of_pictures_goes_on(
    folder: Path, tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        episode_folder(folder, number, 20)
    cut(folder / "episode-1")
    monkeypatch.setattr("mesocosm.datasets.writer.SHARD_BYTES", 1)
    whole = import_logs(folder, bad="drop", to=str(tmp_path / "whole"))
    assert Dataset([whole.path]).table["shard"].tolist() == [0, 1, 2, 3]
    add = DatasetWriter.add
    for last in range(4):
        count = itertools.count()

        def add_until(
            self: DatasetWriter, *args: Any, count: Any = count, last: int = last
        ) -> None:
            if next(count) == last:
                frames = next(iter(args[1]["obs_image0"]))
                self._frames["obs_image0"].add(frames)  # a chunk that is not part of a shard
                raise KeyboardInterrupt
            add(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(DatasetWriter, "add", add_until)
            with pytest.raises(KeyboardInterrupt):
                import_logs(folder, bad="drop", to=str(tmp_path / str(last)))
        again = import_logs(folder, bad="drop", to=str(tmp_path / str(last)))
        assert checksums(again) == checksums(whole)


# -- Parquet


def picture_rows(count: int = 3, length: int = 5, **changes: Any) -> Rows:
    rows = [
        {
            "episode": k,
            "step": t,
            "observation": {"bytes": png(frame(k, t)), "path": f"{t}.png"},
            "action": t % 2,
            "reward": 1.0,
            "terminated": t == length - 1,
            "truncated": False,
            "next_observation": {"bytes": png(frame(k, t + 1)), "path": None},
        }
        for k in range(count)
        for t in range(length)
    ]
    return each(rows, **changes)


def write_rows(path: Path, rows: Rows, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_hugging_faces_images_and_bytes(
    tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = picture_rows()
    result = import_logs(write_rows(tmp_path / "a.parquet", rows, row_group_size=4))
    dataset = Dataset([result.path])
    for k, t in itertools.product(range(3), range(6)):
        assert np.array_equal(seen_of(dataset, k)[t], frame(k, t))
    names = ("observation", "next_observation")
    plain = each(rows, **{name: lambda row, name=name: row[name]["bytes"] for name in names})
    monkeypatch.setattr(parquet_reader, "BATCH_BYTES", 400)
    other = Dataset([import_logs(write_rows(tmp_path / "b.parquet", plain)).path])
    same = [np.array_equal(seen_of(dataset, k), seen_of(other, k)) for k in range(3)]
    assert same == [True] * 3
    nested = each(
        rows,
        observation=lambda row: {"eye": row["observation"], "x": row["step"] / 2},
        next_observation=lambda row: {"eye": row["next_observation"], "x": (row["step"] + 1) / 2},
    )
    space = Dataset([import_logs(write_rows(tmp_path / "c.parquet", nested)).path])
    assert isinstance(space.observation_space, spaces.Dict)
    assert space.observation_space["eye"].shape == SHAPE


def test_next_frames_are_compared_by_their_pixels(tmp_path: Path) -> None:
    """PNGs of one picture may differ in bytes."""
    rows = picture_rows(1)
    other = Image.fromarray(frame(0, 3))
    other.save(tmp_path / "3.png", optimize=True)
    rows[2]["next_observation"] = {"bytes": (tmp_path / "3.png").read_bytes(), "path": None}
    assert rows[2]["next_observation"]["bytes"] != rows[3]["observation"]["bytes"]
    assert planned(write_rows(tmp_path / "a.parquet", rows))["transitions"] == 5
    rows[2]["next_observation"] = {"bytes": png(frame(0, 4)), "path": None}
    refused("row 3: next_observation .* correct one", write_rows(tmp_path / "b.parquet", rows))


def test_columns_that_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = picture_rows()
    rows[3]["observation"] = {"bytes": None, "path": "3.png"}
    refused("row 4: observation: it is a path without bytes; write", write_rows(path, rows))
    stack = picture_rows(observation=lambda row: [row["observation"]["bytes"]])
    refused("'observation' has the type list<.*binary>, which no space", write_rows(path, stack))
    acts = picture_rows(action=lambda row: row["observation"])
    refused("action must not be an image", write_rows(path, acts))
    rows = picture_rows(behaviour=lambda row: b"me")
    refused("behaviour must be text, got binary", write_rows(path, rows))
    rows = picture_rows()
    rows[7]["observation"] = None
    refused("row 8: observation is missing at step 2 of episode 1", write_rows(path, rows))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 8, 8), "channels come first; transpose"), ((8, 8, 4), "alpha channel"), ((8, 8, 3), "")],
)
def test_lists_of_bytes(
    shape: tuple[int, ...], words: str, tmp_path: Path, import_logs: Import
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (2, 4, *shape)).astype(np.uint8)
    rows = picture_rows(2, 4, observation=lambda row: values[row["episode"], row["step"]].tolist())
    for row in rows:
        del row["next_observation"]
    table, inner = pa.Table.from_pylist(rows), pa.uint8()
    for _ in shape:
        inner = pa.list_(inner)
    at = table.column_names.index("observation")
    table = table.set_column(at, "observation", table["observation"].cast(inner))
    pq.write_table(table, tmp_path / "a.parquet")
    if words:
        refused(
            rf"observation must be \[height, width, channels\].*{words}", tmp_path / "a.parquet"
        )
        return
    dataset = Dataset([import_logs(tmp_path / "a.parquet").path])
    assert len(dataset.image_names) == 1
    assert np.array_equal(np.stack(seen_of(dataset, 1)), values[1])


@pytest.mark.integration
def test_memory_holds_few_frames(tmp_path: Path, import_logs: Import) -> None:
    """One episode of 300 frames of 192 KiB each, 56 MiB in all."""
    picture = np.random.default_rng(0).integers(0, 8, (256, 256, 3)).astype(np.uint8)
    data = jpeg(picture, quality=30)
    path = tmp_path / "a.parquet"
    rows = picture_rows(1, 300, observation=data, next_observation=data)
    write_rows(path, rows)
    del rows
    import_logs(write_rows(tmp_path / "b.parquet", picture_rows(1, 3)))  # imports packages
    tracemalloc.start()
    dataset = Dataset([import_logs(path).path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.episode(0)) == 300
    assert peak < 20 << 20, f"{peak >> 20} MiB"


# -- Minari


def test_minari_with_images(
    tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = spaces.Dict(
        eye=spaces.Box(0, 255, SHAPE, np.uint8),
        grey=spaces.Box(0, 1, (4, 4, 1), np.float32),
        pose=spaces.Box(-9, 9, (2,), np.float32),
    )
    episodes = []
    for k in range(3):
        seen = [
            {
                "eye": frame(k, t),
                "grey": np.full((4, 4, 1), t / 8, np.float32),
                "pose": np.array([k, t], np.float32),
            }
            for t in range(6)
        ]
        stacked = {name: np.stack([each[name] for each in seen]) for name in space}
        episodes.append((stacked, [t % 2 for t in range(5)], [1.0] * 5, [False] * 4 + [True]))
    facts = {"observation_space": space, "action_space": spaces.Discrete(2)}
    minari_dataset("eyes-v0", episodes, **facts)
    dataset = Dataset([import_logs("minari:eyes-v0").path])
    assert dataset.observation_space == space
    for k, t in itertools.product(range(3), range(6)):
        observation = dataset.episode(k).observations[t]
        assert np.array_equal(observation["eye"], frame(k, t))
        assert (observation["grey"] == np.float32(t / 8)).all()
        assert observation["pose"].tolist() == [k, t]
    episodes[1][0]["grey"][2] = 7.0
    minari_dataset("bright-v0", episodes, **facts)
    (left,) = planned("minari:bright-v0")["left out"]
    assert (left["reason"], left["episodes"]) == ("outside the space", 1)
    first = {**facts, "observation_space": spaces.Box(0, 255, (3, 8, 8), np.uint8)}
    frames = np.zeros((3, 3, 8, 8), np.uint8)
    minari_dataset("first-v0", [(frames, [0, 1], [0.0, 0.0], [False, True])], **first)
    refused("channels come first; transpose it", "minari:first-v0")
