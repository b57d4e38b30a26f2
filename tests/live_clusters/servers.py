"""What stands beside a cluster: an S3 endpoint and an MLflow server, each a process of its own in
the hub.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from .lab import BIN, HUB, Lab

S3, MLFLOW = f"http://{HUB}:5000", f"http://{HUB}:5001"
BUCKET = "s3://bucket/mesocosm"
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
    """What every node has in its environment, and nobody else."""
    return {
        "AWS_ENDPOINT_URL": S3,
        "AWS_ACCESS_KEY_ID": "AKIAPLANTED",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def start(lab: Lab) -> None:
    """Both, with a bucket."""
    env = lab.environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    lab.hub.start(str(BIN / "moto_server"), "-H", HUB, "-p", "5000", env=env, log="s3")
    where = [
        "--backend-store-uri",
        f"sqlite:///{lab.base}/mlflow.db",
        "--artifacts-destination",
        str(lab.base / "mlflow"),
        "--workers",
        "1",
        "--allowed-hosts",
        f"{HUB}:5001",
    ]
    lab.hub.start(
        str(BIN / "mlflow"),
        "server",
        "--host",
        HUB,
        "--port",
        "5001",
        *where,
        env=env,
        log="mlflow",
    )
    inside(lab, WAIT, S3, MLFLOW)
    inside(
        lab,
        "from mesocosm.store.artifacts import Storage; Storage('s3://bucket').fs.mkdir('bucket')",
    )


def inside(lab: Lab, code: str, *arguments: str) -> str:
    """What `code` prints, run in the hub with the nodes' credentials."""
    command = lab.hub.command(sys.executable, "-c", code, *arguments)
    done = subprocess.run(
        command, env=lab.environment | lab.env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr + lab.hub.said("mlflow") + lab.hub.said("s3")
    return done.stdout


def fetched(lab: Lab) -> Path:
    """A copy of the bucket's storage root in a folder of this machine."""
    shutil.rmtree(lab.base / "fetched", ignore_errors=True)
    copy = f"fs.get('bucket/mesocosm/', '{lab.base / 'fetched'}/', recursive=True)"
    inside(lab, f"from mesocosm.store.artifacts import Storage; Storage({BUCKET!r}).{copy}")
    return lab.base / "fetched"
