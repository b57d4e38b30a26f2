"""`Company-v0`: tasks on the files and tables of a fictional company, in a shell and SQL.

env = gymnasium.make("mesocosm.envs.text:Company-v0")
text, info = env.reset(seed=0)
text, reward, terminated, truncated, info = env.step("find /staff")
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from mesocosm.envs.text.company import draw_company
from mesocosm.envs.text.company_tasks import KINDS, Task, answer_fact, draw_task
from mesocosm.envs.text.company_text import (
    LONGEST_COMMAND,
    LONGEST_TEXT,
    candidates,
    first_text,
    footer,
    later_text,
)
from mesocosm.envs.text.database import Database, SqlError
from mesocosm.envs.text.shell import Shell, ShellError, split

CHARACTERS = "".join(map(chr, range(ord(" "), ord("~") + 1)))
PRICES = {"look": 0.01, "read": 0.02, "query": 0.03, "write": 0.05, "submit": 0.0, "error": 0.01}
"""The price of a command by its kind; `error` is for one that fails."""


class CompanyShell(gymnasium.Env[str, str]):
    """Solve a task with shell commands and SQL statements, then `submit`.

    The commands are real, on a file tree and a SQLite database in memory; nothing outside can be
    reached. Changes are final. The reward of a command is minus its price (`PRICES`); `submit` adds
    the score of the final state, which is 0 if anything changed that the task does not name.

    `info` has `admissible_commands`, a list of texts, and after a step `valid` (the command did not
    fail), `kind`, `price` and `success` (the score is 1).

    Args:
        kinds: The kinds of task to draw from. Defaults to all (`company_tasks.KINDS`).
    """

    metadata = {"render_modes": []}
    observation_space = Text(LONGEST_TEXT, charset=CHARACTERS + "\n")
    action_space = Text(LONGEST_COMMAND, charset=CHARACTERS)
    candidates = staticmethod(candidates)

    def __init__(self, kinds: Sequence[str] = KINDS):
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise ValueError(f"kinds must be some of {list(KINDS)}, got {list(kinds)}")
        self._kinds = tuple(kinds)
        self._task: Task | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        rng = random.Random(int(self.np_random.integers(2**62)))
        self.close()
        self._task = draw_task(draw_company(rng), rng, rng.choice(self._kinds))
        company = self._task.company
        self._shell, self._database = Shell(company.files), Database(company.tables)
        self._cents = 0
        self._first_text = first_text(company.name, self._task.assignment, self._footer())
        return self._first_text, self._info(self._first_text)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self._task is not None, "call reset before step"
        name, _, rest = action.strip().partition(" ")
        terminated, score = name == "submit", 0.0
        try:
            output, kind = self._run(name, rest.strip(), action)
            valid = True
        except (ShellError, SqlError) as error:
            output, kind, valid = f"error: {error}", "error", False
        if terminated:
            facts = self._shell.facts() + self._database.facts()
            answer = rest.strip() if self._task.answer else ""
            score = self._task.score(facts + answer_fact(answer))
        self._cents += round(100 * PRICES[kind])
        text = later_text(action, output, self._footer())
        more = {"valid": valid, "kind": kind, "price": PRICES[kind], "success": score == 1.0}
        return text, round(score - PRICES[kind], 4), terminated, False, {**self._info(text), **more}

    def _run(self, name: str, rest: str, action: str) -> tuple[str, str]:
        """The (output, kind) of a command."""
        if name == "submit":
            return "submitted", "submit"
        if name == "sql":
            quoted = len(rest) > 1 and rest[0] == rest[-1] == '"'
            result = self._database.run(rest[1:-1] if quoted else rest)
            return result.text, "write" if result.writes else "query"
        output = self._shell.run(action)
        return output, self._shell.commands[split(action)[0]].kind

    def _footer(self) -> str:
        return footer(self._shell, self._database, self._cents / 100)

    def _info(self, text: str) -> dict[str, Any]:
        return {"admissible_commands": candidates(self._first_text, text)}

    def close(self) -> None:
        """Free the database."""
        if self._task is not None:
            self._database.close()
            self._task = None
