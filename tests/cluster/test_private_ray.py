"""A job's private Ray is nobody else's: what it starts listens on loopback alone."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mesocosm.cluster import ray_session, session_folder

pytestmark = pytest.mark.integration


def test_a_private_ray_listens_on_loopback_alone(ray_local: None) -> None:
    listening = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.append((process.name(), connection.laddr.ip))
    addresses = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for _, ip in listening]
    assert addresses and all(address.is_loopback for address in addresses), listening


START = """
import json, os
from pathlib import Path
from mesocosm.cluster import ray_session as cluster
from mesocosm.config import RayConfig
os.umask(0o022)
cluster.ensure(RayConfig(cpus=2))
links = list(Path(os.environ["TMPDIR"]).glob("mesocosm-ray-*"))
folders = [str(link.resolve()) for link in links]
cluster.shutdown()
left = [path for path in [*map(str, links), *folders] if os.path.lexists(path)]
home = Path.home() / ".ray"
modes = [oct(path.stat().st_mode & 0o777) for path in (home, home / "auth_token")]
print(json.dumps({"folders": folders, "left": left, "modes": modes}))
"""


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return clean | changes


def run(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", code], environment(**changes)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_new_home_and_a_long_temporary_folder(tmp_path: Path) -> None:
    """The token is its owner's alone, and the sockets fit whatever TMPDIR is."""
    long_name = "a_rather_long_folder_name_as_slurm_makes_them/slurm_jobdir/1355700/tmp.t0016"
    temporary = tmp_path / long_name
    temporary.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    done = run(START, TMPDIR=str(temporary), HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["modes"] == ["0o700", "0o600"] and facts["left"] == []
    assert [Path(folder).parent for folder in facts["folders"]] == [Path("/tmp")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "words"), [("0" * 64, "does not accept the token in {path}"), (None, "wants a token")]
)
def test_a_wrong_token_is_not_reported_as_no_cluster(
    token: str | None, words: str, ray_local: None, tmp_path: Path
) -> None:
    import ray

    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700)
    if token is not None:
        path.write_text(token)
    address = ray.get_runtime_context().gcs_address
    imports = "from mesocosm.cluster.ray_session import ensure, RayConfig"
    done = run(f"{imports}\nensure(RayConfig(address={address!r}))", HOME=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mesocosm.errors.UsageError") and "does not answer" not in last
    assert address in last and words.format(path=path) in last


def test_jobs_that_start_at_once_make_one_token(tmp_path: Path) -> None:
    imports = "from pathlib import Path; from mesocosm.cluster import spec"
    code = f"{imports}; spec.make_token(Path.home() / '.ray' / 'auth_token')"
    command, env = [sys.executable, "-c", code], environment(HOME=str(tmp_path))
    jobs = [subprocess.Popen(command, env=env) for _ in range(4)]
    assert [job.wait(120) for job in jobs] == [0] * 4
    assert len((tmp_path / ".ray" / "auth_token").read_text()) == 64


def test_a_token_that_others_may_read_is_protected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray made it so on an earlier day."""
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("0" * 64)
    path.chmod(0o644)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    ray_session._protect_token()
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "0" * 64


FAIL = """
import ray
from mesocosm.cluster import ray_session as cluster
from mesocosm.config import RayConfig
def fail(**options):
    raise Exception("one of Ray's daemons is late")
ray.init = fail
try:
    cluster.ensure(RayConfig())
finally:
    cluster.shutdown()
"""


def test_the_logs_of_a_ray_that_did_not_start_stay(tmp_path: Path) -> None:
    done = run(FAIL, TMPDIR=str(tmp_path), HOME=str(tmp_path))
    message = done.stderr.strip().splitlines()[-1]
    folder = Path(message.rpartition("see ")[2])
    assert message.startswith("mesocosm.errors.MesocosmError") and folder.is_dir()
    assert session_folder.session_ended(folder), "storage gc lists it"
    shutil.rmtree(folder)
