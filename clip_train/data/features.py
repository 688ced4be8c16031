"""Features of pictures that a locked image tower has computed once: a table on disk, read in place of the pictures."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clip_train.data.reader import ShardReader
from clip_train.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from clip_train.data.source import Source

_DONE, _BAD = 1, 2


class SampleTable:
    """Numbers all samples of the sources from 0, in the order of sources, shards and places.

    Args:
        sources: the indexed shards.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        counts = [source.counts for source in sources]
        self._first_shard = np.cumsum([0, *(len(shards) for shards in counts)])
        self._first_sample = np.cumsum([0, *(count for shards in counts for count in shards)])
        self._sources = tuple(sources)

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def number(self, source: int, shard: int, index: int) -> int:
        """Return the number of a sample."""
        return int(self._first_sample[self._first_shard[source] + shard]) + index

    def place(self, number: int) -> tuple[int, int, int]:
        """Return source, shard and index of a sample."""
        shard = int(np.searchsorted(self._first_sample, number, side="right")) - 1
        source = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return source, shard - int(self._first_shard[source]), number - int(self._first_sample[shard])


class MissingPictures:
    """The pictures whose features are not in a table yet, as an `ImageSource`.

    Args:
        sources: the indexed shards.
        table: numbers their samples.
        numbers: int64 [n], the samples, ascending.
    """

    def __init__(self, sources: Sequence[Source], *, table: SampleTable, numbers: NDArray[np.int64]) -> None:
        self._readers = [ShardReader(source) for source in sources]
        self._table = table
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> bytes:
        """Return the encoded picture."""
        source, shard, place = self._table.place(int(self.numbers[index]))
        return self._readers[source].read(shard, place)[0]

    def key(self, index: int) -> str:
        """Return `shard.tar/member` of the picture, for messages."""
        source, shard, place = self._table.place(int(self.numbers[index]))
        return self._readers[source].key(shard, place)


class FeatureTable:
    """A feature of unit length for every sample, kept in two files that all ranks and workers share.

    `features.f32` holds [N, D] float32; a byte of `features.done` is set after the row that it stands for, so that a
    table whose making was interrupted goes on where it was.

    Args:
        folder: of the files, made by `begin`.
        sources: the indexed shards.
        width: D.
    """

    def __init__(self, folder: Path, *, sources: Sequence[Source], width: int) -> None:
        self._folder = folder
        self.samples = SampleTable(sources)
        self.width = width
        self._rows: np.memmap[Any, np.dtype[np.float32]] | None = None
        self._done: np.memmap[Any, np.dtype[np.uint8]] | None = None

    def begin(self, identity: Mapping[str, object]) -> None:
        """Make the files, or keep those of an earlier attempt with the same `identity`. For one process alone.

        Raises:
            UserError: the disk has no room for them.
        """
        told = self._folder / "features.json"
        content = json.dumps({**identity, "samples": len(self.samples), "width": self.width}, indent=1, sort_keys=True)
        if told.exists() and told.read_text(encoding="utf-8") == content:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        size, free = 4 * self.width * len(self.samples), shutil.disk_usage(self._folder).free
        if size > free:
            raise UserError(
                f"model.vision.cache_features=true needs {size:,} bytes in {self._folder}, where {free:,} are free"
            )
        for name, num_bytes in (("features.f32", size), ("features.done", len(self.samples))):
            with (self._folder / name).open("wb") as file:
                os.truncate(file.fileno(), num_bytes)
        told.write_text(content, encoding="utf-8")  # last: it vouches for the files

    def missing(self) -> NDArray[np.int64]:
        """Return the numbers of the samples that have no row yet."""
        return np.flatnonzero(self._open()[1] == 0)

    def write(self, numbers: NDArray[np.int64], rows: NDArray[np.float32], *, valid: NDArray[np.bool_]) -> None:
        """Write the rows [n, D] of some samples; those that are not `valid` are marked as pictures without one."""
        features, done = self._open(writable=True)
        features[numbers] = rows
        features.flush()  # before the marks that vouch for the rows
        done[numbers] = np.where(valid, _DONE, _BAD)

    def read(self, source: int, shard: int, index: int) -> NDArray[np.float32] | None:
        """Return the row [D] of a sample; None if its picture could not be used."""
        features, done = self._open()
        number = self.samples.number(source, shard, index)
        assert done[number], "the table is complete before training begins"
        return features[number] if done[number] == _DONE else None

    def __getstate__(self) -> dict[str, object]:
        """Leave the mapped files behind: a worker maps them itself."""
        return self.__dict__ | {"_rows": None, "_done": None}

    def _open(self, *, writable: bool = False) -> tuple[np.memmap[Any, np.dtype[np.float32]], NDArray[np.uint8]]:
        if self._rows is None or self._done is None or (writable and not self._done.flags.writeable):
            mode: Literal["r+", "r"] = "r+" if writable else "r"
            shape = (len(self.samples), self.width)
            self._rows = np.memmap(self._folder / "features.f32", dtype=np.float32, mode=mode, shape=shape)
            self._done = np.memmap(self._folder / "features.done", dtype=np.uint8, mode=mode, shape=shape[:1])
        return self._rows, self._done
