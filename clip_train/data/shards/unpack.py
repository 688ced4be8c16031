"""Copy pictures that lie inside tables into plain files, so that they can be read in any order.

A table is read from front to back, a row group per task, and each row group becomes one file of its pictures beside
their lengths. Both appear only when they are complete, so a killed run goes on with the next row group.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clip_train.data.files import write_atomically
from clip_train.data.images.decode import BadSampleError
from clip_train.data.index.jobs import run_jobs
from clip_train.data.shards.inputs.pair import Absent, Content, Pair, Stored
from clip_train.data.shards.inputs.parquet import Cell, pictures_of
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_EMPTY = -1  # length of an empty cell


class _RowGroup(NamedTuple):
    path: Path
    column: str
    number: int


class _Task(NamedTuple):
    out: Path
    row_group: _RowGroup


def unpacked(
    pairs: Sequence[Pair], *, place: Path, jobs: int, progress: Callable[[str, int, int], None] | None = None
) -> list[Pair]:
    """Return the pairs with every picture in a file of its own place; those that are in tables are copied to `place`.

    Args:
        pairs: of an input.
        place: folder for the copies, which take as much room as the pictures.
        jobs: processes.
        progress: told how many row groups are done, of how many.

    Raises:
        UserError: a table cannot be read, or `place` is full.
    """
    row_groups = sorted({_row_group(pair.image) for pair in pairs if isinstance(pair.image, Cell)})
    tasks = [_Task(place / f"pictures-{i:06d}", row_group) for i, row_group in enumerate(row_groups)]
    contents: dict[_RowGroup, list[Stored]] = {}
    for task, lengths in zip(tasks, run_jobs(_unpack, tasks, jobs=jobs), strict=True):
        starts = np.cumsum(np.maximum(lengths, 0)) - np.maximum(lengths, 0)
        absent = Absent(task.row_group.path)
        contents[task.row_group] = [
            absent if length == _EMPTY else Content(task.out, start, length)
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        if progress is not None:
            progress("unpacked", len(contents), len(tasks))
    return [
        pair._replace(image=contents[_row_group(pair.image)][pair.image.row]) if isinstance(pair.image, Cell) else pair
        for pair in pairs
    ]


def _row_group(cell: Cell) -> _RowGroup:
    return _RowGroup(cell.path, cell.column, cell.row_group)


def _unpack(task: _Task) -> np.ndarray:
    """Return the lengths of the pictures of a row group, int64 [rows], after copying them unless that was done."""
    listed = task.out.with_suffix(".lengths")
    if listed.exists():
        return np.frombuffer(listed.read_bytes(), dtype=np.int64)
    path, column, number = task.row_group
    part = task.out.with_suffix(".part")
    lengths = []
    try:
        with part.open("wb") as file:
            for content in pictures_of(path, column=column, row_group=number):
                lengths.append(_EMPTY if content is None else file.write(content))
            file.flush()
            os.fsync(file.fileno())
        part.replace(task.out)
    except BadSampleError as error:
        raise UserError(f"{path}: row group {number} cannot be read as parquet: {error.__cause__}") from error
    except OSError as error:
        raise UserError(f"{task.out} cannot be written: {error.strerror or error}") from error
    write_atomically(listed, np.array(lengths, dtype=np.int64).tobytes())
    return np.array(lengths, dtype=np.int64)
