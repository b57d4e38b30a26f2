"""Chromium without a window, driven by chromedriver through selenium.

A supervisor (supervisor.py) owns both programs: none of their processes outlives this one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

from gymnasium.error import DependencyNotInstalled

from mesocosm.envs.memory import SUPERVISOR
from mesocosm.errors import UsageError
from mesocosm.user_code import one_line

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""Names of the browser on the PATH, the preferred one first."""
INSTALL = "run `make browser`, or apt-get install chromium chromium-driver"
START_S = 120.0
"""Time for the browser and its driver to start."""
ANSWER_S = 20.0
"""Time for a page to answer a command. A page that needs longer hangs."""
END_S = 30.0
"""Time for the supervisor to kill all processes."""
WINDOW = (500, 400)
"""Width and height of the window, in pixels."""
ARGUMENTS = (
    "--headless",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--force-device-scale-factor=1",
)
OPTION = """
const [list, text] = arguments;
return [...list.options].find((option) => option.text.trim() === text) || null;
"""

Result = TypeVar("Result")


class BrowserError(RuntimeError):
    """A page hangs or opens a dialog, or the browser has crashed."""


class Programs(NamedTuple):
    """Chromium and its driver."""

    browser: str
    driver: str
    version: int
    """The major version of both."""


@cache
def programs() -> Programs:
    """Chromium and its driver on this machine.

    Raises:
        DependencyNotInstalled: selenium, Chromium or its driver is missing.
        UsageError: The driver is of another version.
    """
    if importlib.util.find_spec("selenium") is None:
        raise DependencyNotInstalled("selenium is missing; pip install 'mesocosm[browser]'")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise DependencyNotInstalled(f"there is no {' or '.join(BROWSERS)} on PATH; {INSTALL}")
    driver = shutil.which("chromedriver")
    if driver is None:
        raise DependencyNotInstalled(f"there is no chromedriver on PATH; {INSTALL}")
    versions = [major_version(path) for path in (browser, driver)]
    if versions[0] != versions[1]:
        raise UsageError(
            f"chromedriver must have the version of the browser, got {driver} {versions[1]} and"
            f" {browser} {versions[0]}; {INSTALL}"
        )
    return Programs(browser, driver, versions[0])


def major_version(path: str) -> int:
    """The major version that a program prints. Raises UsageError where it prints none."""
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    number = re.search(r"(\d+)\.\d+", result.stdout)
    if number is None:
        shown = one_line(RuntimeError(result.stdout + result.stderr)) or "nothing"
        raise UsageError(f"`{path} --version` must print a version, got {shown}; {INSTALL}")
    return int(number[1])


class Chromium:
    """One browser with one page.

    Raises:
        BrowserError: The browser does not start.
    """

    def __init__(self) -> None:
        browser, driver, _ = programs()
        command = [sys.executable, "-I", "-S", SUPERVISOR, str(os.getpid()), driver, "--port=0"]
        self._supervisor = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._driver: Any = None
        try:
            self._supervisor.wait(START_S)  # the supervisor runs on in a process of its own
            self._driver = _session(browser, self._port())
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise BrowserError(f"{browser} did not start: {_reason(error)}") from error

    def _port(self) -> int:
        """The port that chromedriver prints when it listens."""
        text, until = "", time.monotonic() + START_S
        while (port := re.search(r"successfully on port (\d+)", text)) is None:
            part = self._output(until)
            if not part:
                raise BrowserError(f"chromedriver did not listen: {text.strip() or 'no output'}")
            text += part.decode(errors="replace")
        return int(port[1])

    def _output(self, until: float) -> bytes:
        """More output of the processes; empty when all are dead or the time is over."""
        output = self._supervisor.stdout
        assert output is not None
        if not select.select([output], [], [], max(0.0, until - time.monotonic()))[0]:
            return b""
        return os.read(output.fileno(), 4096)

    @property
    def closed(self) -> bool:
        """True after `close`, or a command that failed."""
        return self._driver is None

    def open(self, address: str) -> None:
        """Open a page and wait until it has loaded."""
        self._call(lambda: self._driver.get(address))

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a JavaScript function.

        Args:
            script: The body, which returns JSON or a node of the page.
            arguments: Its `arguments`.
        """
        return self._call(lambda: self._driver.execute_script(script, *arguments))

    def click(self, node: Any) -> bool:
        """Click on a node with the mouse, after scrolling it into view.

        Returns:
            False where something covers the node, or it has just disappeared.
        """
        from selenium.common import exceptions

        missed = (
            exceptions.ElementClickInterceptedException,
            exceptions.ElementNotInteractableException,
            exceptions.StaleElementReferenceException,
        )

        def click() -> bool:
            try:
                node.click()
            except missed:
                return False
            return True

        return self._call(click)

    def type(self, node: Any, text: str) -> bool:
        """Click on a field and replace its content by a text, typed on the keyboard. In a list of
        options, click on the option with this text.

        Returns:
            False where the click missed, or there is no such option.
        """
        if self.run("return arguments[0].tagName === 'SELECT'", node):
            option = self.run(OPTION, node, text)
            return option is not None and self.click(option)
        if not self.click(node):
            return False
        self.run("arguments[0].select()", node)
        self._call(lambda: node.send_keys(text))
        return True

    def _call(self, command: Callable[[], Result]) -> Result:
        """The result of a command. Where it fails, the browser is closed."""
        if self._driver is None:
            raise BrowserError("the browser is closed")
        hung = threading.Event()

        def end() -> None:
            hung.set()
            self._end()

        watchdog = threading.Timer(ANSWER_S, end)
        watchdog.start()
        try:
            return command()
        except Exception as error:
            reason = (
                f"the page did not answer in {ANSWER_S:g} s" if hung.is_set() else _reason(error)
            )
            self.close()
            raise BrowserError(reason) from error
        finally:
            watchdog.cancel()

    def _end(self) -> None:
        """Let the supervisor kill the browser, which ends a command that is waiting."""
        pipe = self._supervisor.stdin
        assert pipe is not None
        with suppress(OSError, ValueError):  # the supervisor has ended, or is ending
            pipe.write(b"end")  # a forked process may hold the pipe open
            pipe.close()

    def close(self) -> None:
        """Kill the browser, and wait until all its processes are dead."""
        self._driver = None
        output = self._supervisor.stdout
        assert output is not None
        if output.closed:
            return
        self._end()
        until = time.monotonic() + END_S
        while self._output(until):
            pass
        output.close()


def _session(browser: str, port: int) -> Any:
    """A browser started by the driver at a port, as selenium's WebDriver."""
    from selenium import webdriver
    from selenium.webdriver.common.proxy import Proxy
    from selenium.webdriver.remote.client_config import ClientConfig

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    arguments = [*ARGUMENTS, f"--window-size={WINDOW[0]},{WINDOW[1]}"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses to run as root with its sandbox
    for argument in arguments:
        options.add_argument(argument)
    address = f"http://127.0.0.1:{port}"
    config = ClientConfig(address, timeout=int(START_S), proxy=Proxy({"proxyType": "DIRECT"}))
    return webdriver.Remote(address, options=options, client_config=config)


def _reason(error: BaseException) -> str:
    """A failed command in one line, without the driver's stack."""
    from selenium.common import exceptions

    text = " ".join((getattr(error, "msg", None) or str(error)).split())
    if isinstance(error, exceptions.UnexpectedAlertPresentException):
        return f"the page opened a dialog: {error.alert_text!r}"
    return f"{type(error).__name__}: {text[:300]}"
