"""The ladder's rungs have the sizes of their names; an error for a wrong name gives the nearest."""

from __future__ import annotations

import itertools

import pytest

from mesocosm.errors import UsageError
from mesocosm.model.config import FAMILIES, ModelConfig
from mesocosm.model.families import NETWORKS
from mesocosm.model.ladder import DEC_HEAD, ENSEMBLE_RUNGS, HEAD, LADDERS, RUNGS, nominal


def test_rungs_are_near_their_names() -> None:
    assert " ".join(RUNGS) == "10k 30k 100k 300k 1m 3m 10m 30m 100m 300m 1b 3b 7b"
    assert list(RUNGS) == list(ENSEMBLE_RUNGS)
    assert tuple(LADDERS) == tuple(NETWORKS) == FAMILIES
    for ladder in LADDERS.values():
        for size, rung in ladder.items():
            assert abs(rung.params / nominal(size) - 1) < 0.15


def test_heads_have_one_size_and_the_decoder_grows_with_the_rung() -> None:
    for rung in RUNGS.values():
        assert rung.backbone.heads * HEAD == rung.d_model
        assert rung.decoder.heads * DEC_HEAD == rung.d_dec
    for below, above in itertools.pairwise(RUNGS.values()):
        assert above.d_model >= below.d_model and above.d_dec >= below.d_dec
        assert above.params > below.params


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("size", "30m0", "'30m'"),
        ("size", "2x", "10k, 30k"),
        ("family", "sequense", "'sequence'"),
        ("members", 0, ">= 1"),
        ("base_steps", -1, ">= 0"),
    ],
)
def test_a_wrong_value_is_named_with_the_fix(key: str, value: object, fix: str) -> None:
    config = ModelConfig()
    setattr(config, key, value)
    with pytest.raises(UsageError, match=f"model.{key}") as error:
        config.validate()
    assert fix in str(error.value) and str(value) in str(error.value)
