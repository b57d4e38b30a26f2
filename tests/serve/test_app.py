"""The application of a Serve config file, deployed as by a RayService, on a real Ray Serve."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from mesocosm.cluster import kuberay, ray_session
from mesocosm.cluster import spec as cluster_spec
from mesocosm.config import RayConfig
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.serve.app import build
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Artifact

from .worlds import local, played, untrained

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.mark.slow
def test_a_rayservice_of_the_shipped_file_serves_the_world(
    store: Callable[[str, Any], Artifact], root: str
) -> None:
    """Serve's controller builds the application of serveConfigV2, which steps as in process."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    store("w0", untrained())
    shipped = cluster_spec.read("kuberay")
    shipped.storage_root = root
    words = ["serve", "world=w0", "name=apps", "replicas=1"]
    service, _ = kuberay.render("kuberay", shipped, "RayService", words, "apps")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    ray_session.ensure(RayConfig())
    serve.start(proxy_location="Disabled")
    _get_global_client().deploy_apps(config)
    try:
        until, ends = time.monotonic() + 120, ("RUNNING", "DEPLOY_FAILED")
        while (state := serve.status().applications["apps"]).status not in ends:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert state.status == "RUNNING", state.message
        served = WorldVectorEnv(4, app="apps", horizon=9)
        assert served.world == "w0"
        assert played(served, 12) == played(local("w0", root, 4, horizon=9), 12)
        served.close()
    finally:
        serve.delete("apps")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replcas": 2}, "did you mean 'replicas'"),
        ({"replicas": "0"}, "serve.replicas must be >= 1, got 0"),
        ({"world": "w9"}, "w9"),
    ],
)
def test_wrong_arguments(root: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, ArtifactError), match=message):
        build({"storage.root": root, **args})
