"""`mesocosm data list | show | diff` on a folder and on a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.cli.main import main
from mesocosm.store.artifacts import Storage


@pytest.fixture(params=["folder", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "root")
        if request.param == "folder"
        else str(request.getfixturevalue("s3")) + "/data"
    )


@pytest.mark.integration
def test_datasets_are_listed_shown_and_held_against_each_other(
    any_root: str,
    tmp_path: Path,
    cart_root: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    golden: Any,
) -> None:
    local = Storage(cart_root(tmp_path / "here"))
    original = local.artifact("datasets", "cart")
    storage = Storage(any_root)
    storage.make("datasets", "cart", original.meta, lambda folder: _copied(original.path, folder))
    at = f"storage.root={any_root}"
    assert (
        main(
            [
                "curate",
                at,
                "data.datasets=[cart]",
                "operations=[{op: length, min: 20},{op: hold_out, share: 0.2}]",
                "workers=0",
                "--json",
            ]
        )
        == 0
    )
    curated = json.loads(capsys.readouterr().out)["artifact"].removeprefix("datasets/")

    assert main(["data", "list", at, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["job"]) for row in rows] == [
        ("cart", original.meta.get("job", "?")),
        (curated, "curate"),
    ]
    assert sum(rows[0]["transitions"].values()) > sum(rows[1]["transitions"].values()) > 0
    assert main(["data", "list", at]) == 0
    text = capsys.readouterr().out
    assert curated in text and "CartPole-v1" in text and "2 datasets in" in text

    assert main(["data", "show", curated[:6], at]) == 0
    text = capsys.readouterr().out
    assert (
        "curate of cart" in text
        and "length(min=20.0)" in text
        and "hold_out(bins=5, by=random, share=0.2)" in text
    )
    page = Path(text.rsplit("page: ", 1)[1].strip())
    summary = json.loads((page.parent / "summary.json").read_text())
    golden.check("coverage", {"summary": golden.of_numbers(summary)})
    assert (
        "<svg" in page.read_text()
        and json.loads((page.parent / "summary.json").read_text())["schema"] == 1
    )
    stamp = page.stat().st_mtime_ns
    assert main(["data", "show", curated, at, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["page"] == str(page) and page.stat().st_mtime_ns == stamp, "it is found"
    assert [(row["dataset"], row["from"]) for row in facts["lineage"]] == [
        (curated, ["cart"]),
        ("cart", []),
    ]

    assert main(["data", "diff", "cart", curated, at, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["differ"]["made by"][1] == "curate"
        and report["differ"][
            "environment's version" if "environment's version" in report["differ"] else "how"
        ]
    )
    assert (
        report["episodes"]["only_b"] == 0 < report["episodes"]["only_a"]
        and report["coverage"]["a_lacks"]["beyond"] < 0.05
    )
    assert main(["data", "diff", "cart", curated, at]) == 0
    text = capsys.readouterr().out
    assert (
        f"{report['episodes']['both']} episodes are in both" in text
        and "1% for equal distributions" in text
    )


def test_datasets_without_a_fact_that_differs(
    tmp_path: Path, cart_root: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = cart_root(tmp_path)
    storage = Storage(root)
    cart = storage.artifact("datasets", "cart")
    storage.make("datasets", "same", cart.meta, lambda folder: _copied(cart.path, folder))
    assert main(["data", "diff", "cart", "same", f"storage.root={root}"]) == 0
    report = capsys.readouterr().out
    assert "no fact" in report and "0 only in cart, 0 only in same" in report


def _copied(source: Path, folder: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file() and file.name != "COMMIT.json":
            to = folder / file.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())


def test_wrong_use_is_one_sentence(
    tmp_path: Path, cart_root: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    at = f"storage.root={cart_root(tmp_path)}"
    assert (
        main(["data", "show", "nothing", at]) == 2
        and "no artifact datasets/nothing" in capsys.readouterr().err
    )
    assert (
        main(["data", "diff", "cart", "cart", at]) == 2
        and "are the same dataset" in capsys.readouterr().err
    )
    assert main(["data", "list", f"storage.root={tmp_path}/nowhere"]) == 2
    assert "does not exist" in capsys.readouterr().err
    for words in (
        ["data", "show", at.replace("storage.root=", "storage.root:")],
        ["data", "diff", "cart", at],
    ):
        assert main(words) == 2, words
    capsys.readouterr()
