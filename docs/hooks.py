"""Hooks of the docs site: notes to the tests are hidden, and config keys are listed."""

from __future__ import annotations

import importlib
import re
from typing import Any

from mesocosm import config
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
    sections = []
    for name, job in JOBS.items():
        schema = getattr(importlib.import_module(job.module), job.schema)
        lines = "\n".join(describe(job.module, job.schema, config.to_dict(schema())))
        example = f"Example: `mesocosm {name} {job.example}`"
        sections.append(f"## {name}\n\n{example}\n\n```\n{lines}\n```\n")
    return "\n".join(sections)
