"""Which extra of pyproject.toml installs a package."""

from __future__ import annotations

EXTRAS = {
    "ray": "all",
    "mlflow": "all",
    "sklearn": "all",
    "matplotlib": "all",
    "deepspeed": "train",
    "mujoco": "agents",
    "s3fs": "s3",
    "fastapi": "serve",
    "uvicorn": "serve",
    "gymnasium_robotics": "robotics",
    "metaworld": "robotics",
    "minigrid": "minigrid",
    "PIL": "images",
    "av": "video",
}
"""The extra that installs a module."""


def fix_missing(module: str | None) -> str | None:
    """The command that installs a module, or None where no extra does."""
    extra = EXTRAS.get((module or "").partition(".")[0])
    return extra and f"run pip install 'mesocosm[{extra}]'"
