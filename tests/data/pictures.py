"""Episodes of pictures to import: folders of PNG, tables with bytes, and videos."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mesocosm.pictures import png

Array = np.ndarray[Any, Any]
FPS = 10
HEIGHT, WIDTH = 24, 32


def frame(episode: int, step: int, shape: tuple[int, ...] = (HEIGHT, WIDTH, 3)) -> Array:
    """A smooth frame with a bar whose place tells the step."""
    picture = np.full(shape, 20 * episode, np.uint8)
    at = 3 * step % shape[1]
    picture[:, at : at + 4] = 255
    picture[: shape[0] // 2, :, -1] = 10 * step % 256
    return picture


def jpeg(picture: Array, **options: Any) -> bytes:
    file = io.BytesIO()
    mode = picture if picture.shape[2] == 3 else picture[:, :, 0]
    Image.fromarray(mode).save(file, "JPEG", **options)
    return file.getvalue()


def episode_folder(
    folder: Path,
    number: int,
    length: int,
    *,
    cameras: Sequence[str] = ("",),
    frames: int | None = None,
    suffix: str = ".csv",
    encode: Callable[[Array], bytes] = png,
    **columns: Callable[[int], Any],
) -> Path:
    """An episode that terminates: `frames` pictures of each camera (T+1), and a table."""
    path = folder / f"episode-{number}"
    for camera in cameras:
        (path / camera).mkdir(parents=True, exist_ok=True)
        for step in range(length + 1 if frames is None else frames):
            name = f"{step:06d}" + (".jpg" if encode is jpeg else ".png")
            (path / camera / name).write_bytes(encode(frame(number, step)))
    rows = [
        {
            "action": step % 2,
            "reward": float(step),
            "terminated": step == length - 1,
            "truncated": False,
            **{name.replace("__", "."): value(step) for name, value in columns.items()},
        }
        for step in range(length)
    ]
    table = path / f"steps{suffix}"
    if suffix == ".csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_video(path: Path, frames: Sequence[Array], times: Sequence[int] | None = None) -> Path:
    """A real video in H.264, as a camera's program writes it: lossy.

    Args:
        path: The file.
        frames: RGB.
        times: The number of each frame in time; 0, 1, ... if None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "8", "g": "5"}
        for number, picture in enumerate(frames):
            image = av.VideoFrame.from_ndarray(picture, format="rgb24")
            image.pts = number if times is None else times[number]
            image.time_base = Fraction(1, FPS)
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


CAMERA = "observation.images.top"


def robot_rows(lengths: Sequence[int], first: int = 0) -> list[dict[str, Any]]:
    """Rows as LeRobot stores them, of episodes first, first+1, ..."""
    return [
        {
            "observation.state": [t / 2, float(k)],
            "action": [t / 4],
            "episode_index": k,
            "frame_index": t,
            "timestamp": t / FPS,
            "next.reward": float(t),
            "next.done": t == length - 1,
        }
        for k, length in enumerate(lengths, first)
        for t in range(length)
    ]


def lerobot_v3(
    folder: Path, lengths: Sequence[int], *, state: bool = True, change: Any = None
) -> Path:
    """A folder of version 3, whose episodes share one data file and one video a camera."""
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {CAMERA: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]}},
    }
    rows, begin, places = robot_rows(lengths), 0.0, []
    for k, length in enumerate(lengths):
        values = {"chunk_index": 0, "file_index": 0}
        values |= {"from_timestamp": begin, "to_timestamp": begin + length / FPS}
        named = {f"videos/{CAMERA}/{name}": value for name, value in values.items()}
        places.append({"episode_index": k, "length": length, **named})
        begin += length / FPS
    if not state:
        for row in rows:
            del row["observation.state"]
    if change is not None:
        change(rows, places)
    for path, content in (
        ("data/chunk-000/file-000.parquet", rows),
        ("meta/episodes/chunk-000/file-000.parquet", places),
    ):
        (folder / path).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(content), folder / path)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    frames = [frame(k, t) for k, length in enumerate(lengths) for t in range(length)]
    write_video(folder / "videos" / CAMERA / "chunk-000" / "file-000.mp4", frames)
    return folder


def lerobot_v2(folder: Path, lengths: Sequence[int]) -> Path:
    """A folder of version 2.1, with a data file and a video for each episode."""
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
        "features": {CAMERA: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]}},
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for k, length in enumerate(lengths):
        name = f"episode_{k:06d}"
        table = pa.Table.from_pylist(robot_rows([length], k))
        pq.write_table(table, folder / "data" / "chunk-000" / f"{name}.parquet")
        frames = [frame(k, t) for t in range(length)]
        write_video(folder / "videos" / "chunk-000" / CAMERA / f"{name}.mp4", frames)
    return folder
