"""What the classes of a set are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_train.data.shards.benchmark import CLASSNAMES, TEMPLATES
from clip_train.errors import UserError
from clip_train.evaluation.prompts.files import Templates, imagenet_classnames, load_prompts, read_lines

AUTO = "auto"
IMAGENET = "imagenet"


def names_from(choice: str, *, root: Path) -> list[str] | None:
    """Return the names that `classnames=` chooses, or those that lie in `root`; None if nothing says any.

    Raises:
        UserError: the choice is no file.
    """
    if choice == AUTO:
        return read_lines(root / CLASSNAMES, counted=True) if (root / CLASSNAMES).is_file() else None
    if choice == IMAGENET:
        return imagenet_classnames()
    if not Path(choice).is_file():
        raise UserError(f"classnames={choice} is neither auto, imagenet nor a file")
    return read_lines(choice, counted=True)


def required_names(choice: str, *, root: Path, why: str) -> list[str]:
    """Return the names as `names_from` does.

    Raises:
        UserError: nothing says any.
    """
    names = names_from(choice, root=root)
    if names is None:
        raise UserError(f"{why}: say what the classes are with classnames=FILE or imagenet, or in {root / CLASSNAMES}")
    return names


def prompts_from(choice: str, *, root: Path, classnames: Sequence[str], otherwise: str = "single") -> Templates:
    """Return the templates that `templates=` chooses; `auto` takes those in `root`, else the ones of `otherwise`.

    Raises:
        UserError: the choice is no file, or its content does not fit.
    """
    if choice == AUTO:
        choice = str(root / TEMPLATES) if (root / TEMPLATES).is_file() else otherwise
    return load_prompts(choice, classnames=classnames)


def parse_class(text: str, *, num_classes: int) -> int | None:
    """Return the class that a text names by its number, None if there is no such class."""
    text = text.strip()
    return int(text) if text.isdecimal() and int(text) < num_classes else None
