"""What the docs say to type: pages -> blocks of code -> commands.

A block is fenced, or indented by four spaces after an empty line. Its parts between empty lines are
shell where they begin with a command or an assignment; then every line is a command (one that ends
in a backslash goes on). In its comment `no-run: REASON` keeps a command from being run. Above a
fenced block `<!-- file: NAME -->` says what file it is, beside which the page's commands are run.
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
"""Programs, or places, that the tests do without: their commands say `no-run`."""
COMMAND = re.compile(
    rf"(?:\w+=\S*\s+)*({'|'.join((*OURS, *HERE, *FOREIGN))})(?=\s|$)|^[A-Za-z_]\w*=\S"
)
NO_RUN = re.compile(r"no-run: (\S.*)")


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
    found: list[Block] = []
    lines = page.read_text().splitlines()
    at, file = 0, None
    while at < len(lines):
        line = lines[at]
        if match := re.fullmatch(r"<!-- file: (\S+) -->", line.strip()):
            file = match[1]
        elif fence := re.match(r"\s*(`{3,})", line):
            end = next(
                i for i in range(at + 1, len(lines)) if lines[i].strip().startswith(fence[1])
            )
            found.append(Block(name(page), at + 2, lines[at + 1 : end], file))
            at, file = end, None
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
                )
            )
            at = end - 1
        at += 1
    return found


def commands(block: Block) -> list[Command]:
    """Raises ValueError where a part of the block is neither all commands nor none."""
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
            text, comment = split_comment(held)
            held = ""
            if not text:
                continue
            if not COMMAND.match(text):
                raise ValueError(
                    f"{block.page}:{number}: {text!r} is no command that the docs' tests know"
                    " (tests/docs/reader.py)"
                )
            reason = NO_RUN.search(comment)
            found.append(Command(block.page, start, text, reason[1] if reason else None))
    return found


def split_comment(line: str) -> tuple[str, str]:
    """(command, comment) of a line of shell."""
    quote = ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (at == 0 or line[at - 1].isspace()):
            return line[:at].strip(), line[at:]
    return line.strip(), ""


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
