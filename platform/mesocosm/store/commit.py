"""COMMIT.json, which is written last and makes an artifact whole: its schema and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mesocosm.errors import ArtifactError

COMMIT = "COMMIT.json"
SCHEMA = 1


class FileEntry(TypedDict):
    """One file of an artifact."""

    sha256: str
    bytes: int


class Commit(TypedDict):
    """What COMMIT.json holds."""

    schema: int
    kind: str
    id: str
    code: NotRequired[str]
    created: str
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    folder: NotRequired[str]
    """On a remote root: the folder in `kind/id` in which the files lie."""


_COMMIT = TypeAdapter(Commit)


def parse(kind: str, id: str, raw: bytes, where: str, *, remote: bool) -> Commit:
    """Read and check the bytes of a COMMIT.json.

    Args:
        kind: The artifact's kind, such as `datasets`.
        id: The artifact's id.
        raw: The bytes of COMMIT.json.
        where: The artifact's folder, for the message.
        remote: Whether the root is remote, where COMMIT.json also names a folder.

    Raises:
        ArtifactError: COMMIT.json is empty, torn, or of something else.
    """
    try:
        commit = _COMMIT.validate_json(raw, strict=True)
    except ValidationError as error:
        if not raw.strip():
            why = "it is empty"
        elif error.errors()[0]["type"] == "json_invalid":
            why = "it is cut short"
        else:
            why = "it does not describe an artifact"
        raise damaged(kind, id, why, where) from error
    if (commit["kind"], commit["id"]) != (kind, id):
        other = f"it is of {commit['kind']}/{commit['id']}"
        raise damaged(kind, id, other, where)
    if remote and "folder" not in commit:
        raise damaged(kind, id, "it names no folder", where)
    _check_names(f"{kind}/{id}", [*commit["files"], commit.get("folder", "")])
    return commit


def damaged(kind: str, id: str, why: str, where: str) -> ArtifactError:
    """The error for an artifact whose COMMIT.json cannot be used."""
    return ArtifactError(
        f"{kind}/{id}: {COMMIT} is damaged ({why}); restore {where}/{COMMIT} from a copy, "
        "make the artifact again by its job with --force, or remove it by `mesocosm storage gc`"
    )


def _check_names(artifact: str, names: Sequence[str]) -> None:
    """Raise ArtifactError where a name leads out of the artifact.

    A stranger's file would otherwise land among this machine's own.
    """
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            why = f"{artifact}: {COMMIT} names {name!r}, which lies outside of it"
            raise ArtifactError(f"{why}; it was not made by this project, do not use it")
