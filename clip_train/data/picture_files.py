"""Find the pictures below a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.index.files import IMAGE_EXTENSIONS
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


def pictures_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that have a picture's extension, in no order.

    Links to folders are followed. Hidden files and folders are left out, and what macOS puts into archives.

    Raises:
        UserError: a folder cannot be read.
    """
    yield from _below(folder, above=frozenset())


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name holds no pictures of the user's (`._a.jpg`, `__MACOSX`)."""
    return name.startswith(".") or name == "__MACOSX"


def _below(folder: Path, *, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        facts = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
    here = (facts.st_dev, facts.st_ino)
    if here in above:  # a link to a folder that it lies in
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        path = folder / entry.name
        if entry.is_dir():
            yield from _below(path, above=above | {here})
        elif path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS:
            yield path
