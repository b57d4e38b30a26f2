"""A cluster's Jobs API, through Ray's client and with the cluster's token."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from mesocosm.cluster.spec import ClusterConfig, check_token
from mesocosm.errors import MesocosmError, UsageError

TIMEOUT_S = 10.0
"""Seconds that a cluster may take to answer the first request."""
STARTING_S = 60.0
"""Seconds until a cluster that answers can start a job."""
EMPTY_CONNECTIONS = 5
"""Consecutive connections to a log that bring no text until `follow` fails."""
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


def state_of(details: Any) -> str:
    """Ray's name for a job's state."""
    return str(details.status.value)


class Remote:
    """The Jobs API of the cluster `name`. Errors of Ray's client become a MesocosmError.

    Raises:
        UsageError: There is no such cluster, it rejects the token, or it accepts requests without a
            token and `insecure` is False.
    """

    guarded: bool
    """True if the cluster requires a token."""

    def __init__(self, name: str, config: ClusterConfig, *, insecure: bool = False):
        from ray.job_submission import JobSubmissionClient

        if config.address is None:
            problem = f"--cluster {name} is this machine, which has no Jobs API"
            raise UsageError(f"{problem}; leave --cluster out, or name another of clusters/")
        self.name, self.config, self.address = name, config, config.address.rstrip("/")
        headers = self._authenticate(insecure)
        sdk = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
        for logger in (*sdk, "ray._private.runtime_env.packaging"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        with self._errors():
            self.client: Any = JobSubmissionClient(self.address, headers=headers)

    def _authenticate(self, insecure: bool) -> dict[str, str]:
        """The headers that the cluster wants. It is asked without the token first."""
        import requests

        url, problem = f"{self.address}/api/jobs/", f"cluster {self.name!r}: {self.address}"
        headers: dict[str, str] = {}

        def status() -> int:
            options: Any = {"timeout": TIMEOUT_S, "allow_redirects": False}
            try:
                return requests.get(url, headers=headers, **options).status_code
            except requests.RequestException as error:
                reason = f"does not answer ({type(error).__name__})"
                fix = "open its tunnel or port-forward first"
                raise UsageError(f"{problem} {reason}; {fix}") from error

        code = status()
        self.guarded = code in (401, 403)
        if code == 200 and not insecure:
            raise UsageError(
                f"{problem} answers without a token, so anybody who reaches it may run code there;"
                " start it with RAY_AUTH_MODE=token (docs/clusters.md), or give --insecure"
            )
        if self.guarded:
            path = self.config.token_path
            check_token(path)
            headers["Authorization"] = f"Bearer {path.read_text().strip()}"
            code = status()
            if code in (401, 403):
                fix = "copy the cluster's token there"
                raise UsageError(f"{problem} does not accept the token in {path}; {fix}")
        if code != 200:
            raise UsageError(
                f"{problem} must be a Ray dashboard, got HTTP status {code} from {url}; correct"
                f" address in clusters/{self.name}.yaml"
            )
        return headers

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise MesocosmError(f"cluster {self.name!r}: {reason}") from error

    def submit(
        self, id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        end = time.monotonic() + STARTING_S
        with self._errors():
            while True:
                try:
                    options = {"runtime_env": runtime_env, "metadata": metadata}
                    self.client.submit_job(entrypoint=entrypoint, submission_id=id, **options)
                    return
                except RuntimeError as error:  # a cluster that has just started has no agent yet
                    if "No available agent" not in str(error) or time.monotonic() > end:
                        raise
                    time.sleep(1.0)

    def details(self, id: str) -> Any | None:
        """Ray's `JobDetails`; None if the cluster does not know the job."""
        with self._errors():
            try:
                return self.client.get_job_info(id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def list(self) -> list[Any]:
        """`JobDetails` of all submitted jobs."""
        with self._errors():
            return [job for job in self.client.list_jobs() if job.submission_id]

    def state(self, id: str) -> str | None:
        details = self.details(id)
        return None if details is None else state_of(details)

    def wait(self, id: str, seconds: float) -> bool:
        """Wait for the job's end; False if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.state(id) not in OVER:
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True

    def logs(self, id: str) -> str:
        with self._errors():
            return str(self.client.get_job_logs(id))

    def follow(self, id: str, write: Callable[[str], None]) -> str:
        """Pass the driver's output to `write` until the job ends, and return its state."""
        written, failures = 0, 0

        async def read() -> None:
            nonlocal written, failures
            position = 0  # Ray starts at the first line each time
            async for text in self.client.tail_job_logs(id):
                new = text[max(written - position, 0) :]
                position += len(text)
                if new:
                    write(new)
                    written, failures = position, 0

        while True:
            failure: Exception | None = None
            try:
                asyncio.run(read())
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failure, failures = error, failures + 1
            state = self.state(id)
            if state is None or (state in OVER and failure is None):
                return state or "UNKNOWN"
            if failures == EMPTY_CONNECTIONS:
                raise MesocosmError(
                    f"cluster {self.name!r}: the log of {id} broke off {failures} times"
                    f" ({failure}); the job continues, see mesocosm jobs status {id}"
                )
            time.sleep(1.0)

    def stop(self, id: str) -> None:
        with self._errors():
            self.client.stop_job(id)

    def delete(self, id: str) -> None:
        """Remove an ended job from the cluster's list."""
        with self._errors():
            self.client.delete_job(id)
