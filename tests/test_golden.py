"""The golden digits themselves: they cannot pass by accident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesocosm.versions import VERSIONS


def test_every_job_has_digits_of_its_version(golden: Any) -> None:
    stored = json.loads(golden.FILE.read_text())
    assert {job: entry["version"] for job, entry in stored.items()} == VERSIONS
    assert all(entry["digits"] for entry in stored.values())


@pytest.mark.parametrize("nothing", [0, 0.0, [], [0.0, 0], ""])
def test_digits_that_say_nothing_are_refused(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing: Any
) -> None:
    monkeypatch.setenv("GOLDEN", "write")
    with pytest.raises(AssertionError, match="say nothing"):
        golden.check("collect", {"x": nothing}, tmp_path / "golden.json")


def test_digits_change_only_with_a_version(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "golden.json"
    with pytest.raises(pytest.fail.Exception, match="does not hold"):
        golden.check("collect", {"x": 1.0}, file)
    monkeypatch.setenv("GOLDEN", "write")
    golden.check("collect", {"x": 1.0}, file)
    with pytest.raises(pytest.fail.Exception, match="bump"):
        golden.check("collect", {"x": 1.1}, file)
    monkeypatch.delenv("GOLDEN")
    golden.check("collect", {"x": 1.0 + 1e-6}, file)
    monkeypatch.setitem(VERSIONS, "collect", VERSIONS["collect"] + 1)
    with pytest.raises(pytest.fail.Exception, match="does not hold"):
        golden.check("collect", {"x": 1.0}, file)
    monkeypatch.setenv("GOLDEN", "write")
    golden.check("collect", {"x": 1.1}, file)
    assert json.loads(file.read_text())["collect"] == {
        "version": VERSIONS["collect"],
        "digits": {"x": 1.1},
    }


def test_texts_are_compared_exactly(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "golden.json"
    monkeypatch.setenv("GOLDEN", "write")
    golden.check("collect", {"x": "ab"}, file)
    monkeypatch.delenv("GOLDEN")
    golden.check("collect", {"x": "ab"}, file)
    with pytest.raises(pytest.fail.Exception, match="bump"):
        golden.check("collect", {"x": "ac"}, file)


def test_a_number_of_many_notices_order_and_sign(golden: Any) -> None:
    numbers = {
        golden.of_numbers(values)
        for values in ([1.0, 2.0], [2.0, 1.0], [1.0, -2.0], [-1.0, 2.0], [1.0, 2.0, 0.1])
    }
    assert len(numbers) == 5
