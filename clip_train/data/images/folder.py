"""The pictures below a folder, by the names of the files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from clip_train.data.index.files import IMAGE_EXTENSIONS
from clip_train.errors import reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pictures_below(folder: Path) -> Iterator[Path]:
    """Yield the pictures below a folder in no order, as `files_below` finds them."""
    return filter(is_picture, files_below(folder))


def is_picture(path: Path) -> bool:
    """Return whether a name is that of a picture."""
    return path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Return whether a name is that of nothing of the user's: `._a.jpg`, `.git`, `__MACOSX` of macOS."""
    return name.startswith(".") or name == "__MACOSX"


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in no order, also those of linked folders, without what is hidden.

    Raises:
        UserError: a folder cannot be read.
    """
    return _find(folder, above=frozenset())


def _find(folder: Path, *, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    with reading(folder):
        status = folder.stat()
        entries = [(entry.name, entry.is_dir()) for entry in os.scandir(folder) if not is_hidden(entry.name)]
    identity = status.st_dev, status.st_ino
    if identity in above:  # a link to a folder that this one lies in
        return
    for name, is_folder in entries:
        if is_folder:
            yield from _find(folder / name, above=above | {identity})
        else:
            yield folder / name
