"""The docs hold: every command in them is parsed and dry-run here, and run by the slow tests
(test_run.py); links, paths and quoted messages exist.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import mesocosm
from mesocosm import errors
from mesocosm.cli.main import commands as program
from mesocosm.cli.main import main
from mesocosm.jobs.registry import JOBS

from .reader import (
    FOREIGN,
    NOTE,
    REPOSITORY,
    Block,
    Command,
    blocks,
    commands,
    lay_out,
    name,
    pages,
    prose,
)

PACKAGE = Path(mesocosm.__file__).parent
PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
BASES = (REPOSITORY, PACKAGE, REPOSITORY / "tests")
"""Where a path that a page names may begin."""
STORED = ("agents/", "runs/")
"""How paths in storage begin, which look like folders of the package."""
SOMEBODY = re.compile(r"\b(OTHER_)?ID\b")
"""What stands in a page for the id of the reader's own artifact."""
LACKING = (
    "id0",
    "law.json",
    "table.csv",
    "mymodule",
    "must be a file, a folder or a pattern",
    "no server answers there",
    "is not installed",
    "no module 'gymnasium_robotics'",
)
"""Of these a dry run may say that they are not there: an earlier command would have made them, or
the reader.
"""


def _commands(block: Block) -> list[Command]:
    try:
        return commands(block)
    except ValueError:
        return []  # test_every_block_is_read says so


COMMANDS = [command for block in BLOCKS for command in _commands(block)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_read(page: Path) -> None:
    for block in blocks(page):
        commands(block)


def test_a_note_keeps_commands_from_being_run() -> None:
    lines = ["mesocosm collect", "mesocosm play"]
    block = Block("page", 1, lines, None, [("play", "waits"), ("", "long")])
    assert [command.no_run for command in commands(block)] == ["long", "waits"]
    with pytest.raises(ValueError, match="fits no command"):
        commands(Block("page", 1, lines, None, [("serve", "waits")]))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_notes_are_comments_with_a_reason(page: Path) -> None:
    lines = [line.strip() for line in page.read_text().splitlines() if "no-run" in line]
    assert all(NOTE.fullmatch(line) for line in lines), lines


def test_programs_that_are_not_there_are_not_run() -> None:
    left = [
        str(command)
        for command in COMMANDS
        if command.no_run is None and set(command.programs) & set(FOREIGN)
    ]
    assert not left, "say why they are not run: <!-- no-run: REASON --> above the block"


@pytest.mark.integration
@pytest.mark.parametrize("command", [c for c in COMMANDS if "mesocosm" in c.programs], ids=str)
def test_a_command_is_understood(
    command: Command,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """click accepts it, its config keys are known and its values can be meant; what it would read
    may be missing.
    """
    for file in lay_out(REPOSITORY / command.page, tmp_path):
        monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MESOCOSM_HOME", str(tmp_path))
    words = shlex.split(SOMEBODY.sub("id0", command.text).replace("PORT", "6379"))
    words = words[words.index("mesocosm") + 1 :]
    words = words[
        : next((at for at, word in enumerate(words) if word in ("|", "&&", ">", ";")), None)
    ]
    if words[0] not in JOBS:
        if words[:2] != ["cluster", "render"]:
            monkeypatch.setattr(click.Command, "invoke", lambda self, context: 0)
        assert main(words) == 0, capsys.readouterr().err
        return
    status = main([*words, "--dry-run", f"storage.root={root}"])
    said = capsys.readouterr().err
    assert status == 0 or (status == 2 and any(what in said for what in LACKING)), said


@pytest.mark.parametrize("command", [c for c in COMMANDS if "make" in c.programs], ids=str)
def test_make_has_the_target(command: Command) -> None:
    done = subprocess.run(
        ["make", "-n", *shlex.split(command.text)[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_sentences_exist(page: Path) -> None:
    targets = set(
        re.findall(r"^([a-z][-a-z ]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    )
    known = {target for line in targets for target in line.split()}
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        if match := re.fullmatch(r"make ([-a-z]+)", span):
            assert match[1] in known, span
        elif match := re.match(r"mesocosm ([a-z][-a-z]*)", span):
            assert match[1] in program.commands, span


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in _anchors(found), (
            f"{name(page)}: {target}: there is no such heading"
        )


def _starts() -> set[str]:
    """The first parts of paths that can be meant: folders of the repository, of the package, of the
    tests.
    """
    return {
        path.name
        for base in BASES
        for path in base.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__", "build"))
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    words = [word for span in spans for word in span.split()] + re.findall(
        r"\bdocs/[\w/.-]+\.\w+", page.read_text()
    )
    for word in words:
        path = word.strip(",;:()").partition("::")[0]
        if (
            "/" not in path
            or path.split("/")[0] not in _starts()
            or re.search(r"NAME|[<>{}=@\[…]|\bID\b", path)
        ):
            continue
        if path.startswith(STORED) and "." not in path:
            continue  # an artifact, or a folder in storage
        assert any(
            (base / path).exists() or ("*" in path and list(base.glob(path))) for base in BASES
        ), f"{name(page)}: there is no {path}"


def test_the_index_lists_every_page() -> None:
    index = (REPOSITORY / "docs/README.md").read_text()
    missing = [
        page.name
        for page in PAGES
        if page.parent.name == "docs"
        and page.name != "README.md"
        and f"]({page.name})" not in index
    ]
    assert not missing and "](docs/README.md)" in (REPOSITORY / "README.md").read_text()


def test_errors_name_pages_that_are_there() -> None:
    named = {
        match
        for path in PACKAGE.rglob("*.py")
        for match in re.findall(r"docs/[\w-]+\.md", path.read_text())
    }
    assert named and all((REPOSITORY / path).exists() for path in named)


# -- messages that a page quotes
# -------------------------------------------------------------------------------------

HOLE = "…"
"""In a quoted message: what differs from case to case."""


@functools.cache
def _texts() -> list[list[str]]:
    """The texts of each module, the holes of an f-string shown as HOLE."""
    modules = []
    for path in PACKAGE.rglob("*.py"):
        texts = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else HOLE
                    for part in node.values
                ]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
        modules.append(texts)
    return modules


def said_by_the_package(message: str) -> bool:
    """Whether one module's texts contain all pieces of `message` between holes and semicolons."""
    pieces = [piece.strip(" :") for piece in re.split(f"{HOLE}|;", message)]
    wanted = [piece for piece in pieces if len(piece) > 2]
    return any(all(any(piece in text for text in texts) for piece in wanted) for texts in _texts())


def quoted() -> list[str]:
    """The messages of docs/troubleshooting.md: the first column of its tables."""
    rows = re.findall(
        r"^- (`.+?`): ", (REPOSITORY / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    return [row.strip("`") for row in rows]


def test_troubleshooting_quotes_many_messages() -> None:
    assert len(quoted()) >= 30 and len(set(quoted())) == len(quoted())


@pytest.mark.integration
@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_packages(message: str) -> None:
    assert len(message.replace(HOLE, "").strip()) >= 12, "quote enough of it to be found"
    assert said_by_the_package(message), message


def test_a_message_that_nobody_says_is_found_out() -> None:
    assert said_by_the_package("unknown config key …") and issubclass(
        errors.UsageError, errors.MesocosmError
    )
    assert not said_by_the_package("unknown config kye …") and not said_by_the_package(
        "is not registered … unknown config key"
    )
