"""Faults of logs: each is named by file and row, and `bad=drop` imports the rest."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mesocosm.data.ingest.readers import jsonl as jsonl_reader
from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError

from .logs import (
    SCALARS,
    Rows,
    changed,
    columns,
    each,
    exported,
    jsonl,
    logs,
    moves,
    parquet,
    planned,
    refused,
    steps,
    warns,
    without,
)

NAN, INF = float("nan"), float("inf")
# By name: the rows, and the message with its row.
BAD: dict[str, tuple[Rows, str]] = {
    name: (changed(logs(), row, **changes), message)
    for name, row, changes, message in (
        (
            "nan",
            6,
            {"observation": [NAN, 0.0]},
            "row 7: .*observation.* finite, got nan at step 1 of episode 1",
        ),
        ("inf", 6, {"reward": INF}, "row 7: reward .* finite, got inf at step 1 of episode 1"),
        ("duplicate", 6, {"step": 0}, "row 7: step 0 of episode 1 comes twice"),
        ("gap", 6, {"step": 3}, "row 7: episode 1 goes from step 0 to step 3"),
        ("unsorted", 7, {"step": 0}, "row 8: step 0 of episode 1 comes after its step 1; sort"),
        ("goes on", 6, {"truncated": True}, "row 8: episode 1 has ended at step 1"),
        (
            "no action",
            6,
            dict.fromkeys(SCALARS),
            "row 7: action is missing at step 1 of episode 1, which continues",
        ),
        ("no observation", 6, {"observation": None}, "row 7: observation is missing at step 1"),
        ("no reward", 6, {"reward": None}, "row 7: reward is missing at step 1"),
        ("shape", 6, {"observation": [1.0]}, r"row 7: observation .* shape \(2,\) at step 1"),
    )
}
BAD |= {
    "late start": (logs()[:5] + logs()[6:], "row 6: episode 1 begins at step 1"),
    "comes again": ([*logs(), logs()[0]], "row 16: episode 0 comes again"),
    "negative": (
        each(logs(), episode=lambda row: row["episode"] - 1),
        "row 1: episode -1 is negative",
    ),
    "behaviour": (
        changed(each(logs(), behaviour="a"), 6, behaviour="b"),
        "row 7: behaviour of episode 1 changes from 'a' to 'b'",
    ),
    "task": (
        changed(each(logs(), task={"m": 0}), 6, task={"m": 1}),
        "row 7: task of episode 1 changes",
    ),
    "next": (
        changed(moves(logs()), 5, next_observation=[9.0, 9.0]),
        "row 6: next_observation at step 1 of episode 1 is not the observation of step 2",
    ),
    "half a duration": (
        changed(each(logs(), duration=1.0), 6, duration=None),
        "row 7: duration is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("batch", [1, 3, 1 << 14])
def test_bad_rows_are_named(
    name: str, form: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", batch)
    rows, message = BAD[name]
    path = tmp_path / f"bad.{form}"
    parquet(path, rows, row_group_size=4) if form == "parquet" else jsonl(path, rows)
    refused(f"bad.{form}' {message}", path)
    rest = planned(path, bad="drop")
    assert rest["left out"][0]["episodes"] >= 1 and rest["episodes"] >= 1


FIXED = {name: pa.list_(pa.float32(), 2) for name in ("observation", "next_observation")}
HALF = decimal.Decimal("0.5")
# By name: the rows, the columns' types, and the message with its row.
ODD: dict[str, tuple[Rows, dict[str, pa.DataType], str]] = {
    name: (changed(rows, row, **changes), types, f"row {row + 1}: {message}")
    for name, rows, row, changes, types, message in (
        ("null episode", steps(), 5, {"episode": None}, {}, "episode is missing in a row next to"),
        ("null step", steps(), 5, {"step": None}, {}, "step is missing in a row of"),
        ("null first step", steps(), 4, {"step": None}, {}, "step is missing in a row of"),
        ("null list", steps(), 5, {"observation": None}, FIXED, "observation is missing at step 1"),
        (
            "null in a list",
            steps(),
            5,
            {"observation": [None, 1.0]},
            FIXED,
            "observation is missing at step 1",
        ),
        (
            "null decimal",
            steps(reward=HALF),
            5,
            {"reward": None},
            {"reward": pa.decimal128(5, 2)},
            "reward is missing at step 1",
        ),
        (
            "negative duration",
            steps(duration=1.0),
            5,
            {"duration": -1.0},
            {},
            "duration .* got -1 at step 1",
        ),
        (
            "huge observation",
            steps(),
            5,
            {"observation": [0.5, 1e300]},
            {},
            r"observation\[1\] .*float32.* got 1e\+300 at step 1(?=.*; rescale it)",
        ),
        (
            "huge reward",
            steps(),
            5,
            {"reward": -1e39},
            {},
            r"reward .*float32.* got -1e\+39 at step 1(?=.*; rescale it)",
        ),
    )
}
NOTHING = dict.fromkeys(steps()[0])
ODD["null row"] = [*steps()[:5], NOTHING, *steps()[5:]], {}, "row 6: episode is missing in a row"


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("batch", [2, 1 << 14])
def test_an_odd_row_of_parquet_is_named_or_its_episode_dropped(
    name: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)
    rows, types, message = ODD[name]
    schema = pa.Table.from_pylist(rows).schema
    schema = pa.schema([field.with_type(types.get(field.name, field.type)) for field in schema])
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=5)
    refused(f"odd.parquet' {message}.* episode 1", path)
    rest = planned(path, bad="drop")
    assert (rest["episodes left out"], rest["episodes"], rest["transitions"]) == (1, 2, 9)


def test_the_first_integer_without_an_exact_float_is_dropped(tmp_path: Path) -> None:
    for huge, episodes in ((2**53, 3), (2**53 + 1, 2)):
        rows = changed(each(steps(), next_observation=0, observation=1), 1, observation=huge)
        plan = planned(jsonl(tmp_path / "a.jsonl", without(rows, "next_observation")), bad="drop")
        assert plan["episodes"] == episodes


def test_huge_values_of_a_task(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", steps(task={"mass": 1e300}))
    refused(r"row 1: task.mass .*float32.* got 1e\+300 at step 0 of episode 0", path)


# -- JSON


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"observation": "a"}, "observation is a string where it was a list before .mixed dtypes"),
        ({"observation": [1.0, True]}, "observation is true or false where it was a number"),
        ({"action": 2**70}, "action holds an integer beyond 64 bits"),
        ({"episode": None}, "episode is missing"),
        ({"step": 1.5}, "step .* got 1.5"),
        ({"reward": "much"}, "reward is a string where it was a number"),
    ],
)
def test_mixed_kinds_in_json(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(f"row 7: {message}", jsonl(tmp_path / "a.jsonl", changed(logs(), 6, **row)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episode": "2"}, "episode is .* where it .* before .mixed dtypes"),
        ({"observation": "a"}, "observation is .* where it .* before .mixed dtypes"),
        ({"behaviour": 3}, "behaviour is .*mixed dtypes"),
        ({"observation": [0.0, INF]}, "observation.1. .* got inf"),
        ({"step": 7}, "episode 2 goes from step 1 to step 7"),
    ],
)
def test_mixed_kinds_far_into_json(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BATCH_ROWS", 6), ("HEAD_ROWS", 6), ("PIECE_BYTES", 300)):
        monkeypatch.setattr(jsonl_reader, name, value)
    rows = changed(each(logs(), behaviour="a"), 12, **change)
    refused(f"row 13: {message}", jsonl(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("name", ["observation", "next_observation"])
def test_the_faulty_row_is_named_and_not_the_one_before(
    name: str, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", size)
    rows = moves(logs())
    number = next(i for i, row in enumerate(rows) if (row["episode"], row["step"]) == (1, 1))
    path = jsonl(tmp_path / "a.jsonl", changed(rows, number, **{name: [NAN, 0.0]}))
    refused(f"row {number + 1}: {name}.0. .* got nan at step 1 of episode 1", path)
    (left,) = planned(path, bad="drop")["left out"]
    assert (left["reason"], left["episodes"]) == ("not finite", 1)


def test_lines_that_are_not_objects(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", logs())
    text = path.read_text()
    for bad, message in (("{", "is not JSON"), ("[1]", "holds a list"), ("\n{}", "is empty")):
        path.write_text(f"{text}{bad}\n")
        refused(f"row 16: the line {message}", path)
    path.write_text(f"{text}\n\n")
    assert planned(path)["transitions"] == 12


# -- several files, and the environment


def test_files_that_differ(tmp_path: Path) -> None:
    later = each(logs(), episode=lambda row: row["episode"] + 3)
    a = parquet(tmp_path / "a.parquet", logs())
    b = parquet(tmp_path / "b.parquet", each(later, observation=[0, 1]))
    types = r"list<.*double> in '.*a.parquet' and list<.*int64> in '.*b.parquet'"
    refused(rf"column 'observation' is {types} \(mixed dtypes\)", a, b)
    c = parquet(tmp_path / "c.parquet", without(later, "reward"))
    refused(r"c.parquet' has no column 'reward', which '.*a.parquet' has", a, c)
    d = parquet(tmp_path / "d.parquet", each(later, extra=1))
    assert columns(planned(a, d))["extra"]["became"] == "nothing"
    e = tmp_path / "e.parquet"
    for damaged in (b"PAR1 not at all", b"", d.read_bytes()[:-20], d.read_bytes()[8:]):
        e.write_bytes(damaged)
        refused(r"e.parquet' cannot be read as Parquet", a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": 2}, r"action .* Discrete\(2\), got 2 at step 2 of episode 0"),
        (
            {"observation": [9.0, 0.0, 0.0, 0.0]},
            r"observation .* got \[9.0, 0.0, 0.0, 0.0\] at step 2 of episode 0",
        ),
    ],
)
def test_every_value_is_checked_against_the_environment(
    change: dict[str, Any], message: str, cart: Dataset, tmp_path: Path
) -> None:
    rows = changed(exported(cart), 2, **change)
    path = parquet(tmp_path / "a.parquet", rows)
    for bad in ("refuse", "drop"):
        (left,) = planned(path, env="CartPole-v1", bad=bad)["left out"]
        assert left["reason"] == "outside the space" and left["episodes"] == 1
        assert left["first"] == f"{str(path)!r} row 3"
    only = [row for row in rows if row["episode"] == 0]
    refused(f"row 3: {message}", parquet(tmp_path / "only.parquet", only), env="CartPole-v1")


def test_another_environment_than_the_logged_one(cart: Dataset) -> None:
    export = cart.paths[0] / "episodes"
    with pytest.raises(UsageError, match=r"observation .* shape \(3,\)"):
        planned(export, env="Pendulum-v1")
    refused("did you mean 'CartPole-v1'", export, env="CartPol-v1")


# -- mistakes of loggers


def repeated(row: dict[str, Any]) -> Any:
    return row["observation"]


def restarted(row: dict[str, Any]) -> Any:
    return [0.0, (row["episode"] + 1) / 8]


@pytest.mark.parametrize("batch", [1, 2, 1 << 14])
@pytest.mark.parametrize("form", ["next", "last row"])
def test_known_mistakes_are_named(
    form: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)

    def plan(rows: Rows) -> dict[str, Any]:
        return planned(parquet(tmp_path / "a.parquet", rows, row_group_size=5))

    def ended(last: Callable[[dict[str, Any]], Any], but: int = -1) -> dict[str, Any]:
        """The plan of logs whose episodes end in the observation `last`, except one."""
        rows: Rows = []
        for row in steps():
            if row["terminated"] and row["episode"] != but:
                row["next_observation"] = last(row)
            rows.append(row)
            if form == "last row" and row["terminated"]:
                after = {"step": row["step"] + 1, "observation": row["next_observation"]}
                rows.append(row | after | dict.fromkeys(SCALARS))
        return plan(without(rows, "next_observation") if form == "last row" else rows)

    repeats = "equals the observation before it", "twice"
    restarts = "first observation of the next episode", "SAME_STEP", "final_obs"
    for last, words, others in ((repeated, repeats, restarts), (restarted, restarts, repeats)):
        assert warns(ended(last), *words) and not warns(ended(last), *others)
        assert not warns(ended(last, but=1), *words), "not in every episode"
    still = steps(observation=[1.0, 1.0], next_observation=[1.0, 1.0])
    for rows in (steps(), still):  # an observation that never changes
        assert not warns(plan(rows), *repeats) and not warns(plan(rows), *restarts)


def test_a_next_observation_that_repeats_every_observation_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", each(steps(), next_observation=repeated))
    refused("row 1: next_observation at step 0 of episode 0 repeats the observation", path)
