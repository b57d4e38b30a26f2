"""Frames of a video by their time, decoded by PyAV. Lossy video is read and never written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.errors import UsageError
from mesocosm.extras import fix_missing

Array = NDArray[Any]
TOLERANCE = 0.1
"""Share of a frame's time by which a frame may be off the time that the logs name."""
SKIP_S = 5.0
"""Seconds up to which frames are decoded rather than skipped by a seek."""


class FrameProblem(Exception):
    """Why a frame cannot be used: `reason`, one of a few for counts, and the message."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


class Video:
    """An open video.

    Args:
        path: The file.

    Raises:
        FrameProblem: There is no such file, or it is not a video.
        UsageError: PyAV or the decoder is missing.
    """

    def __init__(self, path: str):
        try:
            import av
        except ImportError as error:
            raise UsageError(
                f"{path!r}: videos are read by the package av (PyAV), which is not installed"
                f" ({error}); {fix_missing('av')}"
            ) from error
        self._path, self._errors = path, av.error.FFmpegError
        try:
            self._container = av.open(path)
        except FileNotFoundError as error:
            raise FrameProblem("missing frame", f"the video {path!r} does not exist") from error
        except (av.error.FFmpegError, OSError) as error:
            raise self._unreadable(error) from error
        streams = self._container.streams.video
        if not streams:
            self.close()
            raise FrameProblem("unreadable frame", f"{path!r} holds no video")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            self.close()
            raise UsageError(
                f"{path!r} needs a decoder that this build of FFmpeg lacks; install PyAV from its"
                " wheel (pip install --force-reinstall av), or encode the video again as H.264"
            )
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate
        self._tolerance = TOLERANCE / float(rate) if rate else 1e-3
        self._time_base = float(self._stream.time_base or 1)
        self._frames = self._container.decode(self._stream)
        self._last: Any = None

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frame(self, seconds: float) -> Array:
        """The frame at a time, uint8 [height, width, 1 or 3].

        Raises:
            FrameProblem: There is none at that time, or it cannot be decoded.
        """
        try:
            frame = self._find(seconds)
        except self._errors as error:
            self._seek(0.0)
            raise self._unreadable(error) from error
        if any(component.is_alpha for component in frame.format.components):
            raise FrameProblem("alpha channel", f"the video {self._path!r} has an alpha channel")
        if frame.format.name.startswith("gray"):
            return np.asarray(frame.to_ndarray(format="gray"))[:, :, None]
        return np.asarray(frame.to_ndarray(format="rgb24"))

    def _find(self, seconds: float) -> Any:
        last = None if self._last is None else self._last.time
        if last is not None and abs(last - seconds) <= self._tolerance:
            return self._last
        if last is None or not last < seconds < last + SKIP_S:
            self._seek(max(seconds - self._tolerance, 0.0))
            last = None
        before = last
        for frame in self._frames:
            if frame.time is None:
                continue
            self._last = frame
            if frame.time > seconds + self._tolerance:
                near = "begins" if before is None else f"has frames at {before:.6g} s and"
                raise FrameProblem(
                    "missing frame",
                    f"{self._path!r} has no frame at {seconds:.6g} s: it {near} at"
                    f" {frame.time:.6g} s",
                )
            if frame.time >= seconds - self._tolerance:
                return frame
            before = frame.time
        end = "" if self._last is None else f": its last one is at {self._last.time:.6g} s"
        raise FrameProblem("missing frame", f"{self._path!r} has no frame at {seconds:.6g} s{end}")

    def _seek(self, seconds: float) -> None:
        """Continue at the key frame before a time."""
        self._last = None
        try:
            self._container.seek(int(seconds / self._time_base), stream=self._stream)
        except self._errors:  # before the first key frame
            self._container.seek(0)
        self._frames = self._container.decode(self._stream)

    def _unreadable(self, error: Exception) -> FrameProblem:
        reason = " ".join(str(error).split())
        return FrameProblem(
            "unreadable frame", f"the video {self._path!r} cannot be read ({reason})"
        )
