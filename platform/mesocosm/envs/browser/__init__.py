"""Pages in a browser: `reality.env=mesocosm.envs.browser:MiniWoB`.

It needs the extra `browser`, and Chromium with its driver (`make browser`).
"""

from mesocosm.envs.browser.miniwob import MiniWoB
from mesocosm.envs.browser.pages import PageEnv

__all__ = ["MiniWoB", "PageEnv"]
