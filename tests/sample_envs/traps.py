"""Pages that hang, open dialogs or crash their browser, for tests of `mesocosm.envs.browser`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesocosm.envs.browser import PageEnv

PAGE = """
<body><input type="text" placeholder="name"><button onclick="press()">Go</button>
<script>
let result = null;
function press() {{ {body} }}
</script></body>
"""
BODIES = {
    "good": "result = document.querySelector('input').value === 'ada' ? 1 : -1;",
    "dialog": "alert('Are you sure?');",
    "hang": "while (true) {}",
}


class Traps(PageEnv):
    """A page with one field and one button, which does what the page's name says."""

    def __init__(self, folder: str, pages: Any = tuple(BODIES)):
        super().__init__(pages, names=["name"])
        self._folder = Path(folder)
        for page, body in BODIES.items():
            path = self._folder / f"{page}.html"
            path.write_text(PAGE.format(body=body))

    def begin(self, browser: Any, page: str, seed: int) -> tuple[str, list[tuple[str, str]]]:
        browser.open((self._folder / f"{page}.html").as_uri())
        return "Enter ada as the name and go.", [("name", "ada")]

    def outcome(self, browser: Any) -> float | None:
        return browser.run("return result")


def press(observation: Any, rng: Any) -> list[int]:
    """Type the name, then press the button."""
    place = int(observation["goal"].argmax())
    return [0, 1] if observation["elements"]["holds"][0, place] else [1 + place, 0]
