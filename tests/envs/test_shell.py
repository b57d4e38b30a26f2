"""The shell of the company: its commands, and what it refuses."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest

from mesocosm.envs.text.shell import MAX_FILE, MAX_FILES, Shell, ShellError

FILES = {"/a/b.txt": "one\ntwo\n", "/a/c/d.txt": "two = 2\nold two = 2\n", "/e.txt": "x\n"}


@pytest.mark.parametrize(
    ("commands", "output"),
    [
        (["ls"], "a/\ne.txt"),
        (["ls /a"], "b.txt\nc/"),
        (["cd a", "ls"], "b.txt\nc/"),
        (["cd a/c", "cd ..", "ls"], "b.txt\nc/"),
        (["cd ../../..", "ls"], "a/\ne.txt"),
        (["find /"], "/a/b.txt\n/a/c/d.txt\n/e.txt"),
        (["cd a", "find c"], "/a/c/d.txt"),
        (["cat /a/b.txt"], "one\ntwo\n"),
        (["cd a", "cat ./c/../b.txt"], "one\ntwo\n"),
        (["head /a/b.txt"], "one\ntwo"),
        (["wc /a/b.txt"], "2 lines"),
        (["grep two /a/b.txt"], "two"),
        (["grep 'two = 2' /a/c/d.txt"], "two = 2\nold two = 2"),
        (["grep .* /a/b.txt"], ""),
        (["echo 'a b' > /n.txt", "cat /n.txt"], "a b\n"),
        (["echo 3 >> /e.txt", "cat /e.txt"], "x\n3\n"),
        (["echo 3 > /e.txt", "cat /e.txt"], "3\n"),
        (["echo 'a > b' > /n.txt", "cat n.txt"], "a > b\n"),
        (["cp /e.txt /a", "cat /a/e.txt"], "x\n"),
        (["cp /e.txt /f.txt", "ls"], "a/\ne.txt\nf.txt"),
        (["mv /e.txt /a/b.txt", "cat /a/b.txt", "find /"], "/a/b.txt\n/a/c/d.txt"),
        (["rm /e.txt /a/b.txt", "find /"], "/a/c/d.txt"),
        (["rm /a/c/d.txt", "ls /a"], "b.txt\nc/"),  # the folder stays
        (["mkdir /q", "ls"], "a/\ne.txt\nq/"),
        (["sed -i 's/two = 2/two = 5/' /a/c/d.txt"], "2 lines changed"),
        (["sed -i s/one/1/ /a/b.txt", "cat /a/b.txt"], "1\ntwo\n"),
        (["sed -i s/zz/1/ /a/b.txt"], "0 lines changed"),
    ],
)
def test_commands(commands: list[str], output: str) -> None:
    shell = Shell(FILES)
    assert [shell.run(command) for command in commands][-1] == output


@pytest.mark.parametrize(
    "command",
    [
        *("", "   ", "'", "help", "python -c 1", "bash", "sudo ls", "curl http://a", "exec ls"),
        *("cat", "cat /a/b.txt /e.txt", "cat /a", "cat /missing", "cat *", "cat -r /", "ls /e.txt"),
        *("cat /a/b.txt | wc", "ls; rm /e.txt", "ls && ls", "ls & ", "cat $(ls)", "(ls)"),
        *("cat < /e.txt", "cat /e.txt > /f.txt", "ls > /f.txt", "rm /a", "rm /", "rm -r /a"),
        *("rm /e.txt /missing", "cd /e.txt", "cd /q", "echo a", "echo a > /a", "echo a > /q/r"),
        *("mkdir /a", "mkdir /q/r", "mv /e.txt /e.txt", "mv /e.txt /q/", "cp /a /q", "find /e.txt"),
        *("sed s/a/b/ /e.txt", "sed -i s/x/y/g /e.txt", "sed -i s//y/ /e.txt", "sed -i e /e.txt"),
        *("sed -i 's/x/y/w /tmp/f' /e.txt", "grep -r one /a", "`ls`", "cat `ls`", "! ls"),
        f"mkdir /{'a' * 200}",
    ],
)  # fmt: skip
def test_refused_commands_change_nothing(command: str) -> None:
    shell = Shell(FILES)
    before = shell.facts()
    with pytest.raises(ShellError):
        shell.run(command)
    assert shell.facts() == before and shell.folder == "/"


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "//etc/passwd", "~/.bashrc", "/proc/self/environ",
     "/a/../../etc/hostname", "$HOME", "file:///etc/passwd", "/dev/null", "\x00"],
)  # fmt: skip
def test_no_real_file_is_reached(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(FILES)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a real file was touched")

    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for module, names in ((os, ("open", "stat", "listdir", "remove")), (builtins, ("open",))):
            for name in names:
                patch.setattr(module, name, refuse)
        for command in ("cat", "head", "ls", "cd", "find", "rm", "sed -i s/a/b/", "cp e.txt"):
            try:
                output = shell.run(f"{command} {path}")
            except ShellError:
                continue
            assert command == "cp e.txt" and output == ""  # a new file in the tree
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_bounded() -> None:
    shell = Shell({"/a.txt": "x" * 100 + "\n"})
    with pytest.raises(ShellError, match="file too large"):
        for _ in range(100):
            shell.run("cp /a.txt /b.txt")
            shell.run(f"echo {'y' * 200} >> /a.txt")
    assert len(shell.files["/a.txt"]) <= MAX_FILE
    with pytest.raises(ShellError, match="no space left"):
        for k in range(MAX_FILES + 1):
            shell.run(f"echo a > /{k}.txt")
    assert len(shell.files) + len(shell.folders) == MAX_FILES
    with pytest.raises(ShellError, match="no space left"):
        shell.run("mkdir /q")
