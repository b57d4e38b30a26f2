"""An S3 endpoint and an MLflow server, each a process in the hub."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from .lab import BIN, HUB, Lab

S3, MLFLOW = f"http://{HUB}:5000", f"http://{HUB}:5001"
BUCKET = "s3://bucket/mesocosm"
STORAGE = "from mesocosm.store.artifacts import Storage"
WAIT = """
import sys, time, urllib.error, urllib.request
end = time.monotonic() + 400
for url in sys.argv[1:]:
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            assert time.monotonic() < end, url
            time.sleep(0.5)
"""


def credentials() -> dict[str, str]:
    """The storage credentials, which only nodes have."""
    return {
        "AWS_ENDPOINT_URL": S3,
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def start(lab: Lab) -> None:
    """Start both, and make the bucket."""
    env = lab.environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    lab.hub.start(str(BIN / "moto_server"), "-H", HUB, "-p", "5000", env=env, log="s3")
    options = f"""server --host {HUB} --port 5001 --backend-store-uri sqlite:///{lab.base}/mlflow.db
        --artifacts-destination {lab.base}/mlflow --workers 1 --allowed-hosts {HUB}:5001"""
    lab.hub.start(str(BIN / "mlflow"), *options.split(), env=env, log="mlflow")
    run_in_hub(lab, WAIT, S3, MLFLOW)
    run_in_hub(lab, f"{STORAGE}; Storage('s3://bucket').fs.mkdir('bucket')")


def run_in_hub(lab: Lab, code: str, *arguments: str) -> str:
    """The output of `code`, run in the hub with the nodes' credentials."""
    command = lab.hub.command(sys.executable, "-c", code, *arguments)
    env = lab.environment | lab.env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + lab.hub.log("mlflow") + lab.hub.log("s3")
    return done.stdout


def fetch(lab: Lab) -> Path:
    """A copy of the bucket's storage root in a folder of this machine."""
    copy = lab.base / "fetched"
    shutil.rmtree(copy, ignore_errors=True)
    call = f"fs.get('bucket/mesocosm/', '{copy}/', recursive=True)"
    run_in_hub(lab, f"{STORAGE}; Storage({BUCKET!r}).{call}")
    return copy
