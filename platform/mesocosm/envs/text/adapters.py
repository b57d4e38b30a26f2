"""TextWorld and ScienceWorld as text environments. They need the extra `text`, and are slow.

TextWorld compiles a game in half a minute before its first episode, and keeps it in a folder.
ScienceWorld runs a Java program and needs `java`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.error import DependencyNotInstalled
from gymnasium.spaces import Text

from mesocosm.envs.text.company_shell import CHARACTERS
from mesocosm.envs.text.company_text import printable

LONGEST = 4_000
"""The most characters of a text; longer ones are cut."""
INSTALL = "pip install 'mesocosm[text]'"


class _TextGame(gymnasium.Env[str, str]):
    """Spaces and texts of both adapters."""

    metadata = {"render_modes": []}
    observation_space = Text(LONGEST, min_length=0, charset=CHARACTERS + "\n")
    action_space = Text(200, charset=CHARACTERS)

    def _text(self, *parts: str) -> str:
        """The parts in printable ASCII, without empty lines and prompts."""
        lines = [line.split() for part in parts for line in part.splitlines()]
        texts = [printable(" ".join(words)) for words in lines if words and words[0] != ">"]
        return "\n".join(texts)[:LONGEST]


class TextWorldGames(_TextGame):
    """Games that TextWorld generates (https://github.com/microsoft/TextWorld).

    The return is 1 if the quest is done. `info` has `admissible_commands` and `success`.

    Args:
        games: The number of different games; the seed of a reset chooses one.
        rooms: Rooms of each game.
        objects: Objects of each game.
        quest: Commands of the shortest solution.
        folder: Keeps the compiled games. Defaults to one below the system's temporary folder.
    """

    def __init__(
        self,
        games: int = 10,
        rooms: int = 3,
        objects: int = 5,
        quest: int = 4,
        folder: str | None = None,
    ):
        try:
            import textworld
        except ImportError as error:
            raise DependencyNotInstalled(f"TextWorld is missing; {INSTALL}") from error
        self._textworld: Any = textworld
        self._games, self._sizes = games, (rooms, objects, quest)
        default = Path(tempfile.gettempdir()) / "mesocosm-textworld"
        self._folder = Path(folder) if folder else default
        self._game: Any = None

    def _path(self, game: int) -> Path:
        """The compiled game of a number; compiles it where it is missing."""
        options = self._textworld.GameOptions()
        options.nb_rooms, options.nb_objects, options.quest_length = self._sizes
        options.seeds = game
        name = "-".join(map(str, (*self._sizes, game)))
        path = self._folder / f"{name}.z8"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                options.path = f"{folder}/{path.name}"
                self._textworld.make(options)
                for suffix in (".json", ".z8"):  # the game comes last: another process may wait
                    Path(folder, name).with_suffix(suffix).replace(path.with_suffix(suffix))
        return path

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.close()
        fields = ("admissible_commands", "objective", "description", "max_score", "won", "lost")
        infos = self._textworld.EnvInfos(**dict.fromkeys(fields, True))
        path = self._path(int(self.np_random.integers(self._games)))
        self._game = self._textworld.start(str(path), infos)
        state, self._score = self._game.reset(), 0
        return self._text(state.objective, state.description), self._info(state)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        state, score, _ = self._game.step(action)
        reward = (score - self._score) / state.max_score
        self._score = score
        info = {**self._info(state), "success": bool(state.won)}
        return self._text(state.feedback), reward, bool(state.won or state.lost), False, info

    def _info(self, state: Any) -> dict[str, Any]:
        return {"admissible_commands": list(state.admissible_commands)}

    def close(self) -> None:
        """End the game."""
        if self._game is not None:
            self._game.close()
            self._game = None


class ScienceWorldTask(_TextGame):
    """One of ScienceWorld's 30 tasks (https://github.com/allenai/ScienceWorld).

    The return is the score, 1 at the end of the task; a wrong choice may end it with -1 in all.
    Each episode has a Java program of its own, because the texts of one program depend on its
    earlier episodes. `info` has `admissible_commands`, of which the simulator refuses some, and
    `success`.

    Args:
        task: The task's name, such as "find-plant". A reset draws one of its training variations.
        simplifications: Simplifications with commas between them, or "easy".
    """

    def __init__(self, task: str = "find-plant", simplifications: str = "easy"):
        try:
            from scienceworld import ScienceWorldEnv
        except ImportError as error:
            raise DependencyNotInstalled(f"ScienceWorld is missing; {INSTALL}") from error
        if shutil.which("java") is None:
            raise DependencyNotInstalled("ScienceWorld needs Java; install a Java runtime")
        self._launch, self._task, self._easier = ScienceWorldEnv, task, simplifications
        self._world: Any = None
        self._start()

    def _start(self) -> None:
        """Start a Java program."""
        self._world, self._used = self._launch(envStepLimit=10**9), False
        self._world.load(self._task, 0, self._easier)
        self._variations = list(self._world.get_variations_train())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if self._used:
            self._world.close()
            self._start()
        self._used, self._score = True, 0.0
        variation = self._variations[int(self.np_random.integers(len(self._variations)))]
        self._world.load(self._task, variation, self._easier)
        self._world.server.reset()
        text = self._text(self._world.taskdescription(), self._world.server.step("look around"))
        return text, self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text = self._text(self._world.server.step(action))
        score = round(float(self._world.server.getScore()), 2)
        reward, self._score = round(score - self._score, 2), score
        terminated = bool(self._world.server.getCompleted()) or score < 0
        return text, reward, terminated, False, {**self._info(), "success": score >= 1}

    def _info(self) -> dict[str, Any]:
        # One text with all of them: a list would cross to Java once for each command.
        combinations = self._world.get_valid_action_object_combinations_with_templates()
        return {"admissible_commands": sorted({str(c["action"]) for c in combinations})}

    def close(self) -> None:
        """End the Java program."""
        self._world.close()
