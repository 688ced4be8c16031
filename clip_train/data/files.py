"""Files that readers see whole or not at all, whatever else is writing them."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

from clip_train.errors import UserError
from clip_train.files import write_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, also after a crash.

    Raises:
        UserError: the folder cannot be written.
    """
    attempt = uuid4().hex
    try:
        publish(write_part(path, content, attempt=attempt), path)
    finally:
        with suppress(OSError):
            part_of(path, attempt=attempt).unlink()


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep others waiting that write files of a folder which must fit together; where nothing can be locked, nobody."""
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def part_of(path: Path, *, attempt: str) -> Path:
    """Return the name under which an attempt to write a file does so. Others may be writing the same one."""
    return path.with_name(f"{path.name}.{attempt}.part")


def publish(part: Path, path: Path) -> None:
    """Give a complete file its name.

    Raises:
        UserError: that cannot be.
    """
    try:
        part.replace(path)
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error


def write_part(path: Path, content: bytes, *, attempt: str) -> Path:
    """Write a file under its attempt's name, which is returned, and make its folder if needed.

    Raises:
        UserError: the folder cannot be written.
    """
    part = part_of(path, attempt=attempt)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        write_file(part, chunks=[content])
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error
    return part


def _cannot_write(path: Path, error: OSError) -> str:
    elsewhere = "; an index can be kept elsewhere with --index-dir and data.index_dir"
    return f"{path} cannot be written: {error.strerror or error}{elsewhere if error.errno in _READ_ONLY else ''}"
