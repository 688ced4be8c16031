"""Publish a checkpoint: a reader sees all of it or nothing, whenever the process or the machine dies."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.checkpoint.manifest import MANIFEST_NAME, Manifest, verify
from clip_train.errors import ClipTrainError
from clip_train.files import sync_directory, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from clip_train.checkpoint.writers import Writers
    from clip_train.files import Chunks, FileRecord


FREE_FACTOR = 1.3  # of a checkpoint's size must be free before it is written


def publish(
    target: Path,
    *,
    contents: Mapping[str, Chunks],
    describe: Callable[[dict[str, FileRecord]], Manifest],
    writers: Writers,
) -> None:
    """Write `contents` (file name -> pieces) as the checkpoint `target`.

    Everything is first written and flushed under a name that no reader looks at, the manifest last; one rename makes
    it visible. A `target` with the same contents stays as it is; one that differs (after a rewind) makes room first.
    Each of the `writers` calls this with files of its own and fails if any of them does; rank 0 publishes.

    Raises:
        OSError: nothing was published, and what stood at `target` still does.
    """
    part = private_name(target, kind="part")
    try:
        part = writers.agree(lambda: _make(part) if writers.world.is_main else part)[0]
        written = writers.agree(
            lambda: {name: write_file(part / name, chunks=chunks) for name, chunks in contents.items()}
        )
        if not writers.world.is_main:
            return
        records = {name: record for files in written for name, record in files.items()}
        write_file(part / MANIFEST_NAME, chunks=[describe(records).to_bytes()])
        sync_directory(part)
        if _holds(target, records):
            shutil.rmtree(part)
            return
        _replace(part, target)
    except OSError:
        if writers.world.is_main:  # all have written, or failed to
            shutil.rmtree(part, ignore_errors=True)
        raise


def remove(checkpoint_dir: Path) -> None:
    """Delete a checkpoint; its name goes first, so that no half of it is ever seen under that name."""
    trash = private_name(checkpoint_dir, kind="trash")
    checkpoint_dir.rename(trash)
    shutil.rmtree(trash)


def clear_leftovers(checkpoints: Path) -> list[str]:
    """Delete what dead processes left under private names and return these names. Call it only while holding the lock.

    A checkpoint that was moved out of the way for one that never came is put back.
    """
    leftovers = sorted(path for path in checkpoints.iterdir() if path.name.startswith((".part-", ".stale-", ".trash-")))
    for path in leftovers:
        replaced = checkpoints / path.name.removeprefix(".stale-").rpartition("-")[0]
        if path.name.startswith(".stale-") and not replaced.exists():
            path.rename(replaced)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]


def require_space(folder: Path, *, needed: int) -> None:
    """Check before a save that `needed` bytes are free.

    Raises:
        OSError: they are not; it looks like that of a disk that fills up while writing.
    """
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def explain(error: OSError, *, folder: Path, needed: int) -> str:
    """Say in the user's words why a save failed."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error)
    free = shutil.disk_usage(folder).free
    return f"No space left: {needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"


def private_name(target: Path, *, kind: str) -> Path:
    """Return a name beside `target` that no reader looks at and that `clear_leftovers` knows."""
    return target.parent / f".{kind}-{target.name}-{os.getpid()}"


def _make(part: Path) -> Path:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


def _replace(part: Path, target: Path) -> None:
    stale = private_name(target, kind="stale")
    replaces = target.exists()
    if replaces:
        target.rename(stale)
    try:
        part.rename(target)
    except OSError:
        if replaces:
            stale.rename(target)
        raise
    sync_directory(target.parent)
    if replaces:
        shutil.rmtree(stale)


def _holds(target: Path, records: dict[str, FileRecord]) -> bool:
    try:
        return verify(target).files == records
    except ClipTrainError:
        return False
