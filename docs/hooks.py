"""Hooks of the docs site: notes to the tests are hidden, and config keys are listed."""

from __future__ import annotations

import importlib
import re
from typing import Any

from mesocosm.cli.keys import describe
from mesocosm.jobs.registry import JOBS

NO_RUN = re.compile(r"\s*# no-run:.*$|; no-run: .*$", re.MULTILINE)
"""What tells the tests not to run a command of a page."""


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    markdown = NO_RUN.sub("", markdown)
    return (
        markdown.replace("<!-- config keys -->", _keys()) if "config keys" in markdown else markdown
    )


def _keys() -> str:
    pages = []
    for name, job in JOBS.items():
        schema = importlib.import_module(job.module).JOB.config
        sections = describe(name, schema).items()
        blocks = (
            f"**{section}**\n\n```\n{chr(10).join(lines)}\n```\n" for section, lines in sections
        )
        pages.append(f"## {name}\n\nExample: `mesocosm {name} {job.example}`\n")
        pages += blocks
    return "\n".join(pages)
