"""Golden digits: what tiny jobs gave when their versions were last set.

A job's id hashes its number in `mesocosm.versions.VERSIONS`. A test that runs a tiny job passes its
digits to the `golden` fixture, which compares them with `golden.json`. They may only change
together with the job's number:

    GOLDEN=write pytest tests/...     # after the bump: write the new digits
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mesocosm.versions import VERSIONS

FILE = Path(__file__).parent / "golden.json"
TOLERANCE = 1e-3
"""Relative, for floats: processors sum in other orders."""
TRAINED = 5e-2
"""Relative, for what a few dozen updates lead to. Adam's first steps have the size of the learning
rate however small the gradient: rounding decides the sign of some, and kinds of CPUs round
differently (losses of sweeps by .2 to 2%).
"""


def check(
    job: str, digits: dict[str, Any], file: Path = FILE, tolerance: float = TOLERANCE
) -> None:
    """Fail where the digits are not those of the job's version. Texts must be equal, floats nearly.

    Digits that are all zero or empty are refused: they would hold of a job that does nothing.
    """
    assert any(map(_says_something, digits.values())), f"the digits of {job} say nothing: {digits}"
    stored = json.loads(file.read_text()) if file.exists() else {}
    entry = stored.get(job, {"version": VERSIONS[job], "digits": {}})
    same_version = entry["version"] == VERSIONS[job]
    changed = {
        name: (entry["digits"][name], value)
        for name, value in digits.items()
        if name in entry["digits"] and not _same(entry["digits"][name], value, tolerance)
    }
    if same_version and changed:
        pytest.fail(
            f"the results of {job} have changed and its version has not: {changed}; if that is"
            f" meant, bump VERSIONS[{job!r}] in mesocosm/versions.py and run this test with"
            " GOLDEN=write"
        )
    if os.environ.get("GOLDEN") == "write":
        known = entry["digits"] if same_version else {}
        stored[job] = {"version": VERSIONS[job], "digits": known | digits}
        file.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    elif not same_version or set(digits) - set(entry["digits"]):
        pytest.fail(
            f"{file.name} does not hold {job} version {VERSIONS[job]}; write it with GOLDEN=write"
        )


def _same(stored: Any, value: Any, tolerance: float) -> bool:
    if isinstance(value, str):
        return bool(stored == value)
    return bool(stored == pytest.approx(value, rel=tolerance))


def _says_something(value: Any) -> bool:
    return any(map(_says_something, value)) if isinstance(value, list) else bool(value)


def of_files(folder: Path, pattern: str = "**/*.npy") -> str:
    """16 hex digits of the names and bytes of files in a folder, in order."""
    digest, files = hashlib.sha256(), sorted(folder.glob(pattern))
    assert files, (folder, pattern)
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def of_shards(dataset: Path) -> float:
    """One number of all arrays of a dataset."""
    files = sorted(dataset.glob("shards/*/*.npy"))
    assert files, dataset
    return sum(_fold(np.nan_to_num(np.load(file).astype(np.float64))) for file in files)


def of_numbers(value: Any) -> float:
    """One number of all numbers in plain JSON."""
    return _fold(np.array(list(_numbers(value)), np.float64))


def of_weights(file: Path) -> float:
    """One number of all tensors in a safetensors file."""
    from safetensors.numpy import load_file

    tensors = load_file(file)
    assert tensors, file
    return sum(_fold(tensors[name].astype(np.float64)) for name in sorted(tensors))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _numbers(value[key])
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


def _fold(values: NDArray[Any]) -> float:
    """A weighted sum that two values which change places, or a changed sign, change too, and that
    does not cancel.
    """
    flat = values.reshape(-1)
    weights = 1.0 + np.arange(1, flat.size + 1) * 0.6180339887498949 % 1.0
    return float((weights * (np.abs(flat) + flat / 2)).sum())
