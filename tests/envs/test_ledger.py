"""The ledger is exact under parallel processes, and counts whatever a killed one may have done."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from factories import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.envs.amounts import BUDGETED, PURPOSES, Amount, Usage
from mesocosm.envs.config import BudgetConfig, PriceConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import ArtifactError, BudgetSpent, StorageError, UsageError
from mesocosm.store.artifacts import Storage


def opened(root: str, budget: int | None = None, **bounds: int) -> Ledger:
    return Ledger(Storage(root), "x", BudgetConfig(budget), bounds=bounds)


def in_processes(target: Any, arguments: list[tuple[Any, ...]], start: str = "fork") -> None:
    context: Any = multiprocessing.get_context(start)
    processes = [context.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def _spend(
    root: str, budget: int, block: int, purpose: str, out: Path, whole: bool = False
) -> None:
    """Reserve and use blocks until the budget is spent; write the steps. Every third block is used
    by half, unless `whole`.
    """
    ledger, used, turn = opened(root, budget), 0, 0
    try:
        while True:
            turn += 1
            held = ledger.reserve(purpose, block, resets=1)
            steps = held.steps if whole or turn % 3 else held.steps // 2
            ledger.confirm(Usage(held, steps, 1, 0.001))
            used += steps
    except BudgetSpent:
        out.write_text(str(used))


def test_four_processes_spend_exactly_the_budget(root: str, tmp_path: Path) -> None:
    blocks = {7: "collect", 16: "select", 33: "collect", 64: "select"}
    files = [tmp_path / f"{block}" for block in blocks]
    spenders = zip(blocks.items(), files, strict=True)
    in_processes(_spend, [(root, 997, *block, file) for block, file in spenders])
    totals = opened(root, 997).totals()
    # A process to which no step is left stops though another may still give some back: never over,
    # and what is counted was used.
    assert totals.spent == sum(int(file.read_text()) for file in files)
    assert 997 - 64 < totals.spent <= 997
    assert totals.unconfirmed == () and totals.remaining == 997 - totals.spent
    rest = opened(root, 997)
    if totals.remaining:
        assert rest.reserve("collect", 1000).steps == totals.remaining
    with pytest.raises(BudgetSpent, match=r"reality.budget.steps=997 is spent"):
        rest.reserve("collect", 1)
    names = [name for name in Storage(root).list("ledgers/x") if name != "snapshots"]
    assert names == [f"{n:08d}.json" for n in range(len(names))]


def _hold(root: str, out: Path) -> None:
    ledger, total = opened(root, 500), 0
    try:
        while True:
            total += ledger.reserve("collect", 11).steps
    except BudgetSpent:
        out.write_text(str(total))


def test_parallel_grants_add_up_to_the_budget(root: str, tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(4)]
    in_processes(_hold, [(root, file) for file in files])
    assert sum(int(file.read_text()) for file in files) == 500


def _wait_mid_block(root: str, ready: Path) -> None:
    ledger = opened(root)
    ledger.confirm(Usage(ledger.reserve("collect", 64, resets=8), 64, 2, 0.5))
    ledger.reserve("collect", 64, resets=3)
    ready.write_text("")
    time.sleep(600)


def test_a_killed_process_is_never_forgotten(root: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_wait_mid_block, args=(root, tmp_path / "ready"))
    process.start()
    wait_until((tmp_path / "ready").exists)
    process.kill()
    process.join()
    ledger = Ledger(Storage(root), "x", BudgetConfig(300), PriceConfig(0.5, 10.0, "EUR"))
    totals = ledger.totals()
    collect = totals.purposes["collect"]
    assert (collect.steps, collect.unconfirmed_steps) == (128, 64)
    assert (collect.resets, collect.unconfirmed_resets) == (5, 3)
    assert (collect.price, collect.unconfirmed_price, collect.seconds) == (64 + 50, 32 + 30, 0.5)
    assert totals.spent == 128 and totals.remaining == 172
    assert [(r.purpose, r.steps) for r in totals.unconfirmed] == [("collect", 64)]
    assert json.loads(json.dumps(totals.to_json()))["price"] == 114
    assert ledger.reserve("select", 1000).steps == 172
    with pytest.raises(BudgetSpent, match="236 of them unconfirmed"):
        ledger.reserve("collect", 1)


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(PURPOSES),
        st.integers(1, 40),
        st.floats(0, 1),
        st.sampled_from(["reserve", "confirm", "both", "exact"]),
    ),
    max_size=40,
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations=OPERATIONS, budget=st.integers(0, 200), bound=st.integers(0, 60))
def test_any_interleaving_agrees_with_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, operations: list, budget: int, bound: int
) -> None:
    """Three ledgers open on one journal against a model in plain integers."""
    root = str(tmp_path_factory.mktemp("ledger"))
    ledgers = [opened(root, budget, judge=bound, select=bound) for _ in range(3)]
    confirmed, held = dict.fromkeys(PURPOSES, 0), []

    def spent(*purposes: str) -> int:
        waiting = sum(r.steps for r in held if r.purpose in purposes)
        return waiting + sum(confirmed[p] for p in purposes)

    def left(purpose: str) -> int | None:
        limits = [budget - spent(*BUDGETED)] if purpose in BUDGETED else []
        limits += [bound - spent(purpose)] if purpose in ("judge", "select") else []
        return min(limits, default=None)

    for index, purpose, steps, share, operation in operations:
        ledger, usage = ledgers[index], None
        assert ledger.remaining(purpose) == left(purpose)
        if operation in ("confirm", "both") and held:
            first = held.pop(0)
            usage = Usage(first, int(share * first.steps))
            confirmed[first.purpose] += usage.steps
        if operation == "confirm":
            if usage is not None:
                ledger.confirm(usage)
            continue
        allowed, least = left(purpose), steps if operation == "exact" else 1
        try:
            granted = ledger.reserve(purpose, steps, least=least, confirming=usage)
        except BudgetSpent:
            assert allowed is not None and allowed < least
            if usage is not None:  # a refusal confirms nothing either
                held.insert(0, usage.reservation)
                confirmed[usage.reservation.purpose] -= usage.steps
        else:
            assert granted.steps == (steps if allowed is None else min(steps, allowed))
            held.append(granted)
    for ledger in ledgers:
        totals = ledger.totals()
        assert {p: totals.purposes[p].steps for p in PURPOSES} == {p: spent(p) for p in PURPOSES}
        assert totals.spent == spent(*BUDGETED) <= budget
        assert sorted(r.number for r in totals.unconfirmed) == sorted(r.number for r in held)


def test_of_two_confirmations_the_first_holds(root: str) -> None:
    one, two = opened(root), opened(root)
    held = one.reserve("collect", 10)
    two.confirm(Usage(held, 4))
    one.confirm(Usage(held, 9))
    assert one.totals().steps == two.totals().steps == 4


def test_a_reentrant_call_does_not_let_a_grant_pass_the_budget(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector closes a forgotten environment between our reading the budget and our
    record; another process was there before.
    """
    ledger, other = (opened(root, 50) for _ in range(2))
    forgotten = ledger.reserve("collect", 10)
    remaining, calls = ledger._remaining, []

    def interrupted(purpose: str, confirming: Usage | None) -> int | None:
        left = remaining(purpose, confirming)
        if not calls:
            calls.append(other.reserve("collect", 40))
            ledger.confirm(Usage(forgotten, 10))
        return left

    monkeypatch.setattr(ledger, "_remaining", interrupted)
    with pytest.raises(BudgetSpent):
        ledger.reserve("collect", 40)
    assert ledger.totals().spent == 50


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are read from storage."""
    paths: list[str] = []
    read = Storage.read

    def recorded(storage: Storage, path: str) -> bytes | None:
        paths.append(path)
        return read(storage, path)

    monkeypatch.setattr(Storage, "read", recorded)
    return paths


def test_appending_reads_only_what_is_new(root: str, reads: list[str]) -> None:
    ledger = opened(root)
    spend(ledger, 30)
    reads.clear()
    ledger.reserve("collect", 1)
    assert len(reads) == 1


def records(root: str) -> list[Path]:
    return sorted((Path(root) / "ledgers" / "x").glob("*.json"))


def spend(ledger: Ledger, times: int) -> None:
    for _ in range(times):
        ledger.confirm(Usage(ledger.reserve("collect", 3, resets=1, holder="h"), 2, 1, 0.25))


@pytest.mark.integration
def test_opening_reads_a_snapshot_and_the_records_after_it(root: str, reads: list[str]) -> None:
    ledger = opened(root)
    spend(ledger, 1000)
    waiting = ledger.reserve("judge", 9, holder="late")
    other = opened(root)
    reads.clear()
    totals = other.totals()
    assert len(records(root)) == 2001 and len(reads) <= 100
    assert totals == ledger.totals() and totals.purposes["collect"].seconds == 250.0
    assert totals.unconfirmed == (waiting,)
    other.confirm(Usage(waiting, 4))
    assert ledger.totals().purposes["judge"].steps == 4


def test_a_ledger_without_snapshots_gets_one_when_it_is_opened(root: str) -> None:
    spend(opened(root), 100)
    folder = Path(root) / "ledgers" / "x" / "snapshots"
    for path in folder.iterdir():
        path.unlink()
    totals = opened(root).totals()
    assert totals.steps == 200 and [path.name for path in folder.iterdir()] == ["00000200.json"]
    (folder / "00000200.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"snapshots/00000200\.json.*damaged.*remove"):
        opened(root).totals()


def test_a_snapshot_of_before_a_purpose_existed_is_read(root: str) -> None:
    spend(opened(root), 100)
    (path,) = (Path(root) / "ledgers" / "x" / "snapshots").glob("00000192.json")
    state = json.loads(path.read_text())
    del state["confirmed"]["play"]
    path.write_text(json.dumps(state))
    assert opened(root).totals().steps == 200


class NoSnapshots(Storage):
    def write(self, path: str, data: bytes) -> None:
        raise StorageError("no space is left on the disk")


def test_a_snapshot_that_cannot_be_written_fails_no_record(root: str) -> None:
    """An appended record counts as spent, so appending it must not raise."""
    spend(Ledger(NoSnapshots(root), "x"), 70)
    assert Ledger(NoSnapshots(root), "x").totals().steps == 140
    assert not (Path(root) / "ledgers" / "x" / "snapshots").exists()


@pytest.mark.parametrize("number", [0, 70, 99, 128, 150])
def test_a_deleted_record_is_noticed(root: str, number: int) -> None:
    """Before the newest snapshot (of record 128) and after it."""
    spend(opened(root, 400), 100)
    records(root)[number].unlink()
    with pytest.raises(ArtifactError, match=rf"{number:08d}\.json.*missing"):
        opened(root, 400).reserve("collect", 1)


def test_the_last_records_cannot_go_unnoticed_past_a_snapshot(root: str) -> None:
    spend(opened(root), 64)
    for path in records(root)[100:]:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"00000100\.json.*missing"):
        opened(root).totals()


def test_a_record_deleted_while_a_ledger_is_open_is_not_appended_anew(root: str) -> None:
    one, two = opened(root), opened(root)
    spend(one, 1)
    assert two.totals().steps == 2
    spend(one, 2)
    records(root)[2].unlink()
    with pytest.raises(ArtifactError, match=r"00000002\.json.*replaced"):
        two.reserve("collect", 1)
        two.totals()


def test_the_rest_of_a_confirmed_reservation_stays_spent(root: str) -> None:
    ledger = opened(root, 100)
    held = ledger.reserve("collect", 64, resets=8, holder="h")
    rest = ledger.confirm(Usage(held, 30, 3, 1.5), keep=Amount(12, 1))
    assert rest is not None and (rest.steps, rest.resets, rest.holder) == (12, 1, "h")
    totals = ledger.totals()
    assert totals.spent == 42 and totals.unconfirmed == (rest,) and totals.remaining == 58
    assert ledger.confirm(Usage(held, 30), keep=Amount(5)) is None and ledger.totals().spent == 42


def test_no_budget_is_no_bound_and_bounds_are_by_purpose(root: str) -> None:
    ledger = opened(root, baseline=5)
    assert ledger.reserve("collect", 10**6).steps == 10**6
    assert ledger.remaining("collect") is None and ledger.totals().remaining is None
    assert ledger.reserve("baseline", 9).steps == 5
    with pytest.raises(BudgetSpent, match="the bound of baseline=5 is spent"):
        ledger.reserve("baseline", 1)
    assert ledger.reserve("judge", 7).steps == 7


def test_bad_names_and_damage_are_reported(root: str) -> None:
    with pytest.raises(UsageError, match=r"must consist of letters.* got 'a/b'"):
        Ledger(Storage(root), "a/b")
    opened(root).reserve("collect", 1)
    records(root)[0].write_text("{")
    with pytest.raises(ArtifactError, match=r"00000000.json.*damaged"):
        opened(root).totals()


@pytest.mark.slow
def test_processes_share_a_budget_on_s3(s3: str, tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(2)]
    in_processes(_spend, [(s3, 60, 7, "collect", file, True) for file in files], "spawn")
    totals = opened(s3, 60).totals()
    assert totals.spent == 60 == sum(int(file.read_text()) for file in files)
    assert totals.unconfirmed == ()
