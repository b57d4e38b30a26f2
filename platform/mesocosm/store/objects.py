"""S3: s3fs that waits for an endpoint which is away, and unfinished multipart uploads.

A request to an endpoint that has answered before is repeated for up to `PATIENCE` seconds, so that
an outage delays a job and does not end it. An endpoint that never answered is a wrong address, and
fails at once. Ray's processes use the same client for checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from mesocosm.faults import CHECKSUMS

PATIENCE = 120.0
"""Seconds that an endpoint may be away."""
PAUSE = 1.0
"""Seconds between two attempts, in addition to the client's own retries."""
STREAMS = 10
"""Concurrent parts (of 50 MiB, s3fs's size) of a single file. Files in transfer share them, because
all parts are held in memory.
"""

NOT_IMPLEMENTED = 501
"""The HTTP status of a feature that an endpoint lacks."""
CONFLICT, PRECONDITION_FAILED = 409, 412

_TORN = (HTTPClientError, ClientPayloadError, IncompleteReadError)
"""The errors of a reply that ends early."""
_log = logging.getLogger(__name__)


def options() -> dict[str, Any]:
    """Arguments of `Client`. The endpoint is among them because fsspec returns an existing client
    for equal arguments, even after the environment has changed.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: dict[str, Any] = {
        "retries": {"mode": "standard", "max_attempts": 3},
        "max_pool_connections": 2 * STREAMS,
        "read_timeout": 60,
        "response_checksum_validation": "when_required",  # COMMIT.json has our own checksums
    }
    # Other stores than AWS's may reject the checksum trailers that botocore sends by default.
    if checksums := os.environ.get(CHECKSUMS) or (endpoint and "when_required"):
        config["request_checksum_calculation"] = checksums.lower()
    arguments = {"config_kwargs": config, "use_listings_cache": False}
    return arguments | ({"endpoint_url": endpoint} if endpoint else {})


class Client(S3FileSystem):  # type: ignore[misc]
    """s3fs whose requests outlast an outage of the endpoint."""

    _answering: ClassVar[set[str | None]] = set()
    """Endpoints worth waiting for. Shared by the process, since fsspec creates a client for each
    thread. An endpoint that stayed away leaves the set until it answers again.
    """

    def __init__(self, *args: Any, proven: bool = False, **kwargs: Any):
        """`proven`: the endpoint has answered, if only to another process."""
        super().__init__(*args, **kwargs)
        self._transfers = 0
        if proven:
            self._answering.add(self.endpoint_url)

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        end: float | None = None
        while True:
            try:
                reply = await super()._call_s3(method, *args, **kwargs)
            except Exception as error:
                if not _is_away(error):
                    self._answering.add(self.endpoint_url)
                    raise
                if self.endpoint_url not in self._answering:
                    raise
                if end is None:
                    end = time.monotonic() + PATIENCE
                    text = "S3 at %s is away (%s); trying again for %.0f s"
                    _log.warning(text, self.endpoint_url or "AWS", error, PATIENCE)
                elif time.monotonic() > end:
                    self._answering.discard(self.endpoint_url)
                    raise
                await asyncio.sleep(PAUSE)
            else:
                self._answering.add(self.endpoint_url)
                return reply

    call_s3 = sync_wrapper(_call_s3)  # open files call it, and s3fs binds it to its own _call_s3

    async def _pipe_file(
        self, path: str, data: bytes, *args: Any, mode: str = "overwrite", **kwargs: Any
    ) -> Any:
        """With `mode="create"`, raises FileExistsError where the file exists, whatever the store's
        wording. S3 answers 409 to one of two simultaneous creations: it is tried again.
        """
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return await super()._pipe_file(path, data, *args, mode=mode, **kwargs)
            except OSError as error:
                status = _status(error) if mode == "create" else 0
                if status == PRECONDITION_FAILED:
                    raise FileExistsError(path) from error
                if status != CONFLICT or time.monotonic() > end:
                    raise
            await asyncio.sleep(random.uniform(0, PAUSE))

    async def _get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        """Reads a reply that ended early up to twice more: s3fs repeats requests only."""
        with self._share() as streams:
            for _ in range(2):
                try:
                    return await super()._get_file(rpath, lpath, max_concurrency=streams, **kwargs)
                except _TORN:
                    pass
            await super()._get_file(rpath, lpath, max_concurrency=streams, **kwargs)

    async def _put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        with self._share() as streams:
            await super()._put_file(lpath, rpath, max_concurrency=streams, **kwargs)

    @contextmanager
    def _share(self) -> Iterator[int]:
        self._transfers += 1
        try:
            yield max(1, STREAMS // self._transfers)
        finally:
            self._transfers -= 1


def _is_away(error: BaseException) -> bool:
    """True if the endpoint did not answer, or answered that it cannot at present."""
    if isinstance(error, ConnectionError | HTTPClientError):
        return True
    status = _status(error)
    return status >= 500 and status != NOT_IMPLEMENTED


def _status(error: BaseException) -> int:
    """The HTTP status of S3's answer; 0 where there was none."""
    reply = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(reply, ClientError):
        return 0
    return int(reply.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def uploads(client: Client, path: str) -> Iterator[tuple[str, int, float]]:
    """Unfinished multipart uploads: `bucket/key?uploadId=ID`, their bytes, and when the last part
    came (or the upload began), in seconds since the epoch.
    """
    bucket, prefix, _ = client.split_path(f"{path.rstrip('/')}/")
    markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
    place = {"Bucket": bucket, "Prefix": prefix}
    for upload in _pages(client, "list_multipart_uploads", "Uploads", markers, place):
        one = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        marker = {"PartNumberMarker": "NextPartNumberMarker"}
        parts = []
        with suppress(FileNotFoundError):  # finished or aborted meanwhile
            parts = list(_pages(client, "list_parts", "Parts", marker, one))
        last = max((part["LastModified"] for part in parts), default=upload["Initiated"])
        size = sum(part["Size"] for part in parts)
        yield f"{bucket}/{upload['Key']}?uploadId={upload['UploadId']}", size, last.timestamp()


def _pages(
    client: Client, method: str, key: str, markers: dict[str, str], request: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The items of all pages. `markers`: by argument of a request, the key of a page."""
    while True:
        page = client.call_s3(method, **request)
        yield from page.get(key, [])
        if not page.get("IsTruncated"):
            return
        request |= {argument: page[name] for argument, name in markers.items()}


def abort_upload(client: Client, path: str) -> None:
    """Abort an upload of `uploads`: S3 frees its parts."""
    name, _, id = path.partition("?uploadId=")
    bucket, key, _ = client.split_path(name)
    with suppress(FileNotFoundError):
        client.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=id)
