"""Files that come with the package: configs and clusters, which are links to `configs/` and
`clusters/`, and the style of its pages.

A wheel holds copies of them, so that `mesocosm loop -c loop/quickstart` works anywhere.
"""

from __future__ import annotations

from pathlib import Path

from mesocosm.errors import UsageError, nearest

CONFIGS = Path(__file__).parent / "configs"
CLUSTERS = Path(__file__).parent / "clusters"
PAGE_STYLE = Path(__file__).parent / "page.css"


def configs() -> dict[str, Path]:
    """The shipped configs by name, such as `loop/quickstart`."""
    paths = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in _yaml()}
    return dict(sorted(paths.items()))


def config_path(name: str, job: str = "") -> Path:
    """The file that `-c NAME` names: a path, or a shipped config (of `job`, without its folder).

    Raises:
        UsageError: There is neither.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    known = configs()
    folder = job.removeprefix("train-")
    if (shipped := known.get(name) or known.get(f"{folder}/{name}")) is not None:
        return shipped
    names = [key.removeprefix(f"{folder}/") for key in known if key.startswith(f"{folder}/")]
    names = names or list(known)
    raise UsageError(
        f"-c {name!r} is neither a file nor a shipped config"
        f" ({', '.join(names)}){nearest(name, names)}"
    )


def _yaml() -> list[Path]:
    return [path for folder in CONFIGS.iterdir() for path in folder.glob("*.yaml")]
