"""The job that serves an HTTP ingress, and how it ends, on a real Ray Serve."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from mesocosm.jobs.serve import JOB
from mesocosm.runs import tracking
from mesocosm.serve import http_sessions, ingress
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy

from .worlds import web_config

pytestmark = pytest.mark.usefixtures("ray_local")
ACTION = {"push": [0, 0], "turn": 0, "hands": [0, 0], "say": "a"}


@pytest.mark.slow
def test_job(client: Any, rich: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`serve http=0` makes a token file and prints a curl command that works.

    No file of the run or of Ray has the token. The port closes with the job.
    """
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MESOCOSM_WORLD_TOKEN", raising=False)
    log = Path(rich) / "runs/serve/visited/log.txt"
    answers: list[str] = []

    def visit() -> None:
        try:
            while not log.exists() or "curl" not in log.read_text():
                time.sleep(0.1)
            command = next(line for line in log.read_text().splitlines() if "curl" in line).strip()
            done = subprocess.run(command, shell=True, capture_output=True, timeout=600)
            answers.extend((json.loads(done.stdout)["world"], LISTENERS["job"].url))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    observer = threading.Thread(target=visit)
    observer.start()
    job_config = web_config(rich, "job", http=0)
    with tracking.start("serve", job_config, id="visited", quiet=True) as job:
        JOB.run(job_config, job)
    observer.join()
    assert answers[0] == "rich" and "job" not in LISTENERS
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{answers[1]}/health", timeout=5)
    file = tmp_path / ".mesocosm/world_token"
    token = file.read_bytes().strip()
    assert len(token) > 30 and file.stat().st_mode & 0o777 == 0o600
    assert str(file) in log.read_text()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    folders = Path(rich) / "runs", session / "logs"
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for path in files:
        text = path.read_bytes()
        assert token not in text and client.token.encode() not in text, path
    assert len(files) > 10


@pytest.mark.slow
def test_nobody_answers(client: Any, rich: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the application ends under the ingress: 503 with a message, in bounded time."""
    from ray import serve

    monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", client.token)
    monkeypatch.setattr(http_sessions, "DEADLINE_S", 2.0)
    deploy(web_config(rich, "brief", http=0))
    try:
        client = type(client)(LISTENERS["brief"].url)
        session = client.begin()
        step = {"session": session, "action": [ACTION]}
        assert client("GET", "/health").status_code == 200
        serve.delete("brief")
        time.sleep(ingress.HEALTH_S)
        assert client("GET", "/health").status_code == 503
        message = "no replica answered for 2 s|no world application 'brief'"
        for path, body in (("step", step), ("reset", {"session": session}), ("reset", {})):
            reply = client.post(f"/v1/{path}", body)
            assert reply.status_code == 503 and re.search(message, reply.json()["detail"]), (
                reply.text
            )
        reply = client.post("/v1/step", step)
        message = "the session's last reset failed; POST /v1/reset with it again"
        assert (reply.status_code, reply.json()["detail"]) == (400, message)
    finally:
        undeploy("brief")
