"""Files on a local disk that are there when the call returns, and are seen whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    Chunks = Iterable[bytes | memoryview]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest knows of one file."""

    bytes: int
    sha256: str


def write_file(path: Path, *, chunks: Chunks) -> FileRecord:
    """Write a new file, flush it to the disk and return its size and hash.

    Raises:
        OSError: the disk is full, failed, or the file exists.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            size += len(rest)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def replace_file(path: Path, content: str | bytes) -> None:
    """Give a small file other contents, in one step that a crash cannot halve. Text is written as UTF-8.

    Raises:
        OSError: the disk is full or failed; the file is as it was.
    """
    part = path.with_name(f".part-{path.name}-{os.getpid()}")
    part.unlink(missing_ok=True)
    try:
        write_file(part, chunks=[content.encode() if isinstance(content, str) else content])
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def hash_file(path: Path) -> FileRecord:
    """Read a file and return its size and hash."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(bytes=file.tell(), sha256=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk: without this, a finished rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some shared folders cannot flush a directory
            raise
    finally:
        os.close(descriptor)
