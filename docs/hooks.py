"""Hook of the docs site: config keys are listed."""

from __future__ import annotations

import importlib
from typing import Any

from mesocosm.cli.keys import describe
from mesocosm.jobs.registry import JOBS


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
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
