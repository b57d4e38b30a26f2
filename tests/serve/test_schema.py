"""JSON types of spaces: they accept exactly the values of a space, and so does the JSON Schema."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import schemathesis
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import HealthCheck, given, seed, settings
from pydantic import TypeAdapter, ValidationError

from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.serve.http_sessions import to_json
from mesocosm.serve.schema import json_type

INT64 = np.iinfo(np.int64)
LOW = np.array([[-1, -0.7], [0, -np.inf]], np.float32)
FLOATS = spaces.Box(LOW, np.array([[1, 0.7], [np.inf, 3]], np.float32))
TEXTS = spaces.Tuple([spaces.Discrete(2), spaces.Text(2, charset="x")])
SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (2, 3), np.float32),
    "bounds": FLOATS,
    "half": spaces.Box(-np.inf, np.inf, (2,), np.float16),
    "double": spaces.Box(-0.1, np.inf, (1,), np.float64),
    "scalar": spaces.Box(-0.3, 0.3, (), np.float32),
    "empty": spaces.Dict({"none": spaces.Box(0, 1, (0,), np.float32), "one": spaces.Discrete(2)}),
    "bytes": spaces.Box(0, 255, (3,), np.uint8),
    "longs": spaces.Box(INT64.min, INT64.max, (2,), np.int64),
    "flags": spaces.Box(0, 1, (2,), np.bool_),
    "binary": spaces.MultiBinary((2, 2)),
    "multi": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [-2, 0]]),
    "text": spaces.Text(4, min_length=1, charset='ab"\\]^-é'),
    "nested": spaces.Dict(
        {"class": TEXTS, "_id": spaces.Dict({"a b": spaces.Discrete(3, start=-1)})}
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_accepts_every_value(name: str) -> None:
    """A value keeps its bits, in a request and in a reply."""
    space = SPACES[name]
    space.seed(0)
    codec = SpaceCodec(space)
    for reply in (False, True):
        adapter = TypeAdapter(list[json_type(space, "Value", reply=reply)])  # type: ignore[misc]
        values = [space.sample() for _ in range(40)]
        if name == "longs":
            values = [value // 2**11 for value in values]
        batch = concatenate(space, values, create_empty_array(space, len(values)))
        received = adapter.validate_python(json.loads(to_json(codec.unbatch(batch))))
        decoded = codec.decode(*codec.encode_list(received))
        for actual, expected in zip(codec.encode(decoded), codec.encode(batch), strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", SPACES)
def test_json_schema_agrees(name: str) -> None:
    """Values that the JSON Schema allows are accepted, and are in the space."""
    space = SPACES[name]
    adapter: TypeAdapter[Any] = TypeAdapter(json_type(space, "Value"))
    codec = SpaceCodec(space)
    body = adapter.json_schema(ref_template="#/components/schemas/{model}")
    components = {"schemas": body.pop("$defs", {})}
    request = {"required": True, "content": {"application/json": {"schema": body}}}
    route = {"requestBody": request, "responses": {"200": {"description": "ok"}}}
    document: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "x", "version": "0"}}
    document |= {"paths": {"/x": {"post": route}}, "components": components}
    operation = schemathesis.openapi.from_dict(document)["/x"]["POST"]
    checks = list(HealthCheck)

    @seed(0)
    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=checks)
    @given(operation.as_strategy())
    def accepted(case: Any) -> None:
        numbers, _ = codec.encode_list([adapter.validate_python(case.body)])
        assert np.isfinite(numbers).all()

    accepted()


def test_an_array_of_equal_rows_is_a_list() -> None:
    item = {"type": "number", "minimum": -1, "maximum": 1}
    row = {"type": "array", "items": item, "minItems": 3, "maxItems": 3}
    schema = TypeAdapter(json_type(SPACES["box"], "Value")).json_schema()
    assert schema == {"type": "array", "items": row, "minItems": 2, "maxItems": 2}


def test_bounds() -> None:
    """0.7 is within a float32 bound of 0.7, which is a little less. A reply may leave the bounds,
    and its non-finite numbers are null.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(json_type(FLOATS, "Value"))
    assert adapter.validate_python([[1, 0.7], [3.4e38, 3]])
    outside = [[[1, 0.7000001], [0, 0]], [[1, 0], [-0.1, 0]], [[1, 0], [3.5e38, 0]]]
    for wrong in (*outside, [[1, 0], [0, "nan"]], [[1, 0]], [1, 0, 0, 0]):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    assert TypeAdapter(json_type(FLOATS, "Value", reply=True)).validate_python([[5, None], [-1, 4]])
    infinite = np.array([[1, np.nan], [np.inf, 0]], np.float32)
    assert json.loads(to_json(infinite)) == [[1, None], [None, 0]]
