"""A world of images over HTTP: base64 of PNG in place of frames."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from mesocosm.config import StorageConfig
from mesocosm.errors import UsageError
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.pictures import png
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy
from mesocosm.serve.json_pictures import from_strings, to_strings
from mesocosm.serve.schema import json_type
from mesocosm.store.artifacts import Storage

from .conftest import Client
from .openenv_client import Socket
from .worlds import TOKEN, local, untrained

SHAPE = (8, 12, 3)
EYES = spaces.Dict(
    eye=spaces.Box(0, 255, SHAPE, np.uint8),
    more=spaces.Tuple([spaces.Box(0, 1, (4, 4, 1), np.float32), spaces.Discrete(2)]),
    pose=spaces.Box(-9, 9, (2,), np.float32),
)


def dictionary(shape: tuple[int, int, int]) -> PatchDictionary:
    size = 16 * shape[2]
    table = np.random.default_rng(0).integers(0, 256, (6, size)).astype(np.uint8)
    return PatchDictionary(shape, 4, table)


def frame_of(text: str) -> Any:
    """The frame of a string, as any client reads it."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.format == "PNG"
        return np.asarray(image)


# -- without a server


def test_images_in_json_and_back() -> None:
    EYES.seed(0)
    for _ in range(5):
        value = EYES.sample()
        value["more"] = (np.rint(value["more"][0] * 255) / np.float32(255), value["more"][1])
        texts = to_strings(EYES, value)
        assert np.array_equal(frame_of(texts["eye"]), value["eye"])
        back = from_strings(EYES, texts)
        assert back["eye"].dtype == np.uint8 and np.array_equal(back["eye"], value["eye"])
        assert back["more"][0].dtype == np.float32
        assert np.array_equal(back["more"][0], value["more"][0].astype(np.float32))
        assert back["pose"] is value["pose"] and back["more"][1] == value["more"][1]


def encoded(picture: Any) -> str:
    return base64.b64encode(png(picture)).decode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", r"observation\.eye must be base64 of a PNG, got 'a'"),
        ("ä" * 4, r"must be base64 of a PNG, got 'ääää'"),
        ("aGk=", r"must be base64 of a PNG: .*cannot identify"),
        ("", r"must be base64 of a PNG: "),
        (encoded(np.zeros((12, 8, 3), np.uint8)), r"a picture of \[8, 12, 3\], got \[12, 8, 3\]"),
        (encoded(np.zeros((8, 12, 1), np.uint8)), r"a picture of \[8, 12, 3\], got \[8, 12, 1\]"),
        (encoded(np.zeros((8, 12, 4), np.uint8)), "alpha channel"),
    ],
)
def test_strings_that_are_no_picture(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        from_strings(spaces.Dict(eye=EYES["eye"]), {"eye": text})
    assert "\n" not in str(error.value)


def test_the_schema_of_an_image() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(json_type(EYES["eye"], "Value"))
    schema = adapter.json_schema()
    assert schema["type"] == "string" and schema["contentMediaType"] == "image/png"
    assert schema["contentEncoding"] == "base64" and "12 x 8 pixels, RGB" in schema["description"]
    with pytest.raises(ValidationError, match="valid string"):
        adapter.validate_python([[0]])


# -- on Ray Serve


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[tuple[str, Any]]:
    """(storage root, client) of a served world of images."""
    root = str(tmp_path_factory.mktemp("seeing"))
    tokenizers = dictionary(SHAPE), dictionary((4, 4, 1))
    world = untrained(EYES, family="sequence", terminal=0.1, tokenizers=tokenizers)
    Storage(root).make("worlds", "eyes", {}, world.save)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
        storage = StorageConfig(root)
        deploy(ServeConfig(world="eyes", name="eyes", cpus=0.5, http=0, storage=storage))
        yield root, Client(LISTENERS["eyes"].url)
    undeploy("eyes")


def test_an_episode_of_frames(seeing: tuple[str, Any]) -> None:
    """The frames of `WorldVectorEnv`, to the last bit."""
    root, client = seeing
    env = local("eyes", root, 2)
    seen, _ = env.reset(seed=3)
    reply = client.post("/v1/reset", {"seed": 3, "num_envs": 2}).json()
    session, steps = reply["session"], 0
    while True:
        for i, observation in enumerate(reply["observation"]):
            assert np.array_equal(frame_of(observation["eye"]), seen["eye"][i])
            grey = frame_of(observation["more"][0])[:, :, None] / np.float32(255)
            assert np.array_equal(grey.astype(np.float32), seen["more"][0][i])
            assert observation["pose"] == seen["pose"][i].tolist()
        if steps == 5:
            break
        seen, *_ = env.step(np.array([steps % 2, 1]))
        body = {"session": session, "action": [steps % 2, 1], "disagreement": False}
        reply = client.post("/v1/step", body).json()
        steps += 1
    assert client("DELETE", f"/v1/sessions/{session}").status_code == 204


def test_openapi_names_the_pictures(seeing: tuple[str, Any]) -> None:
    schemas = seeing[1]("GET", "/openapi.json").json()["components"]["schemas"]
    (eye,) = [s["properties"]["eye"] for s in schemas.values() if "eye" in s.get("properties", {})]
    assert eye["contentMediaType"] == "image/png"


def test_openenv_has_them_in_its_text(seeing: tuple[str, Any]) -> None:
    root, client = seeing
    seen, _ = local("eyes", root, 1).reset(seed=4)
    with Socket(client) as socket:
        observation = json.loads(socket.reset(seed=4)["observation"]["text"])
        assert np.array_equal(frame_of(observation["eye"]), seen["eye"][0])
        assert observation["pose"] == seen["pose"][0].tolist()
        assert socket.step("1")["observation"]["text"].startswith('{"eye":"')
