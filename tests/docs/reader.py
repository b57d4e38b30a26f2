"""What the docs say to type: pages -> blocks of code -> commands.

A block is fenced, or indented by four spaces after an empty line. Its parts between empty lines are
shell where they begin with a command or an assignment; then every line is a command (one that ends
in a backslash continues on the next line).

Comments above a block are notes to the tests, which no reader sees:

- `<!-- no-run: REASON -->`: none of the block's commands is run.
- ``<!-- no-run `WORDS`: REASON -->``: the block's commands that contain WORDS are not run.
- `<!-- file: NAME -->`: the fenced block is a file, written where the page's commands are run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = ("mesocosm", "make")
HERE = ("python", "pytest", "curl", "eval", "source", "cd", "ls", "cat")
"""Programs that are there wherever the tests are."""
FOREIGN = (
    "docker",
    "kubectl",
    "ssh",
    "ray",
    "pip",
    "git",
    "mlflow",
    "aws",
    "openssl",
    "gh",
    "helm",
)
"""Programs, or places, that the tests do without: their commands have a `no-run` note."""
COMMAND = re.compile(
    rf"(?:\w+=\S*\s+)*({'|'.join((*OURS, *HERE, *FOREIGN))})(?=\s|$)|^[A-Za-z_]\w*=\S"
)
NOTE = re.compile(r"<!-- no-run(?: `([^`]+)`)?: (\S.*) -->")
FILE = re.compile(r"<!-- file: (\S+) -->")


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str
    """Without its comment"""
    no_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def programs(self) -> list[str]:
        """The first word of each command of a pipe or list; an assignment has none."""
        return [
            match[1]
            for part in re.split(r"\s(?:\||&&|;)\s", self.text)
            if (match := COMMAND.match(part.strip())) and match[1]
        ]


@dataclass(frozen=True)
class Block:
    page: str
    first: int
    lines: list[str]
    file: str | None
    notes: list[tuple[str, str]]
    """(words of a command, why it is not run); every command contains the empty text."""

    def parts(self) -> Iterator[tuple[int, list[str]]]:
        """(line number, lines) between empty lines."""
        start = 0
        for at, line in enumerate([*self.lines, ""]):
            if not line.strip():
                if at > start:
                    yield self.first + start, self.lines[start:at]
                start = at + 1


def pages() -> list[Path]:
    """README.md, then docs/*.md."""
    return [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path) -> list[Block]:
    """Raises ValueError where a `no-run` note stands above no block."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    at, file = 0, None
    notes: list[tuple[str, str]] = []
    while at < len(lines):
        line = lines[at]
        if match := FILE.fullmatch(line.strip()):
            file = match[1]
        elif match := NOTE.fullmatch(line.strip()):
            notes.append((match[1] or "", match[2]))
        elif fence := re.match(r"\s*(`{3,})", line):
            end = next(
                i for i in range(at + 1, len(lines)) if lines[i].strip().startswith(fence[1])
            )
            found.append(Block(name(page), at + 2, lines[at + 1 : end], file, notes))
            at, file, notes = end, None, []
        elif line.startswith("    ") and line.strip() and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(
                Block(
                    name(page),
                    at + 1,
                    [
                        text.strip() if text.lstrip().startswith("#") else text[4:].rstrip()
                        for text in lines[at:end]
                    ],
                    None,
                    notes,
                )
            )
            at, notes = end - 1, []
        elif notes and line.strip():
            raise ValueError(f"{name(page)}:{at + 1}: a `no-run` note stands above no block")
        at += 1
    return found


def commands(block: Block) -> list[Command]:
    """Raises ValueError where a part of the block is neither all commands nor none, and where a
    `no-run` note fits no command.
    """
    found: list[Command] = []
    for first, lines in [] if block.file is not None else block.parts():
        stripped = [line.strip() for line in lines]
        if not COMMAND.match(stripped[0]) and not stripped[0].startswith("# "):
            if strange := next(
                (line for line in stripped if COMMAND.match(line) and not re.match(r"\w+=", line)),
                None,
            ):
                raise ValueError(
                    f"{block.page}:{first}: {strange!r} stands below what is no command; put an"
                    " empty line between them"
                )
            continue
        held, start = "", first
        for number, line in enumerate(stripped, first):
            start, held = (start, held + line) if held else (number, line)
            if held.endswith("\\"):
                held = held[:-1]
                continue
            text = without_comment(held)
            held = ""
            if not text:
                continue
            if not COMMAND.match(text):
                raise ValueError(
                    f"{block.page}:{number}: {text!r} is no command that the docs' tests know"
                    " (tests/docs/reader.py)"
                )
            reason = next((why for words, why in block.notes if words in text), None)
            found.append(Command(block.page, start, text, reason))
    for words, _ in block.notes:
        if not any(words in command.text for command in found):
            raise ValueError(
                f"{block.page}:{block.first}: the `no-run` note fits no command: {words!r}"
            )
    return found


def without_comment(line: str) -> str:
    """The command of a line of shell."""
    quote = ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (at == 0 or line[at - 1].isspace()):
            return line[:at].strip()
    return line.strip()


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    lines = page.read_text().splitlines()
    for block in blocks(page):
        for at in range(block.first - 1, block.first - 1 + len(block.lines)):
            lines[at] = ""
    return "\n".join(line for line in lines if not re.match(r"\s*`{3,}", line))


def lay_out(page: Path, folder: Path) -> list[str]:
    """Where a reader of the page stands: beside the repository's benchmarks, clusters and configs,
    and the files that the page writes, whose names it gives.
    """
    for part in ("benchmarks", "clusters", "configs"):
        (folder / part).symlink_to(REPOSITORY / part)
    files = [(block.file, block.lines) for block in blocks(page) if block.file is not None]
    for file, lines in files:
        (folder / file).write_text("\n".join(lines) + "\n")
    return [file for file, _ in files]
