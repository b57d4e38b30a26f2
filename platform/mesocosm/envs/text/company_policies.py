"""An expert of the company's shell for each kind of task; it acts on texts alone.

As a behaviour: `{kind: scripted, function: mesocosm.envs.text.company_policies:CompanyExpert}`;
kind `noisy` replaces a share of the commands by random ones.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Generator

import numpy as np

from mesocosm.datasets.texts import text_problem
from mesocosm.envs.text import company_text as words
from mesocosm.envs.text.chores_policies import FAILING, drawn
from mesocosm.envs.text.company_shell import CompanyShell
from mesocosm.envs.text.company_tasks import parse_assignment
from mesocosm.envs.text.company_text import FOLDERS, ShellView, candidates, parse_view

Script = Generator[str, ShellView, None]
"""Yields commands and receives the fields of their texts."""


class CompanyExpert:
    """Solves every task, by one script for each kind.

    A command that was replaced by noise is given again. An `EpisodeAct`
    (`mesocosm.envs.episode`): one object acts in one episode at a time. A text with a task begins
    one, also without `start`.
    """

    def __init__(self) -> None:
        self._begin("")

    def _begin(self, first_text: str) -> None:
        self._first_text, self._command = first_text, ""
        self._script: Script | None = None

    def start(self, k: int, rng: np.random.Generator) -> None:
        """Begin an episode: the next observation is its first text."""
        self._begin("")

    def __call__(self, observation: str, rng: np.random.Generator) -> str:
        """The command after an observation."""
        self._observe(observation)
        view = parse_view(observation)
        if self._script is None:
            self._script = script(self._first_text)
            self._command = next(self._script, "submit done")
        elif view.command == self._command:
            try:
                self._command = self._script.send(view)
            except StopIteration:
                self._command = "submit done"
        return _possible_text(self._command)

    def random_action(self, observation: str, rng: np.random.Generator) -> str:
        """A random candidate, or with probability FAILING a command that fails."""
        self._observe(observation)
        if rng.random() < FAILING:
            view = parse_view(observation)
            place = posixpath.join(view.folder or "/", "missing.txt")
            table = drawn(view.tables or ("orders",), rng)
            failing = (f"cat {place}", f"rm {place}", f"sql SELECT * FROM old_{table}",
                       f"sql SELECT price FROM {table}", "help", f"cd {place}")  # fmt: skip
            return _possible_text(drawn(failing, rng))
        return _possible_text(drawn(candidates(self._first_text, observation), rng))

    def _observe(self, observation: str) -> None:
        if not self._first_text or parse_assignment(observation) is not None:
            self._begin(observation)


def _possible_text(command: str) -> str:
    """The command, or "help" where it is no text of the action space (after imagined texts)."""
    return command if text_problem(CompanyShell.action_space, command) is None else "help"


def script(first_text: str) -> Script:
    """The script that solves the task of a first text; an empty one where it has none."""
    assignment = parse_assignment(first_text)
    if assignment is None:
        return
    yield from SCRIPTS[assignment.kind](assignment.gaps)


def _find(gaps: dict[str, str]) -> Script:
    for path in (yield f"cd {FOLDERS['find']}").files:
        view = yield f'grep "{gaps["name"]}" {path}'
        if match := re.search(r"ext (\d+)", view.output):
            yield f"submit {match[1]}"
            return


def _aggregate(gaps: dict[str, str]) -> Script:
    for value in words.number((yield words.aggregate_query(gaps))):
        yield f"submit {value}"


def _fix(gaps: dict[str, str]) -> Script:
    key = gaps["key"]
    for path in (yield f"cd {FOLDERS['fix']}").files:
        view = yield f"cat {path}"
        if match := re.search(rf"^{key} = (\w+)$", view.output, re.MULTILINE):
            yield words.sed(key, match[1], gaps["value"], path)
            return


def _update(gaps: dict[str, str]) -> Script:
    name = gaps["name"]
    for path in reversed((yield f"cd {FOLDERS['update']}").files):
        view = yield f"cat {path}"
        if match := re.search(rf"^{re.escape(name)} moved from \w+ to (\w+)\.", view.output, re.M):
            yield words.relocate(name, match[1])
            return


def _migrate(gaps: dict[str, str]) -> Script:
    rows = words.csv_rows((yield f"cat {gaps['path']}").output)
    if rows:
        yield words.insert(gaps["table"], rows)
        yield f"rm {gaps['path']}"


def _clean(gaps: dict[str, str]) -> Script:
    for path in (yield f"cd {FOLDERS['clean']}").files:
        view = yield f"grep {gaps['word']} {path}"
        if not view.output:
            yield f"rm {path}"


def _report(gaps: dict[str, str]) -> Script:
    for value in words.number((yield words.count_query(gaps["status"]))):
        yield f"echo {value} > {gaps['path']}"


SCRIPTS: dict[str, Callable[[dict[str, str]], Script]] = {
    "find": _find,
    "aggregate": _aggregate,
    "fix": _fix,
    "update": _update,
    "migrate": _migrate,
    "clean": _clean,
    "report": _report,
}
