"""What is particular to S3, for storage.py, which alone imports this: s3fs with patience, and the
uploads that nobody finished.

An endpoint that has answered before is waited for while it is away, up to `PATIENCE`: an outage
delays a job and does not end it. One that never answered is a wrong address, and is said at once.
Ray's processes get the same client, for checkpoints.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from mesocosm.faults import CHECKSUMS

PATIENCE = 120.0
"""Seconds that an endpoint may be away."""
PAUSE = 1.0
"""Seconds between tries, beside the client's own."""
STREAMS = 10
"""Parts (s3fs's, of 50 MiB, where a file has two or more) under way of a file that is alone; the
second has half as many, the third a third, for memory must hold them all.
"""

NOT_IMPLEMENTED = 501
"""The status of what an endpoint will never do."""
CONFLICT, PRECONDITION_FAILED = 409, 412

_TORN = (HTTPClientError, ClientPayloadError, IncompleteReadError)
"""What is raised where a reply ends early."""
T = TypeVar("T")
_log = logging.getLogger(__name__)


def options() -> dict[str, Any]:
    """Arguments of `Client`. The endpoint is what the environment names now: fsspec keeps one
    client for equal arguments, whatever it says later.
    """
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: dict[str, Any] = {
        "retries": {"mode": "standard", "max_attempts": 3},
        "max_pool_connections": 2 * STREAMS,
        "read_timeout": 60,
    }
    config["response_checksum_validation"] = (
        "when_required"  # what is read is checked against checksums of our own
    )
    # Stores other than AWS's may reject the checksum trailers that botocore sends by default.
    if checksums := os.environ.get(CHECKSUMS) or (named and "when_required"):
        config["request_checksum_calculation"] = checksums.lower()
    return {"config_kwargs": config, "use_listings_cache": False} | (
        {"endpoint_url": named} if named else {}
    )


class Client(S3FileSystem):  # type: ignore[misc]
    """s3fs, whose every request outlives an outage of the endpoint."""

    _answering: ClassVar[set[str | None]] = set()
    """Endpoints that are worth waiting for, of this process: fsspec makes a client for every
    thread. One that was waited for in vain is not, until it answers again.
    """

    def __init__(self, *args: Any, proven: bool = False, **kwargs: Any):
        """`proven`: the endpoint has answered, if only to another process."""
        super().__init__(*args, **kwargs)
        self._under_way = 0
        if proven:
            self._answering.add(self.endpoint_url)

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        began: float | None = None
        while True:
            try:
                reply = await super()._call_s3(method, *args, **kwargs)
            except Exception as error:
                if not _away(error):
                    self._answering.add(self.endpoint_url)
                    raise
                if self.endpoint_url not in self._answering:
                    raise
                if began is None:
                    began = time.monotonic()
                    _log.warning(
                        "S3 at %s is away (%s); trying again for %.0f s",
                        self.endpoint_url or "AWS",
                        error,
                        PATIENCE,
                    )
                elif time.monotonic() - began > PATIENCE:
                    self._answering.discard(self.endpoint_url)
                    raise
                await asyncio.sleep(PAUSE)
            else:
                self._answering.add(self.endpoint_url)
                return reply

    call_s3 = sync_wrapper(_call_s3)  # of open files, which s3fs binds to its own

    async def _pipe_file(
        self, path: str, data: bytes, *args: Any, mode: str = "overwrite", **kwargs: Any
    ) -> Any:
        """With `mode="create"`, raises FileExistsError where the file is there, however the store
        words it. S3 answers 409 to one of two creations at the same moment, and asks to try again.
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
        with self._share() as streams:
            await _again_where_torn(
                lambda: super(Client, self)._get_file(
                    rpath, lpath, max_concurrency=streams, **kwargs
                )
            )

    async def _put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        with self._share() as streams:
            await super()._put_file(lpath, rpath, max_concurrency=streams, **kwargs)

    @contextmanager
    def _share(self) -> Iterator[int]:
        self._under_way += 1
        try:
            yield max(1, STREAMS // self._under_way)
        finally:
            self._under_way -= 1


async def _again_where_torn(get: Callable[[], Awaitable[T]]) -> T:
    """s3fs tries requests again, but not the reading of their replies."""
    for _ in range(2):
        try:
            return await get()
        except _TORN:
            pass
    return await get()


def _away(error: BaseException) -> bool:
    """Whether the endpoint did not answer, or only that it cannot."""
    if isinstance(error, ConnectionError | HTTPClientError):
        return True
    status = _status(error)
    return status >= 500 and status != NOT_IMPLEMENTED


def _status(error: BaseException) -> int:
    """The HTTP status that S3 answered with; 0 where it did not answer."""
    reply = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(reply, ClientError):
        return 0
    return int(reply.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and neither finished nor given up."""

    path: str
    """Bucket and key."""
    id: str
    bytes: int
    modified: float
    """When its last part came, or it was begun, in seconds since the epoch."""


def uploads(client: Client, path: str) -> Iterator[Upload]:
    """Those under a bucket and prefix."""
    bucket, prefix, _ = client.split_path(f"{path.rstrip('/')}/")
    marker: dict[str, str] = {}
    while True:
        page = client.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        for found in page.get("Uploads", []):
            key, id = found["Key"], found["UploadId"]
            parts = list(_parts(client, bucket, key, id))
            last = max((part["LastModified"] for part in parts), default=found["Initiated"])
            assert isinstance(last, datetime)
            yield Upload(
                f"{bucket}/{key}", id, sum(part["Size"] for part in parts), last.timestamp()
            )
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _parts(client: Client, bucket: str, key: str, id: str) -> Iterator[dict[str, Any]]:
    after = 0
    while True:
        try:
            page = client.call_s3(
                "list_parts", Bucket=bucket, Key=key, UploadId=id, PartNumberMarker=after
            )
        except FileNotFoundError:  # finished or given up meanwhile
            return
        yield from page.get("Parts", [])
        if not page.get("IsTruncated"):
            return
        after = int(page["NextPartNumberMarker"])


def give_up(client: Client, path: str, id: str) -> None:
    """End an upload: S3 frees its parts."""
    bucket, key, _ = client.split_path(path)
    with suppress(FileNotFoundError):
        client.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=id)
