"""Class names and prompt templates, read from the data files beside this module or from the user's own."""

from __future__ import annotations

import re
from pathlib import Path

from clip_train.errors import UserError

_FOLDER = Path(__file__).parent / "data"
_PLACEHOLDER = re.compile(r"\{c?\}")

SINGLE_TEMPLATE = "a photo of a {}."


def read_lines(path: str | Path) -> list[str]:
    """Return the non-empty lines of a UTF-8 text file.

    Raises:
        UserError: the file cannot be read or holds no line.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text file: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty; one entry per line is needed")
    return lines


def imagenet_classnames() -> list[str]:
    """Return the 1000 ImageNet class names in class order. Two pairs of classes share a name: never key by it."""
    return read_lines(_FOLDER / "imagenet_classnames.txt")


def imagenet_wnids() -> list[str]:
    """Return the WordNet ids of the 1000 ImageNet classes in class order, which is their sorted order."""
    return read_lines(_FOLDER / "imagenet_wnids.txt")


def load_templates(choice: str) -> list[str]:
    """Return the templates that `choice` names: `imagenet`, `simple`, `single` or a text file.

    Raises:
        UserError: there is no such file, or a template has no placeholder.
    """
    if choice == "single":
        return [SINGLE_TEMPLATE]
    if choice in ("imagenet", "simple"):
        return read_lines(_FOLDER / f"{choice}_templates.txt")
    if not Path(choice).is_file():
        raise UserError(f"templates={choice} is neither imagenet, simple, single nor a file")
    templates = read_lines(choice)
    for template in templates:
        if not _PLACEHOLDER.search(template):
            raise UserError(f"{choice}: template {template!r} must contain {{}} or {{c}}")
    return templates


def fill(template: str, *, classname: str) -> str:
    """Return the prompt of one class: `{}` and `{c}` both stand for its name."""
    return _PLACEHOLDER.sub(lambda _: classname, template)
