"""The cameras of a LeRobot folder, which `features` of `meta/info.json` names.

    dtype image    a column of the Parquet files, with the bytes of PNG
    dtype video    files at `video_path`; a row's frame is that at its `timestamp`

In version 2 each episode has a video of each camera. In version 3 a video holds several episodes,
and `meta/episodes/` says where each one begins and ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mesocosm.data.ingest.frames import frame_array
from mesocosm.data.ingest.readers.files import sorted_naturally
from mesocosm.errors import UsageError

INFO = "meta/info.json"
EPISODES = "meta/episodes"
EPISODE, TIMESTAMP = "episode_index", "timestamp"
SLACK_S = 1e-3
"""An episode's last frame is further than this from the end of its part of a video, in seconds."""


@dataclass(frozen=True)
class Place:
    """The place of an episode in a video."""

    path: str
    begin: float
    """Seconds."""
    end: float | None
    """The end in the video; None if the episode is the whole video."""


def read_info(folder: str | Path) -> dict[str, Any]:
    """`meta/info.json` of a folder. Raises UsageError where it cannot be read."""
    info = Path(folder) / INFO
    try:
        content = json.loads(info.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(info)!r} cannot be read ({error}); give a whole LeRobot folder"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(info)!r} must hold an object; give a whole LeRobot folder")
    return content


class Cameras:
    """The cameras of the folder of a data file `data/chunk-*/*.parquet`."""

    def __init__(self, path: str):
        self.path, self.folder = Path(path), Path(path).parents[2]
        self._info = read_info(self.folder)
        features = self._info.get("features") or {}
        kinds = {key: (feature or {}).get("dtype") for key, feature in features.items()}
        self.videos = [key for key, kind in kinds.items() if kind == "video"]
        """The names of those with videos."""
        self.keys = [key for key, kind in kinds.items() if kind in ("video", "image")]
        """The names of all."""

    def needed(self, videos: list[str]) -> list[str]:
        """The columns that `add` needs for these videos."""
        return [EPISODE, TIMESTAMP] if videos else []

    def add(self, table: pa.Table, videos: list[str]) -> tuple[pa.Table, pa.Array | None]:
        """Add the frames of videos to rows of the data file.

        Returns:
            (the table with a column for each video, for each row why it has no frame or null).
        """
        if not videos:
            return table, None
        missing = [name for name in self.needed(videos) if name not in table.column_names]
        if missing:
            raise UsageError(
                f"{str(self.path)!r} has videos and no column {missing[0]!r}; give a whole LeRobot"
                " folder"
            )
        episodes, times = table[EPISODE].to_pylist(), table[TIMESTAMP].to_pylist()
        problems: list[str | None] = [None] * len(episodes)
        for key in videos:
            paths: list[str | None] = [None] * len(episodes)
            seconds: list[float | None] = [None] * len(episodes)
            for i, (episode, time) in enumerate(zip(episodes, times, strict=True)):
                place = self._places[key].get(episode)
                if place is None:
                    problems[i] = f"{EPISODES} does not say where the video of {key!r} is"
                elif time is None:
                    problems[i] = f"{TIMESTAMP} is missing"
                elif place.end is not None and place.begin + time >= place.end - SLACK_S:
                    length = place.end - place.begin
                    problems[i] = (
                        f"{TIMESTAMP} {time:.6g} s is beyond the {length:.6g} s of the episode's"
                        f" part of the video {place.path!r}"
                    )
                else:
                    paths[i], seconds[i] = place.path, place.begin + time
            table = table.append_column(key, frame_array(paths=paths, seconds=seconds))
        return table, pa.array(problems, pa.string())

    def files(self) -> list[str]:
        """The files that describe the videos of the data file. They are part of the data's id."""
        shown = [place.path for each in self._places.values() for place in each.values()]
        videos = [path for path in sorted_naturally(set(shown)) if Path(path).exists()]
        return [str(self.folder / INFO), *map(str, self._tables), *videos]

    @property
    def _tables(self) -> list[Path]:
        """The files of `meta/episodes`."""
        paths = (self.folder / EPISODES).glob("chunk-*/file-*.parquet")
        return [Path(path) for path in sorted_naturally(map(str, paths))]

    @cached_property
    def _places(self) -> dict[str, dict[int, Place]]:
        """The places of the data file's episodes: by video, by episode."""
        numbers = pq.read_table(self.path, columns=[EPISODE])[EPISODE].unique().to_pylist()
        template = str(self._info.get("video_path"))
        try:
            if self._tables:
                return self._places_of_tables(template, set(numbers))
            size = int(self._info.get("chunks_size") or 1000)
            return {
                key: {
                    n: Place(
                        self._file(
                            template, episode_chunk=n // size, video_key=key, episode_index=n
                        ),
                        0.0,
                        None,
                    )
                    for n in numbers
                }
                for key in self.videos
            }
        except (LookupError, ValueError, TypeError, pa.ArrowException) as error:
            raise UsageError(
                f"{str(self.folder)!r} does not say where its videos are"
                f" ({' '.join(str(error).split())}); give a whole LeRobot folder"
            ) from error

    def _places_of_tables(self, template: str, numbers: set[int]) -> dict[str, dict[int, Place]]:
        places: dict[str, dict[int, Place]] = {key: {} for key in self.videos}
        for path in self._tables:
            names = {
                key: [
                    f"videos/{key}/{part}"
                    for part in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
                ]
                for key in self.videos
            }
            columns = [EPISODE, *(name for each in names.values() for name in each)]
            table = pq.read_table(path, columns=columns)
            for row in table.to_pylist():
                if row[EPISODE] not in numbers:
                    continue
                for key in self.videos:
                    chunk, file, begin, end = (row[name] for name in names[key])
                    where = self._file(
                        template, video_key=key, chunk_index=int(chunk), file_index=int(file)
                    )
                    places[key][row[EPISODE]] = Place(where, float(begin), float(end))
        return places

    def _file(self, template: str, **parts: Any) -> str:
        return str(self.folder / template.format(**parts))
