"""Reading the table: an error is one sentence with file, line, column, value and fix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mesocosm.cli.main import main
from mesocosm.errors import UsageError
from mesocosm.scaling.table import CellTable

HEAD = "params,data,loss\n"
GOOD = HEAD + "1e4,1e4,2.0\n1e5,1e5,1.0\n"


def read(tmp_path: Path, text: str) -> CellTable:
    (tmp_path / "t.csv").write_text(text)
    return CellTable.read(tmp_path / "t.csv")


SEEDS, RATES = "params,data,loss,seed\n", "params,data,loss,lr,seed,trunk,unique\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv has no column 'params' \(it has none\)"),
        ("param,data,loss\n1,2,3\n", r"no column 'params' \(it has param, .*did you mean 'param'"),
        ("params,data\n1,2\n", "no column 'loss'"),
        ("params,data,loss,loss\n1,2,3,4\n", "2 columns 'loss'; keep one"),
        (HEAD, "has no rows"),
        (GOOD + "1e4,2e4,-1.5\n", r"line 4: loss=-1\.5 must .*; leave a run that failed out"),
        (GOOD + "1e4,2e4,0\n", "line 4: loss=0 must be a finite number above 0"),
        (GOOD + "1e4,2e4,nan\n", "line 4: loss=nan must"),
        (GOOD + "1e4,2e4,inf\n", "line 4: loss=inf must"),
        (GOOD + "1e4,2e4,\n", "line 4: loss is empty"),
        (GOOD + "1e4,2e4,x1\n", "line 4: loss=x1 must"),
        (GOOD + "1e4,2_0,1\n", "line 4: data=2_0 must"),
        ("params;data;loss\n1;2;3\n", "by semicolons .*; write commas"),
        (GOOD + "-3,2e4,1\n", "line 4: params=-3 must"),
        (GOOD + "1e4,2e4\n", "line 4: 2 fields for 3 columns"),
        (GOOD + "1e200,1e200,1\n", r"line 4: 6 x params=1e\+200 x .* is beyond a float"),
        ("params,data,loss,flops\n1e10,1e10,2,-7e18\n", "line 2: flops=-7e18 .*beyond int64"),
        ("params,data,loss,unique\n1e4,1e4,2,\n", "line 2: unique is empty"),
        ("params,data,loss,weight\n1e4,1e4,2,0\n", "line 2: weight=0 must"),
        ("params,data,loss,trunk\n1e4,1e4,2,\n", "line 2: trunk is empty"),
        (GOOD + "1e4,1e4,2.5\n", "lines 2 and 4 give loss=2 and loss=2.5 .*lr, seed, trunk, uniq"),
        (SEEDS + "1e4,1e4,2,0\n1e4,1e4,3,0\n", "lines 2 and 3 .*seed=0.*column .seed.*lr, trunk"),
        (
            RATES + "1e4,1e4,2,.1,0,a,1e4\n1e4,1e4,3,.1,0,a,1e4\n",
            r"lr=\.1, seed=0, trunk=a, unique=1e4\); keep one, correct a column \(lr, seed,",
        ),
        (
            "params,data,loss,optimizer,batch,run\n1e4,1e4,2,sgd,8,a\n1e4,1e4,3,adam,8,b\n",
            "fit a table for each value of a column that fit does not read .optimizer, run",
        ),
        (
            "params,data,loss,tokenizer\n1e4,1e4,2,a\n1e4,2e4,1,b\n",
            r"t\.csv, line 3: tokenizer=b must be a, as in line 2, .* fit a table for each token",
        ),
        (
            "params,data,loss,tokenizer\n1e4,1e4,2,a\n1e4,2e4,1,\n",
            "line 3: tokenizer=empty must be a",
        ),
    ],
)
def test_a_wrong_table_is_one_sentence(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)
    law = tmp_path / "law.json"
    assert main(["fit", str(tmp_path / "t.csv"), "--out", str(law)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not law.exists()


def test_unreadable_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nonesuch\.csv' cannot be read: No such file"):
        CellTable.read(tmp_path / "nonesuch.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="is not text"):
        CellTable.read(tmp_path / "t.csv")


def test_counts_beyond_int64_are_floats(tmp_path: Path) -> None:
    rows = "6889410560,137788211200,2.4\n10000000000000,40000000000000,2.0\n"
    table = read(tmp_path, HEAD + rows)
    assert table.flops == pytest.approx([6 * 6889410560 * 137788211200, 2.4e27], rel=1e-15)
    assert not table.flops_given and list(table.notes) == ["flops_6nd"]


def test_seeds_are_resampled_with_their_cell(tmp_path: Path) -> None:
    table = read(tmp_path, SEEDS + "1e4,1e4,2,0\n1e4,1e4,2.1,1\n1e4,2e4,1.9,0\n")
    assert len(table) == 3 and not table.by_trunk
    assert list(table.group) == [0, 0, 1] and list(table.series) == [0, 1, 0]
    rows = "1e4,1e4,2,0,a\n1e4,1e4,2.1,1,b\n1e4,2e4,1.9,0,a\n"
    trunks = read(tmp_path, "params,data,loss,seed,trunk\n" + rows)
    assert list(trunks.group) == [0, 1, 0] and trunks.by_trunk


def test_trunks_distinguish_runs_of_one_cell(tmp_path: Path) -> None:
    table = read(tmp_path, "params,data,loss,trunk\n1e4,1e4,2.0,a\n1e4,1e4,2.1,b\n1e5,1e5,1.0,a\n")
    assert len(table) == 3
    with pytest.raises(UsageError, match=r"loss=2 and loss=2\.5 for one cell .*trunk=a"):
        read(tmp_path, "params,data,loss,trunk\n1e4,1e4,2.0,a\n1e4,1e4,2.5,a\n")


def test_the_best_learning_rate_of_a_cell_is_fitted(tmp_path: Path) -> None:
    first = "1e4,1e4,2.0,0.1,0\n1e4,1e4,2.6,0.1,1\n1e4,1e4,2.2,0.2,0\n1e4,1e4,2.1,0.2,1\n"
    rows = first + "1e4,1e4,2.9,0.4,0\n1e5,1e4,1.5,0.1,0\n1e5,1e4,1.4,0.2,0\n"
    table = read(tmp_path, "params,data,loss,lr,seed\n" + rows)
    assert sorted(table.loss) == [1.4, 2.1, 2.2]
    note = table.notes["lr_best"]
    assert "2 of 2 cells" in note and "4 rows are set aside" in note
    assert "In 1 of them the best is the least or the largest rate" in note


def test_exact_repeats_count_once(tmp_path: Path) -> None:
    table = read(tmp_path, GOOD + GOOD.removeprefix(HEAD))
    assert len(table) == 2 and table.rows == 4
    assert "2 rows" in table.notes["duplicate_rows"]


def test_unique_beyond_the_data_repeats_nothing(tmp_path: Path) -> None:
    table = read(tmp_path, "params,data,loss,unique\n1e4,1e4,2,5e4\n1e4,4e4,1.9,5e4\n")
    assert not table.repeated and table.cells().unique == pytest.approx(np.log([1e4, 4e4]))


def test_a_count_that_overflowed_int64_is_refused(tmp_path: Path) -> None:
    """6 N D = 2.4e19 wraps to 5.55e18 in int64, which looks like a count."""
    wrapped = (6 * 2000000000 * 2000000000) % 2**64
    assert 0 < wrapped < 2**63
    message = r"line 2: flops=5\.5\d+e\+18 is 6 x params x data=2\.4e\+19 past the end of int64"
    with pytest.raises(UsageError, match=message):
        read(tmp_path, f"params,data,loss,flops\n2000000000,2000000000,2.0,{wrapped}\n")
