from __future__ import annotations

import json
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import MesocosmError, UsageError

FLOATS = [np.float16, np.float32, np.float64]
INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    shape = draw(shapes)
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(FLOATS))
        low = draw(st.sampled_from([-np.inf, -1.5, 0.0]))
        high = draw(st.sampled_from([np.inf, 2.25]))
        return spaces.Box(low, high, shape, dtype)
    dtype = draw(st.sampled_from([*INTEGERS, np.bool_]))
    if dtype is np.bool_:
        return spaces.Box(0, 1, shape, dtype)
    info = np.iinfo(dtype)
    if info.min < 0 and draw(st.booleans()):
        return spaces.Box(-np.inf, np.inf, shape, dtype)
    return spaces.Box(max(info.min, -(2**53)), min(info.max, 2**53), shape, dtype)


@st.composite
def texts(draw: st.DrawFn) -> spaces.Text:
    charset = draw(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
    )
    low = draw(st.integers(0, 3))
    return spaces.Text(
        max(1, low + draw(st.integers(0, 3))), min_length=low, charset="".join(sorted(set(charset)))
    )


leaves = st.one_of(
    boxes(),
    texts(),
    st.builds(
        lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-5, 5)
    ),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(
        lambda nvec: spaces.MultiDiscrete(nvec, start=[-i for i in range(len(nvec))])
    ),
    st.builds(lambda: spaces.MultiDiscrete([[2, 3], [4, 5]])),
    st.integers(1, 4).map(spaces.MultiBinary),
    st.builds(lambda: spaces.MultiBinary((2, 3))),
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b.c", "d"]), inner, min_size=1, max_size=3).map(
            lambda inside: spaces.Dict(list(inside.items()))
        ),
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=5,
)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


def batch_of(space: gymnasium.Space[Any], values: list[Any]) -> Any:
    return concatenate(space, values, create_empty_array(space, len(values)))


@pytest.mark.integration
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(space=nested, size=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_any_nested_space_round_trips_in_gymnasiums_own_layout(
    space: gymnasium.Space[Any], size: int, seed: int
) -> None:
    space.seed(seed)
    values = [space.sample() for _ in range(size)]
    codec = SpaceCodec(space)
    numbers, categories = codec.encode_list(values)
    assert numbers.shape == (size, codec.numbers) and numbers.dtype == np.float64
    assert categories.shape == (size, codec.categories) and categories.dtype == np.int64
    assert (categories >= 0).all() and (categories < np.array(codec.cardinalities, int)).all()
    batch = batch_of(space, values)
    assert_same(codec.decode(numbers, categories), batch)
    for a, b in zip(codec.encode(batch), (numbers, categories), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same(codec.decode_stored(*codec.stored_list(values)), batch)
    singles = codec.unbatch(batch)
    assert all(space.contains(value) for value in singles)
    assert_same(batch_of(space, singles), batch)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(space=nested)
def test_any_nested_space_goes_through_json(space: gymnasium.Space[Any]) -> None:
    text = json.dumps(space_to_json(space), allow_nan=False)
    back = space_from_json(json.loads(text))
    assert back == space
    assert [leaf.path for leaf in SpaceCodec(back).leaves] == [
        leaf.path for leaf in SpaceCodec(space).leaves
    ], "in the same order"
    assert json.dumps(space_to_json(back), allow_nan=False) == text


def test_bounds_of_every_kind_go_through_json() -> None:
    box = spaces.Box(
        np.array([-np.inf, -1, 0.1], np.float32), np.array([1, np.inf, 0.2], np.float32)
    )
    assert space_from_json(json.loads(json.dumps(space_to_json(box), allow_nan=False))) == box
    whole = spaces.Box(-np.inf, np.inf, (2,), np.int64)
    back = space_from_json(space_to_json(whole))
    assert not back.bounded_below.any() and not back.bounded_above.any()


def test_text_becomes_characters_that_end_in_zero() -> None:
    codec = SpaceCodec(
        spaces.Dict(n=spaces.Discrete(2), t=spaces.Text(4, min_length=1, charset="cba"))
    )
    numbers, categories = codec.encode_list([{"n": 1, "t": "abc"}, {"n": 0, "t": "cccc"}])
    assert categories.tolist() == [[1, 1, 2, 3, 0], [0, 3, 3, 3, 3]]
    assert codec.cardinalities == (2, 4, 4, 4, 4)
    (span,) = codec.texts
    assert (span.start, span.length, span.min_length) == (1, 4, 1)
    assert codec.decode(numbers, categories)["t"] == ("abc", "cccc")


@given(codes=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_decoded_text_is_always_valid(codes: list[int]) -> None:
    space = spaces.Text(4, min_length=2, charset="xyz")
    (text,) = SpaceCodec(space).decode(np.zeros((1, 0)), np.array([codes]))
    assert space.contains(text)


def test_decoding_clips_nothing_to_bounds_and_rounds_integers() -> None:
    codec = SpaceCodec(
        spaces.Tuple([spaces.Box(-1, 1, (1,), np.float32), spaces.Box(0, 10, (2,), np.int8)])
    )
    floats, integers = codec.decode(np.array([[7.5, 41.6, 300.0]]), np.zeros((1, 0), np.int64))
    assert floats.tolist() == [[7.5]]
    assert integers.tolist() == [[42, 127]]
    (numbers, _) = codec.encode((floats, integers))
    assert numbers.tolist() == [[7.5, 42, 127]]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (
            spaces.Dict(cam=spaces.Dict(rgb=spaces.Box(0, 255, (8, 8, 4), np.uint8))),
            ["observation.cam.rgb", "alpha channel"],
        ),
        (
            spaces.Dict(seq=spaces.Sequence(spaces.Discrete(3))),
            ["observation.seq", "Sequence", "use Box"],
        ),
        (spaces.OneOf([spaces.Discrete(2), spaces.Discrete(3)]), ["observation", "OneOf"]),
        (spaces.Dict({}), ["no parts"]),
    ],
)
def test_unsupported_spaces_are_refused_with_their_key_path(
    space: gymnasium.Space[Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        SpaceCodec(space)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "value", "words"),
    [
        (
            spaces.Dict(p=spaces.Box(-1, 1, (2,))),
            {"p": np.zeros(3)},
            ["observation.p", "(3,)", "(2,)"],
        ),
        (spaces.Dict(p=spaces.Box(-1, 1, (2,))), {"q": np.zeros(2)}, ["observation.p", "'p'"]),
        (spaces.Discrete(3), 3, ["the value 3", "Discrete(3)"]),
        (spaces.Discrete(3), 0.5, ["float64"]),
        (spaces.Text(3, charset="ab"), "abz", ["'z'"]),
        (spaces.Text(3, charset="ab"), "abab", ["'abab'", "1 to 3"]),
        (spaces.Box(-np.inf, np.inf, (1,), np.int64), np.array([2**60]), ["2**53", str(2**60)]),
    ],
)
def test_values_outside_their_space_are_refused_by_name(
    space: gymnasium.Space[Any], value: Any, words: list[str]
) -> None:
    with pytest.raises(MesocosmError) as caught:
        SpaceCodec(space).encode_list([value])
    assert all(word in str(caught.value) for word in words), str(caught.value)
