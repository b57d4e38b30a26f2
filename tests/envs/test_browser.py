"""MiniWoB++'s pages in a real browser, and what is refused before it starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsers
import numpy as np
import pytest
from gymnasium.spaces import MultiDiscrete

from mesocosm.datasets import masks
from mesocosm.envs.browser import chromium
from mesocosm.envs.browser.experts import page_expert
from mesocosm.envs.browser.miniwob import PAGES
from mesocosm.envs.browser.table import TAGS, Element, mask, observe, table_space
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of, make_env
from mesocosm.errors import UsageError

MINIWOB = "mesocosm.envs.browser:MiniWoB"


def random_action(observation: Any, rng: np.random.Generator) -> Any:
    """An action that the mask allows."""
    return masks.draw(MultiDiscrete([8, 24]), masks.mask_of(observation), rng)


def play(env: Any, policy: Any, page: str, seed: int) -> list[Any]:
    """The observations, rewards and ends of an episode."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed, options={"page": page})
    result = [(observation, info["goal"])]
    for _ in range(15):
        assert observation in env.observation_space
        action = policy(observation, rng)
        assert observation["action_mask"][action[0] * 24 + action[1]]
        observation, *rest = env.step(action)
        result.append((observation, *rest))
        if rest[1]:
            break
    return result


@browsers.needed
def test_one_page(mark: str) -> None:
    """The expert solves it, episodes repeat in a new browser, and no browser stays."""
    first, again = list[Any](), list[Any]()
    for episodes in (first, again):
        env = make_env(RealityConfig(env=MINIWOB))
        for seed in (3, 4):
            episodes.append(play(env, page_expert, "login-user", seed))
            episodes.append(play(env, random_action, "login-user", seed))
        folders = {path for path in browsers.processes(mark) if "mesocosm-browser" in path.name}
        assert len(folders) == 1
        env.close()
        assert not browsers.processes(mark) and not any(map(Path.exists, folders))
    for solved in first[::2]:
        end = (pytest.approx(0.98), True, False, {"duration": 1.0, "success": True})
        assert len(solved) == 4 and solved[-1][1:] == end
    assert first[0][0][1] != first[2][0][1]
    np.testing.assert_equal(first, again)


@browsers.needed
@pytest.mark.slow
def test_the_expert_solves_every_page() -> None:
    env = make_env(RealityConfig(env=MINIWOB))
    for page in PAGES:
        for seed in range(5):
            assert play(env, page_expert, page, seed)[-1][-1]["success"], (page, seed)
    env.close()


def program(folder: Path, name: str, version: str) -> None:
    """A program that prints a version."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A PATH of one empty folder."""
    pytest.importorskip("miniwob")
    pytest.importorskip("selenium")
    chromium.programs.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    yield tmp_path
    chromium.programs.cache_clear()


def test_missing_programs_are_named(path: Path) -> None:
    config = RealityConfig(env=MINIWOB)
    with pytest.raises(UsageError, match=r"no chromium or .* on PATH; run `make browser`"):
        facts_of(config)
    program(path, "chromium", "Chromium 156.0.1.2")
    with pytest.raises(UsageError, match="no chromedriver on PATH"):
        facts_of(config)
    program(path, "chromedriver", "ChromeDriver 155.0.1.2 (abc)")
    with pytest.raises(UsageError, match=r"chromedriver must have .*155 and .*156; run"):
        facts_of(config)
    program(path, "chromedriver", "ChromeDriver 156.0.1.2 (abc)")
    facts = facts_of(config)
    assert "browser 156" in facts.version and "miniwob 1.1.0" in facts.version


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "miniwob", None)
    with pytest.raises(UsageError, match=r"miniwob is missing; run `make browser`"):
        facts_of(RealityConfig(env=MINIWOB))


def test_pages_that_do_not_exist_are_refused() -> None:
    pytest.importorskip("miniwob")
    for pages, problem in ((["login"], "got 'login'"), ([], r"got \[\]")):
        with pytest.raises(UsageError, match=rf"reality.kwargs.pages must name .*{problem}"):
            make_env(RealityConfig(env=MINIWOB, kwargs={"pages": pages}))


def test_a_table_relates_elements_to_the_goal() -> None:
    def element(tag: str, name: str = "", hints: str = "", value: str = "") -> Element:
        return Element(tag, name, hints, value, False, False, False, [16.0, 32.0, 80.0, 8.0])

    elements = [
        element("text", value="ada"),
        element("span", "Sed."),
        element("span", "sed"),
        element("div", "Reply"),
        element("canvas", hints="email-trash"),
        element("submit", "Go"),
    ]
    fields = [("name", "ada"), ("target", "sed"), ("task", "reply"), ("by", "delete")]
    fields += [("", "")] * 3
    table = observe(elements, fields, "Reply to ada, go.")
    assert table in table_space()
    assert table["present"].tolist() == [1] * 6 + [0] * 18
    assert TAGS[table["tag"][4]] == "other" and TAGS[table["tag"][5]] == "button"
    assert np.argwhere(table["holds"]).tolist() == [[0, 0]]
    says = [[2, 1], [3, 2], [3, 7], [4, 3], [5, 7]]
    assert np.argwhere(table["says"]).tolist() == says
    np.testing.assert_allclose(table["box"][0], [0.1, 0.2, 0.5, 0.05], rtol=1e-6)
    allowed = mask(table, fields).reshape(8, 24)
    assert allowed[0].sum() == 6 and allowed[1:].sum(1).tolist() == [1, 1, 1, 1, 0, 0, 0]
    many = observe(elements * 5, fields, "")
    assert many["present"].all()
