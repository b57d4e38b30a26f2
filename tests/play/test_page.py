"""The page of a played world in a real browser: keys, the form, what is shown, and errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import browsers
import numpy as np
import pytest
from factories import wait_until
from gymnasium import spaces

from mesocosm.envs.browser.chromium import Chromium
from mesocosm.play.game import Game
from mesocosm.play.main_thread import MainThread
from mesocosm.play.routes import application
from mesocosm.serve.http_server import LoopbackServer

from .test_game import LINE

Open = Callable[[Game], "Page"]


class Page:
    """A page in the browser, and the keys of a person."""

    def __init__(self, browser: Chromium, address: str):
        self.browser = browser
        browser.open(address)
        self.idle()

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        wait_until(lambda: self.browser.run(f"return Boolean({condition})"), 60)

    def idle(self) -> None:
        """Wait until the page waits for a person."""
        self.wait("document.querySelector('main').getAttribute('aria-busy') === 'false'")

    def text(self, id: str) -> str:
        return str(self.browser.run("return document.getElementById(arguments[0]).textContent", id))

    def shows(self, id: str, text: str) -> None:
        """Wait until an element has this text."""
        try:
            wait_until(lambda: self.text(id) == text, 60)
        except AssertionError:
            pytest.fail(f"{id} is {self.text(id)!r}, not {text!r}; problem: {self.text('problem')}")

    def press(self, keys: str, id: str | None = None) -> None:
        """Press keys, on the page or in an element."""
        target = "document.body" if id is None else f"document.getElementById('{id}')"
        node = self.browser.run(f"return {target}")
        node.send_keys(keys)
        self.idle()

    def paths(self) -> list[str]:
        """The lines of the plots."""
        nodes = "[...document.querySelectorAll('#plots path.world')]"
        return list(self.browser.run(f"return {nodes}.map((path) => path.getAttribute('d'))"))


@pytest.fixture
def page(mark: str) -> Iterator[Open]:
    """Opens the page of a game in the browser."""
    servers, browser = list[LoopbackServer](), Chromium()
    main, over = MainThread(), threading.Event()
    worker = threading.Thread(target=main.run, args=(lambda: not over.is_set(),), daemon=True)
    worker.start()

    def start(game: Game) -> Page:
        server = LoopbackServer(0, "port")
        servers.append(server)
        server.start(application(game, main.call, "a-token"))
        return Page(browser, f"{server.url}/#a-token")

    yield start
    with suppress(Exception):
        browser.close()
    over.set()
    worker.join(30)
    for server in servers:
        server.close()
    assert not browsers.processes(mark)


@browsers.needs("selenium")
def test_keys_step_a_world(page: Open, play: Any, real: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    game = play(*LINE, real=real("drawn:Drawn"), terminal=0.0)
    shown = page(game)
    assert shown.text("step") == "0" and "3 members" in shown.text("subtitle")
    before = shown.paths()
    assert len(before) == 3, "reward, return and disagreement"
    for step, key in enumerate((Keys.ARROW_RIGHT, Keys.ARROW_LEFT, "0"), 1):
        shown.press(key)
        shown.shows("step", str(step))
    actions = [moment.action for moment in game.state().moments]
    assert actions == [None, [1], [-1], [0]]
    after = shown.paths()
    assert all(old != new and new.count("L") >= 2 for old, new in zip(before, after, strict=True))
    last = game.state().moments[-1]
    assert float(shown.text("reward")) == pytest.approx(last.reward, rel=1e-3)
    assert float(shown.text("return")) == pytest.approx(last.total, rel=1e-3)
    assert float(shown.text("disagreement")) == pytest.approx(last.disagreement, rel=1e-3)
    shown.press("u")
    shown.shows("step", "2")
    shown.press("r")
    shown.shows("step", "0")
    shown.press("n")
    wait_until(lambda: game.state().start.seed == 1)
    shown.press(" ")
    shown.shows("step", "1")
    assert "imagined this start" in shown.text("note") and "Bill: 0 real steps" in shown.text(
        "bill"
    )

    shown.browser.run("document.getElementById('split').value = 'reality'")
    shown.browser.click(shown.browser.run("return document.querySelector('#begin .first')"))
    shown.shows("step", "0")
    for step in (1, 2):
        shown.press(Keys.ARROW_RIGHT)
        shown.shows("step", str(step))
    assert "Bill: 2 real steps, 1 resets, 3 USD, 98 steps left" in shown.text("bill")
    assert shown.browser.run("return document.getElementById('picture').naturalWidth") == 60
    table = shown.text("values")
    assert "reality" in table and "difference" in table and "observation[1]" in table
    drawn = "return document.querySelectorAll('#plots path.real')[0].getAttribute('d')"
    assert shown.browser.run(drawn).count("L") == 1
    for _ in range(4):
        shown.press(Keys.ARROW_RIGHT)
        shown.idle()
    shown.wait("document.getElementById('note').textContent.includes('episode terminated')")


@browsers.needs("selenium")
def test_the_form_and_errors(page: Open, play: Any) -> None:
    action = spaces.Dict(
        {
            "push": spaces.Box(-1, 1, (2,)),
            "free": spaces.Box(-10, float("inf"), (), float),
            "turn": spaces.Discrete(3, start=-1),
            "hands": spaces.MultiDiscrete([2, 3]),
            "on": spaces.MultiBinary(2),
            "say": spaces.Text(5, min_length=1, charset="abc"),
        }
    )
    game = play(spaces.Dict({"x": LINE[0], "say": spaces.Text(4, charset="xyz")}), action)
    shown = page(game)
    form = "document.querySelector('#act')"
    assert shown.browser.run(f"return {form}.querySelectorAll('input[type=range]').length") == 2
    assert shown.browser.run(f"return {form}.querySelectorAll('select').length") == 3
    field = shown.browser.run(f"return {form}.querySelector('input[maxlength]')")
    shown.browser.type(field, "xx")
    shown.browser.click(shown.browser.run("return document.getElementById('go')"))
    shown.wait("!document.getElementById('problem').hidden")
    assert "action.say='xx'" in shown.text("problem") and shown.text("step") == "0"
    shown.browser.type(field, "cab")
    shown.browser.click(shown.browser.run("return document.getElementById('go')"))
    shown.shows("step", "1")
    assert not shown.browser.run("return document.getElementById('problem').offsetHeight")
    action = game.state().moments[-1].action
    assert action["say"] == "cab" and action["push"] == [0, 0] and action["turn"] == -1
    assert shown.browser.run("return document.querySelectorAll('#texts pre').length") == 1


@browsers.needs("selenium")
def test_masked_actions_cannot_be_chosen(page: Open, play: Any) -> None:
    from mesocosm.envs.config import RealityConfig
    from mesocosm.envs.make import facts_of

    game = play(*facts_of(RealityConfig(env="mesocosm.envs.items:Items")).spaces, terminal=0.0)
    shown = page(game)
    mask = game.state().moments[-1].observation["action_mask"]
    options = "return document.querySelectorAll('#fields option').length"
    assert shown.browser.run(options) == int(mask.sum())
    shown.press(" ")
    shown.shows("step", "1")


@browsers.needs("selenium")
def test_frames_of_the_world_and_of_reality_are_shown(page: Open, coin_grid: Game) -> None:
    coin_grid.begin("reality", 0, 5)
    shown = page(coin_grid)
    shown.press("2")
    shown.shows("step", "1")
    sizes = "[...document.querySelectorAll('#frames img')].map((x) => [x.naturalWidth, x.width])"
    assert shown.browser.run(f"return {sizes}") == [[40, 240], [40, 240]], "6 pixels for each"
    pixels = "document.querySelector('#frames canvas').getContext('2d').getImageData(0, 0, 40, 40)"
    shown.wait(f"document.querySelector('#frames canvas').width === 40 && {pixels}.data[3]")
    last = coin_grid.state().moments[-1]
    gap = np.abs(last.observation.astype(int) - last.real.observation)
    assert sum(shown.browser.run(f"return [...{pixels}.data]")) == gap.sum() + 40 * 40 * 255
    titles = "[...document.querySelectorAll('#plots figcaption')].map((node) => node.textContent)"
    assert "frames: world − reality" in " ".join(shown.browser.run(f"return {titles}"))
    assert shown.text("values") == "" and not shown.text("texts")


@browsers.needs("selenium")
def test_a_real_observation_outside_its_space_is_left_out(page: Open, seeing: Game) -> None:
    seeing.begin("reality", 0, 5)
    shown = page(seeing)
    for step, pictures in enumerate((2, 1, 2), 1):
        shown.press("0")
        shown.shows("step", str(step))
        assert not shown.text("problem")
        count = "return document.querySelectorAll('#frames img').length"
        assert shown.browser.run(count) == pictures
        assert "pose[0]" in shown.text("values")


@browsers.needs("selenium")
def test_without_its_token_the_page_says_so(page: Open, play: Any) -> None:
    shown = page(play())
    address = shown.browser.run("return location.href").partition("#")[0]
    shown.browser.open("about:blank")
    shown.browser.open(address)
    shown.wait("!document.getElementById('problem').hidden")
    assert "this address lacks its token" in shown.text("problem")
