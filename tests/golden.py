"""Golden digits: what tiny jobs gave when their versions were last set.

A job's id hashes its number in `mesocosm.versions.VERSIONS`. A test that runs a tiny job passes its digits to the `golden`
fixture, which compares them with `golden.json`. They may only change together with the job's number:

    GOLDEN=write pytest tests/...     # after the bump: write the new digits
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.versions import VERSIONS

FILE = Path(__file__).parent / "golden.json"
TOLERANCE = 1e-3
"""Relative, for floats: processors sum in other orders."""


def check(job: str, digits: dict[str, Any], file: Path = FILE) -> None:
    """Fail where the digits are not those of the job's version. Texts must be equal, floats nearly."""
    stored = json.loads(file.read_text()) if file.exists() else {}
    entry = stored.get(job, {"version": VERSIONS[job], "digits": {}})
    same_version = entry["version"] == VERSIONS[job]
    changed = {
        name: (entry["digits"][name], value)
        for name, value in digits.items()
        if name in entry["digits"] and entry["digits"][name] != pytest.approx(value, rel=TOLERANCE)
    }
    if same_version and changed:
        pytest.fail(
            f"the results of {job} have changed and its version has not: {changed}; if that is meant, "
            f"bump VERSIONS[{job!r}] in mesocosm/versions.py and run this test with GOLDEN=write"
        )
    if os.environ.get("GOLDEN") == "write":
        known = entry["digits"] if same_version else {}
        stored[job] = {"version": VERSIONS[job], "digits": known | digits}
        file.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    elif not same_version or set(digits) - set(entry["digits"]):
        pytest.fail(f"{file.name} does not hold {job} version {VERSIONS[job]}; write it with GOLDEN=write")


def of_files(folder: Path, pattern: str = "**/*.npy") -> str:
    """16 hex digits of the names and bytes of files in a folder, in order."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def of_shards(dataset: Path) -> float:
    """The sum of the absolute values in a dataset's arrays."""
    files = sorted(dataset.glob("shards/*/*.npy"))
    assert files
    return float(sum(np.nansum(np.abs(np.load(file).astype(np.float64))) for file in files))


def of_numbers(value: Any) -> float:
    """The sum of the absolute values of all numbers in plain JSON."""
    if isinstance(value, dict):
        return sum(map(of_numbers, value.values()))
    if isinstance(value, list):
        return sum(map(of_numbers, value))
    return abs(float(value)) if isinstance(value, int | float) else 0.0


def of_weights(file: Path) -> float:
    """The root of the sum of squares of all tensors in a safetensors file."""
    from safetensors.numpy import load_file

    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in load_file(file).values())))
