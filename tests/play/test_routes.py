"""Every route of a played world's page."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image
from serve.conftest import ACTION, OBSERVATION

from mesocosm.envs.pixels import CoinGrid
from mesocosm.play.game import Game
from mesocosm.play.routes import page_files

from .conftest import client_of


def test_the_page_is_public_and_whole(play: Any) -> None:
    """Its files load nothing from elsewhere, and every file that one names exists."""
    client = client_of(play())
    del client.headers["Authorization"]
    for path in page_files():
        reply = client.get(path)
        assert reply.status_code == 200 and reply.headers["cache-control"] == "no-store"
        text = reply.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|eval\(|innerHTML", text), path
        assert len(text.splitlines()) <= 400
        for name in re.findall(r"""(?:href|src|from|import)[ =]"\.?/?([\w.]+\.(?:js|css))""", text):
            assert f"/{name}" in page_files(), (path, name)
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/play"), ("POST", "/v1/begin"), ("POST", "/v1/step"), ("POST", "/v1/undo")],
)
def test_without_the_token_nothing_is_shown_or_done(play: Any, method: str, path: str) -> None:
    game = play(terminal=0.0)
    client = client_of(game)
    for token in ("", "Bearer wrong-token"):
        client.headers["Authorization"] = token
        reply = client.request(method, path, json={"action": 0})
        assert reply.status_code == 401 and "token" in reply.json()["detail"]
    assert client.post("/", json={}).status_code == 401
    assert game.state().steps == 0


def test_an_episode(play: Any) -> None:
    client = client_of(play(terminal=0.0))
    about = client.get("/v1/play").json()["about"]
    assert about["world"] == "w" and about["members"] == 3 and about["reality"] is None
    assert about["splits"] == {"generated": 1 << 31} and about["action_space"]["n"] == 2
    begun = client.post("/v1/begin", json={"seed": 4}).json()
    assert begun["start"] == {"split": "generated", "index": 0, "seed": 4, "task": {}}
    (first,) = begun["moments"]
    assert first["step"] == 0 and first["reward"] is None and len(first["observation"]) == 3
    (moment,) = client.post("/v1/step", json={"action": 1}).json()["moments"]
    assert moment["step"] == 1 and moment["action"] == 1 and moment["disagreement"] > 0
    assert moment["total"] == moment["reward"]
    state = client.get("/v1/play").json()["state"]
    assert state["moments"] == [first, moment] and state["undoable"] and state["bill"] is None
    undone = client.post("/v1/undo", json={}).json()
    assert undone["steps"] == 0 and not undone["moments"] and not undone["undoable"]


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("/v1/step", {"action": 7}, 400, r"action=7: input should be less than or equal to 1"),
        ("/v1/step", {"action": True}, 400, r"action=True: "),
        ("/v1/step", {}, 400, r"action: field required"),
        ("/v1/step", {"action": 1, "extra": 2}, 400, r"extra=2: extra inputs are not permitted"),
        ("/v1/begin", {"split": "nowhere"}, 404, r"split must be one of generated, got 'nowhere'"),
        ("/v1/begin", {"split": "logged"}, 404, r"whose data the storage .* does not have"),
        ("/v1/begin", {"split": "reality"}, 404, r"split must be one of generated"),
        ("/v1/begin", {"seed": -1}, 400, r"seed=-1: input should be greater than or equal to 0"),
        ("/v1/undo", {}, 400, r"there is no step to undo"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_changes_nothing(
    play: Any, path: str, body: Any, status: int, detail: str
) -> None:
    game = play(terminal=0.0)
    before = client_of(game).get("/v1/play").json()
    reply = client_of(game).post(path, json=body)
    assert reply.status_code == status and re.search(detail, reply.json()["detail"])
    assert client_of(game).get("/v1/play").json() == before


def test_a_body_that_is_not_json(play: Any) -> None:
    reply = client_of(play()).post(
        "/v1/step", content=b"{a", headers={"Content-Type": "application/json"}
    )
    assert reply.status_code == 400 and "not JSON" in reply.json()["detail"]


def test_nested_spaces(play: Any) -> None:
    """A Dict is an object, a Tuple a list, in actions and observations."""
    client = client_of(play(OBSERVATION, ACTION, "sequence", task=("room",), terminal=0.0))
    action = {"push": [0.5, -0.7], "turn": 1, "hands": [1, 2], "say": "ab"}
    (moment,) = client.post("/v1/step", json={"action": action}).json()["moments"]
    assert moment["action"] == action and set(moment["observation"]) == {*OBSERVATION.spaces}
    assert len(moment["observation"]["pair"]) == 2
    for name, value in (("push", [0.5, 0.9]), ("say", "abc-"), ("turn", 2), ("hands", [1])):
        reply = client.post("/v1/step", json={"action": action | {name: value}})
        assert reply.status_code == 400 and f"action.{name}" in reply.json()["detail"]


def test_numbers_that_are_not_finite_are_null(play: Any) -> None:
    """JSON has no NaN, and a page could not read it."""
    game = play(spaces.Box(-1e30, 1e30, (2,), float), terminal=0.0)
    game._moments[0].observation[0] = float("nan")
    assert client_of(game).get("/v1/play").json()["state"]["moments"][0]["observation"][0] is None


def test_reality_beside_it(play: Any, real: Any) -> None:
    from .test_game import LINE

    client = client_of(play(*LINE, real=real("drawn:Drawn"), terminal=0.0))
    assert client.get("/v1/play").json()["about"]["reality"] == "drawn:Drawn"
    begun = client.post("/v1/begin", json={"split": "reality", "seed": 2}).json()
    assert begun["beside"] and begun["bill"]["resets"] == 1
    state = client.post("/v1/step", json={"action": [1.0]}).json()
    moment = state["moments"][0]
    assert moment["real"]["reward"] < 0 and moment["difference"]["numbers"] > 0
    assert moment["real"]["picture"].startswith("data:image/png;base64,")
    assert state["bill"] == {
        "ledger": "played",
        "steps": 1,
        "resets": 1,
        "price": 2.5,
        "currency": "USD",
        "remaining": 99,
        "remaining_money": None,
    }


def test_images_are_pictures(coin_grid: Game) -> None:
    client = client_of(coin_grid)
    client.post("/v1/begin", json={"split": "reality", "seed": 5})
    replies = client.post("/v1/step", json={"action": 2}).json(), client.get("/v1/play").json()
    last = coin_grid.state().moments[-1]
    assert last.real is not None
    for moment in (replies[0]["moments"][-1], replies[1]["state"]["moments"][-1]):
        for shown, frame in (
            (moment["observation"], last.observation),
            (moment["real"]["observation"], last.real.observation),
        ):
            with Image.open(io.BytesIO(base64.b64decode(shown))) as picture:
                assert picture.format == "PNG" and np.array_equal(picture, frame)


def test_a_real_image_of_another_size_is_refused_at_the_start(
    coin_grid: Game, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoinGrid, "_frame", lambda self: np.zeros((8, 8, 3), np.uint8))
    client = client_of(coin_grid)
    reply = client.post("/v1/begin", json={"split": "reality", "seed": 5})
    assert reply.status_code == 400 and "observation" in reply.json()["detail"]


def test_a_real_image_of_another_size_is_not_shown(seeing: Game) -> None:
    client = client_of(seeing)
    client.post("/v1/begin", json={"split": "reality"})
    for seen in (True, False, True):
        (moment,) = client.post("/v1/step", json={"action": 0}).json()["moments"]
        assert (moment["real"]["observation"] is not None) == seen == bool(moment["difference"])
