"""Statistics of policy values where the answer is known, and notes where there is none."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from mesocosm.evaluate.metrics.ranking import ranking


def test_a_right_world_and_a_wrong_one() -> None:
    real = np.linspace(0, 100, 20)
    right = ranking(real, 0.5 * real + 10)
    assert [right.pearson, right.spearman, right.spearman_top] == pytest.approx([1.0] * 3)
    assert right.mmrv == right.regret == 0.0
    assert right.fifths == (4, 4, 4, 4, 4) and right.notes == ()
    assert right.error == pytest.approx(np.abs(10 - 0.5 * real).mean())
    wrong = ranking(real, -real)
    assert [wrong.pearson, wrong.spearman] == pytest.approx([-1.0] * 2)
    assert wrong.regret == 1.0 and wrong.chosen == 0
    # each policy's worst violation is against the end of the range that is farther from it
    assert wrong.mmrv == pytest.approx(np.maximum(real, 100 - real).mean())
    noisy = ranking(real, real + np.random.default_rng(0).normal(size=20) * 30)
    low, high = noisy.pearson_interval or (0, 0)
    assert low < noisy.pearson < high < 1


def test_regret_and_rank_violation_by_hand() -> None:
    result = ranking([0.0, 8.0, 10.0], [1.0, 5.0, 4.0])
    assert result.regret == pytest.approx(0.2), "the second looks best, and loses 2 of 10"
    assert result.chosen == 1 and result.mmrv == pytest.approx((0 + 2 + 2) / 3)
    assert result.bias == pytest.approx(-8 / 3)
    assert result.error == pytest.approx((1 + 3 + 6) / 3)


@pytest.mark.parametrize(
    ("real", "imagined", "note"),
    [
        ([5.0] * 15, list(range(15)), "all 15 policies have the same real return, 5"),
        (list(range(15)), [5.0] * 15, "the world gives all 15 policies the same value, 5"),
        ([1.0, 2.0], [1.0, 2.0], "a correlation needs at least 3"),
    ],
)
def test_an_undefined_figure_has_a_note_and_is_never_nan(
    real: list[float], imagined: list[float], note: str
) -> None:
    result = ranking(real, imagined)
    assert result.pearson is None and result.spearman is None and note in result.notes[0]
    assert "NaN" not in json.dumps(asdict(result))


def test_a_note_names_few_policies_and_empty_fifths() -> None:
    clustered = ranking([0.0, *np.linspace(90, 100, 19)], np.arange(20.0))
    assert clustered.pearson is not None
    assert "in the fifths of the real range 1, 0, 0, 0, 19" in clustered.notes[0]
    assert "4 policies" in ranking([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]).notes[0]


def test_policies_that_the_world_holds_equal_are_chosen_alike() -> None:
    one = ranking([0.0, 5.0, 10.0], [1.0, 4.0, 4.0])
    other = ranking([10.0, 5.0, 0.0], [4.0, 4.0, 1.0])
    assert one.regret == other.regret == pytest.approx(0.25), "whatever their order"
    rounding = ranking([1000.0, 1000.0 + 1e-10, 1000.0], [1.0, 2.0, 3.0])
    assert rounding.pearson is None and rounding.regret is None
    assert "the same real return" in rounding.notes[0]
    assert ranking([0.0, 5.0, 10.0], [4.0, 4.0, 4.0]).regret is None, "the world gives no choice"
