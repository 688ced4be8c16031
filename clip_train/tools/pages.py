"""The pages that commands write: one file each, from a template, that needs neither network nor scripts."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clip_train.errors import writing
from clip_train.files import replace_file


def page_templates() -> Environment:
    """Return the templates of the pages; every value that goes into one is escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def write_page(path: Path, page: str) -> Path:
    """Write a page in one step, so that a browser never reads half of it; return its path.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path):
        replace_file(path, page)
    return path
