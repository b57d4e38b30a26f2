"""LeRobot folders with real videos, which PyAV encodes here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from mesocosm.data.ingest.video import FrameProblem, Video
from mesocosm.datasets.dataset import Dataset
from mesocosm.store.artifacts import Artifact

from .logs import checksums, columns, planned, refused, report
from .pictures import CAMERA, FPS, HEIGHT, WIDTH, frame, lerobot_v2, lerobot_v3, write_video

Import = Callable[..., Artifact]
LENGTHS = (12, 9, 15)
VIDEO = Path("videos") / CAMERA / "chunk-000" / "file-000.mp4"


def near(one: Any, other: Any) -> bool:
    """True if two frames differ by no more than a lossy video does."""
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return bool(10 * np.log10(255**2 / max(float(error), 1e-9)) > 30)


def check_frames(dataset: Dataset, lengths: tuple[int, ...]) -> None:
    for k, length in enumerate(lengths):
        episode = dataset.episode(k)
        assert len(episode) == length - 1, "nothing follows LeRobot's last action"
        for t, seen in enumerate(episode.observations):
            top = seen["images"]["top"]
            assert top.shape == (HEIGHT, WIDTH, 3) and top.dtype == np.uint8
            assert near(top, frame(k, t)) and not near(top, frame(k, t + 1)), (k, t)
            assert seen["state"].tolist() == [t / 2, float(k)]


@pytest.mark.parametrize("make", [lerobot_v3, lerobot_v2])
def test_a_lerobot_dataset_with_a_video(
    make: Callable[..., Path], folder: Path, import_logs: Import
) -> None:
    robot = make(folder / "robot", LENGTHS)
    plan = planned(robot)
    assert plan["transitions"] == sum(LENGTHS) - 3
    result = import_logs(robot)
    dataset = Dataset([result.path])
    assert isinstance(dataset.observation_space, spaces.Dict)
    check_frames(dataset, LENGTHS)
    assert columns(report(result))[CAMERA]["became"].endswith("Box(24, 32, 3) uint8")
    # What can be exported is: all but the frames.
    rows = pq.read_table(dataset.paths[0] / "episodes").to_pylist()
    assert len(rows) == sum(LENGTHS) and rows[1]["observation"] == {"state": [0.5, 0.0]}
    assert rows[1]["action"] == [0.25] and rows[1]["reward"] == 1.0


def test_one_camera_alone_is_the_observation(folder: Path, import_logs: Import) -> None:
    dataset = Dataset([import_logs(lerobot_v3(folder / "robot", (8, 8), state=False)).path])
    assert dataset.observation_space.shape == (HEIGHT, WIDTH, 3)
    assert near(dataset.episode(1).observations[3], frame(1, 3))


def test_the_states_alone(folder: Path, import_logs: Import) -> None:
    robot = lerobot_v3(folder / "robot", (8, 8))
    (robot / VIDEO).unlink()
    names = {"observation": "observation.state"}
    dataset = Dataset([import_logs(robot, columns=names).path])
    assert dataset.observation_space.shape == (2,)


def test_another_video_is_another_dataset(folder: Path, import_logs: Import) -> None:
    robot = lerobot_v3(folder / "robot", (8, 8))
    first = import_logs(robot).id
    assert import_logs(robot).id == first
    write_video(robot / VIDEO, [frame(3, t) for t in range(16)])
    assert import_logs(robot).id != first


@pytest.mark.integration
def test_faults_of_one_episode(folder: Path, import_logs: Import) -> None:
    """Each is refused, naming the episode; bad=drop leaves the episode out."""

    def late(rows: Any, places: Any) -> None:
        rows[14]["timestamp"] += 0.5 / FPS  # episode 1, between two frames

    def beyond(rows: Any, places: Any) -> None:
        rows[20]["timestamp"] = 9 / FPS  # the first frame of episode 2

    def lost(rows: Any, places: Any) -> None:
        del places[1]

    cases: list[tuple[Any, str, str]] = [
        (late, r"has no frame at 1\.45 s: it has frames at 1\.4 s and at 1\.5 s", "missing frame"),
        (beyond, r"timestamp 0\.9 s is beyond the 0\.9 s of the episode", "unreadable episode"),
        (lost, "meta/episodes does not say where the video", "unreadable episode"),
    ]
    for change, words, reason in cases:
        robot = lerobot_v3(folder / change.__name__, LENGTHS, change=change)
        refused(rf"file-000\.parquet' row \d+: .*{words}.* of episode 1", robot)
        (left,) = planned(robot, bad="drop")["left out"]
        assert (left["reason"], left["episodes"]) == (reason, 1)
        dataset = Dataset([import_logs(robot, bad="drop").path])
        assert sorted(dataset.table["index"].tolist()) == [0, 2]
        assert near(dataset.episode(1).observations[4]["images"]["top"], frame(2, 4))


def test_a_video_that_misses_a_frame(folder: Path) -> None:
    robot = lerobot_v2(folder / "robot", (10, 10))
    video = robot / "videos" / "chunk-000" / CAMERA / "episode_000001.mp4"
    times = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    write_video(video, [frame(1, t) for t in times], times)
    refused(rf"row 5: {CAMERA}: .*has no frame at 0\.4 s: .*0\.3 s and at 0\.5 s.* step 4", robot)
    write_video(video, [frame(1, t) for t in range(7)])
    refused(r"no frame at 0\.7 s: its last one is at 0\.6 s at step 7 of episode 1", robot)
    video.unlink()
    refused(r"episode_000001\.mp4' does not exist at step 0 of episode 1", robot)
    assert planned(robot, bad="drop")["left out"][0]["reason"] == "missing frame"


def test_videos_that_cannot_be_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = lerobot_v3(folder / "robot", (8, 8))
    data = (robot / VIDEO).read_bytes()
    (robot / VIDEO).write_bytes(data.replace(b"avc1", b"zzzz"))
    refused("needs a decoder that this build of FFmpeg lacks; install PyAV", robot)
    refused("needs a decoder", robot, bad="drop")
    (robot / VIDEO).write_bytes(data[: len(data) // 2])
    refused(r"holds no picture that can be read .*: the video .*cannot be read", robot)
    (robot / VIDEO).write_bytes(data)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    refused(r"the package av \(PyAV\), which is not installed .*'mesocosm\[video\]'", robot)


def test_frames_in_any_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [frame(0, t) for t in range(30)])
    video = Video(str(path))
    for t in (0, 1, 2, 20, 3, 29, 29, 0, 13, 12):
        assert near(video.frame(t / FPS), frame(0, t)), t
    with pytest.raises(FrameProblem, match=r"no frame at 3 s: its last one is at 2\.9 s"):
        video.frame(3.0)
    assert near(video.frame(0.5), frame(0, 5)), "an error does not end it"
    video.close()


@pytest.mark.slow
def test_any_number_of_workers(
    folder: Path, tmp_path: Path, import_logs: Import, ray_local: None
) -> None:
    """They check frames; the same bytes are written."""
    robot = lerobot_v2(folder / "robot", LENGTHS)
    results = [
        import_logs(robot, workers=workers, to=str(tmp_path / str(workers))) for workers in (0, 2)
    ]
    assert checksums(results[0]) == checksums(results[1])
