"""Write the configs and manifests of clusters as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
    )


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def to_yaml(documents: Sequence[dict[str, Any]], remarks: str) -> str:
    """YAML documents with their keys in order, below `remarks` as comments."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in remarks.strip().splitlines())
    return head + "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=150) for document in documents
    )
