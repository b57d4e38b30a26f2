"""Shell commands over a file tree in memory. Nothing here reads or writes a real file."""

from __future__ import annotations

import posixpath
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_FILES, MAX_FILE, MAX_PATH = 64, 4_000, 100
"""The most files and folders, the most characters of a file and of a path."""
LINES_OF_HEAD = 5
UNSUPPORTED = frozenset("();<|&")
"""Words of these characters alone are refused."""


class ShellError(Exception):
    """A command failed; nothing changed."""


@dataclass(frozen=True)
class Option:
    """One command of the shell."""

    run: Callable[..., str]
    kind: str
    """look, read or write: what its price depends on."""
    least: int
    """The fewest arguments."""
    most: int
    """The most arguments."""


class Shell:
    """A file tree, the current folder and the commands on them.

    Args:
        files: The contents of each file, by its absolute path. Its folders are made.
    """

    def __init__(self, files: Mapping[str, str]):
        self.files = dict(files)
        self.folders = {"/"}
        self.folder = "/"
        for path in files:
            while (path := posixpath.dirname(path)) != "/":
                self.folders.add(path)
        self.commands = {
            "ls": Option(self._ls, "look", 0, 1),
            "cd": Option(self._cd, "look", 1, 1),
            "find": Option(self._find, "look", 1, 1),
            "cat": Option(self._cat, "read", 1, 1),
            "head": Option(self._head, "read", 1, 1),
            "wc": Option(self._wc, "read", 1, 1),
            "grep": Option(self._grep, "read", 2, 2),
            "echo": Option(self._echo, "write", 3, 3),
            "cp": Option(self._cp, "write", 2, 2),
            "mv": Option(self._mv, "write", 2, 2),
            "rm": Option(self._rm, "write", 1, 8),
            "mkdir": Option(self._mkdir, "write", 1, 1),
            "sed": Option(self._sed, "write", 3, 3),
        }

    def run(self, command: str) -> str:
        """The output of one command.

        Raises:
            ShellError: It is unknown, refused or impossible. Nothing changed.
        """
        words = split(command)
        option = self.commands.get(words[0]) if words else None
        if option is None:
            name = words[0] if words else ""
            raise ShellError(f"{name}: command not found")
        if not option.least <= len(words) - 1 <= option.most:
            raise ShellError(f"{words[0]}: wrong number of arguments")
        if ">" in words[1:] and words[0] != "echo":
            raise ShellError(f"{words[0]}: redirection is not supported")
        return option.run(*words[1:])

    def facts(self) -> Counter[tuple[Any, ...]]:
        """Everything that the tree holds: folders, and files with their contents."""
        return Counter(
            [("folder", path) for path in self.folders]
            + [("file", path, text) for path, text in self.files.items()]
        )

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; those of folders end in a slash."""
        below = [(path, "") for path in self.files] + [(path, "/") for path in self.folders]
        inside = [
            posixpath.basename(path) + mark
            for path, mark in below
            if path != "/" and posixpath.dirname(path) == folder
        ]
        return sorted(inside)

    def _path(self, path: str) -> str:
        full = posixpath.normpath(posixpath.join("/", self.folder, path))
        return "/" + full.lstrip("/")

    def _file(self, command: str, path: str) -> str:
        """The absolute path of a file that exists."""
        full = self._path(path)
        if full not in self.files:
            reason = "is a folder" if full in self.folders else "no such file"
            raise ShellError(f"{command}: {path}: {reason}")
        return full

    def _folder(self, command: str, path: str) -> str:
        full = self._path(path)
        if full not in self.folders:
            reason = "not a folder" if full in self.files else "no such folder"
            raise ShellError(f"{command}: {path}: {reason}")
        return full

    def _write(self, command: str, path: str, text: str) -> None:
        full = self._path(path)
        if full in self.folders:
            raise ShellError(f"{command}: {path}: is a folder")
        if path.endswith("/"):
            raise ShellError(f"{command}: {path}: no such folder")
        self._new(command, full)
        if len(text) > MAX_FILE:
            raise ShellError(f"{command}: {path}: file too large")
        self.files[full] = text

    def _new(self, command: str, full: str) -> None:
        """Raise ShellError where no file or folder can be made at a path."""
        if posixpath.dirname(full) not in self.folders:
            raise ShellError(f"{command}: {full}: no such folder")
        if len(full) > MAX_PATH:
            raise ShellError(f"{command}: path too long")
        if full not in self.files and len(self.files) + len(self.folders) >= MAX_FILES:
            raise ShellError(f"{command}: no space left")

    def _ls(self, path: str = ".") -> str:
        return "\n".join(self.names(self._folder("ls", path)))

    def _cd(self, path: str) -> str:
        self.folder = self._folder("cd", path)
        return ""

    def _find(self, path: str) -> str:
        return "\n".join(self._under(self._folder("find", path)))

    def _under(self, folder: str) -> list[str]:
        """The files below a folder, sorted."""
        prefix = folder.rstrip("/") + "/"
        return sorted(path for path in self.files if path.startswith(prefix))

    def _cat(self, path: str) -> str:
        return self.files[self._file("cat", path)]

    def _head(self, path: str) -> str:
        lines = self.files[self._file("head", path)].splitlines()
        return "\n".join(lines[:LINES_OF_HEAD])

    def _wc(self, path: str) -> str:
        lines = self.files[self._file("wc", path)].splitlines()
        return f"{len(lines)} lines"

    def _grep(self, text: str, path: str) -> str:
        """Lines that contain a plain text."""
        lines = self.files[self._file("grep", path)].splitlines()
        return "\n".join(line for line in lines if text in line)

    def _echo(self, text: str, sign: str, path: str) -> str:
        if sign not in (">", ">>"):
            raise ShellError("echo: usage: echo TEXT > FILE, echo TEXT >> FILE")
        before = self.files.get(self._path(path), "") if sign == ">>" else ""
        self._write("echo", path, f"{before}{text}\n")
        return ""

    def _cp(self, source: str, target: str) -> str:
        text = self.files[self._file("cp", source)]
        self._write("cp", self._inside(source, target), text)
        return ""

    def _mv(self, source: str, target: str) -> str:
        full = self._file("mv", source)
        target = self._inside(source, target)
        if self._path(target) == full:
            raise ShellError(f"mv: {source}: the same file")
        text = self.files[full]
        self._write("mv", target, text)
        del self.files[full]
        return ""

    def _inside(self, source: str, target: str) -> str:
        """The target of a copy: a folder takes the file's name."""
        full = self._path(target)
        return posixpath.join(full, posixpath.basename(source)) if full in self.folders else target

    def _rm(self, *paths: str) -> str:
        full = [self._file("rm", path) for path in paths]
        for path in set(full):
            del self.files[path]
        return ""

    def _mkdir(self, path: str) -> str:
        full = self._path(path)
        if full in self.folders or full in self.files:
            raise ShellError(f"mkdir: {path}: exists")
        self._new("mkdir", full)
        self.folders.add(full)
        return ""

    def _sed(self, option: str, script: str, path: str) -> str:
        """Replace a plain text in each line: `s/OLD/NEW/`."""
        parts = script.split("/")
        if option != "-i" or len(parts) != 4 or parts[0] != "s" or not parts[1] or parts[3]:
            raise ShellError("sed: usage: sed -i 's/OLD/NEW/' FILE")
        full = self._file("sed", path)
        lines = self.files[full].splitlines()
        changed = [line.replace(parts[1], parts[2], 1) for line in lines]
        count = sum(old != new for old, new in zip(lines, changed, strict=True))
        if count:
            self._write("sed", path, "\n".join(changed) + "\n")
        return f"{count} line{'' if count == 1 else 's'} changed"


def split(command: str) -> list[str]:
    """The words of a command. Raises ShellError where a shell would do more than run it."""
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        lexer.commenters = ""
        words = list(lexer)
    except ValueError as error:
        raise ShellError(f"syntax error: {str(error).lower()}") from error
    bad = [word for word in words if word and set(word) <= UNSUPPORTED]
    if bad:
        raise ShellError(f"syntax error: {bad[0]} is not supported")
    return words
