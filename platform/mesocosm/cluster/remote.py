"""A cluster's Jobs API, reached over HTTP with its token. What goes wrong is one sentence."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from mesocosm.cluster import spec as cluster_spec
from mesocosm.cluster.spec import ClusterConfig
from mesocosm.errors import MesocosmError, UsageError

TIMEOUT = 10.0
"""Seconds that a cluster may take to answer the first question."""
STARTING = 60.0
"""Seconds that a cluster which answers may take to be able to start a job."""
CONNECTIONS = 5
"""Connections in a row that may bring nothing of a log."""
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


def state_of(details: Any) -> str:
    """Ray's word for the state of a job."""
    return str(details.status.value)


class Remote:
    """The Jobs API of the cluster `name`.

    Raises UsageError where it is this machine, where nothing answers, where it asks for another
    token than the one given, and where it answers without any (`insecure` allows that).
    """

    def __init__(self, name: str, config: ClusterConfig, *, insecure: bool = False):
        import requests
        from ray.job_submission import JobSubmissionClient

        if config.where == "local" or config.address is None:
            raise UsageError(
                f"--cluster {name} is this machine, where no Jobs API is kept; leave --cluster out,"
                " or name another of clusters/"
            )
        self.name, self.config, self.address = name, config, config.address.rstrip("/")
        url = f"{self.address}/api/jobs/"
        try:
            bare = requests.get(url, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException as error:
            raise UsageError(
                f"cluster {name!r}: {self.address} does not answer ({type(error).__name__}); open"
                " its tunnel or port-forward first"
            ) from error
        headers: dict[str, str] = {}
        self.guarded = bare.status_code in (401, 403)
        """Whether the cluster wants a token"""
        if bare.status_code == 200 and not insecure:
            raise UsageError(
                f"cluster {name!r}: {self.address} answers without a token, so anybody who reaches"
                " it may run code there; start it with RAY_AUTH_MODE=token (docs/clusters.md), or"
                " give --insecure"
            )
        if self.guarded:
            headers = {"Authorization": f"Bearer {self._token()}"}
            told = requests.get(url, headers=headers, timeout=TIMEOUT, allow_redirects=False)
            if told.status_code in (401, 403):
                raise UsageError(
                    f"cluster {name!r}: the token in {config.token_path} is not that of"
                    f" {self.address}; copy the cluster's own there"
                )
            bare = told
        if bare.status_code != 200:
            raise UsageError(
                f"cluster {name!r}: {url} answers {bare.status_code}, so it is no Ray dashboard;"
                f" give its address in clusters/{name}.yaml"
            )
        for logger in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env.packaging",
        ):
            logging.getLogger(logger).setLevel(logging.WARNING)
        with self._said():
            self.client: Any = JobSubmissionClient(self.address, headers=headers)

    def _token(self) -> str:
        path = self.config.token_path
        cluster_spec.check_token(path)
        return path.read_text().strip()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Whatever Ray's client and requests raise, as one sentence."""
        try:
            yield
        except MesocosmError:
            raise
        except Exception as error:
            raise MesocosmError(
                f"cluster {self.name!r}: {' '.join(str(error).split())[:300]}"
            ) from error

    def submit(
        self, id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        end = time.monotonic() + STARTING
        with self._said():
            while True:
                try:
                    self.client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=id,
                        runtime_env=runtime_env,
                        metadata=metadata,
                    )
                    return
                except RuntimeError as error:  # a cluster that has just started has no agent yet
                    if "No available agent" not in str(error) or time.monotonic() > end:
                        raise
                    time.sleep(1.0)

    def details(self, id: str) -> Any | None:
        """Ray's `JobDetails`; None where this cluster does not know the job."""
        with self._said():
            try:
                return self.client.get_job_info(id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def list(self) -> list[Any]:
        with self._said():
            return [job for job in self.client.list_jobs() if job.submission_id]

    def state(self, id: str) -> str | None:
        found = self.details(id)
        return None if found is None else state_of(found)

    def wait(self, id: str, seconds: float) -> bool:
        """Wait for the job's end; False if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.state(id) not in OVER:
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True

    def logs(self, id: str) -> str:
        with self._said():
            return str(self.client.get_job_logs(id))

    def follow(self, id: str, tell: Callable[[str], None]) -> str:
        """`tell` the driver's output as it comes, until the job is over; gives its state. A
        connection that breaks is made anew, and nothing told twice.
        """
        told, failed = 0, 0

        async def listen() -> None:
            nonlocal told, failed
            heard = 0  # Ray begins at the first line each time
            async for text in self.client.tail_job_logs(id):
                new = text[max(told - heard, 0) :]
                heard += len(text)
                if new:
                    tell(new)
                    told, failed = heard, 0

        while True:
            broken: Exception | None = None
            try:
                asyncio.run(listen())
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                broken, failed = error, failed + 1
            state = self.state(id)
            if state is None or (state in OVER and broken is None):
                return state or "UNKNOWN"
            if failed == CONNECTIONS:
                raise MesocosmError(
                    f"cluster {self.name!r}: the log of {id} broke off {failed} times ({broken});"
                    f" it goes on, see mesocosm jobs status {id}"
                )
            time.sleep(1.0)

    def stop(self, id: str) -> None:
        with self._said():
            self.client.stop_job(id)

    def delete(self, id: str) -> None:
        with self._said():
            self.client.delete_job(id)
