"""Write image-caption shards with webdataset: reproducible bytes, atomic publication, an index with checksums."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

import webdataset

from clip_train.data.index.files import INDEX_NAME
from clip_train.data.index.walk import IndexSummary, index_shards
from clip_train.errors import UserError, writing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SAMPLES_PER_SHARD = 10_000


class ShardWriter:
    """Writes one shard, which appears under its name only when it is complete. The same samples give the same bytes.

    Args:
        path: of the shard.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self._file = self._part.open("wb")
        # No encoder: bytes are written as they are. A fixed time makes the tar reproducible.
        self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.publish()
        else:
            self.abandon()

    def write(self, key: str, parts: Mapping[str, bytes | str]) -> None:
        """Append one sample.

        Args:
            key: name of the sample, unique in its shard, without a dot in its last component.
            parts: content by extension, such as `{"png": ..., "txt": "a red circle", "cls": "3"}`.
        """
        assert key and "." not in key.rsplit("/", 1)[-1], f"key {key!r} would be read back as another one"
        content = {name: part.encode() if isinstance(part, str) else part for name, part in parts.items()}
        self._tar.write({"__key__": key, **content})

    def publish(self) -> None:
        """Finish the shard and give it its name, once it is on the disk."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)

    def abandon(self) -> None:
        """Close the file; what was written stays a `.part`."""
        self._tar.close()
        self._file.close()


class ShardSetWriter:
    """Writes samples into numbered shards of a folder, and their index when it closes without an error.

    Args:
        folder: made if needed; must hold no shards yet.
        samples_per_shard: samples of all shards but the last.

    Raises:
        UserError: the folder already holds shards or cannot be written.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int = SAMPLES_PER_SHARD) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard={samples_per_shard} must be positive")
        self.folder = folder
        self.num_samples = 0
        self.shards: list[Path] = []
        self._samples_per_shard = samples_per_shard
        self._writer: ShardWriter | None = None
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            refuse_shards(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif self._writer is not None:
            self._writer.abandon()

    def write(self, key: str, parts: Mapping[str, bytes | str]) -> None:
        """Append one sample, as `ShardWriter.write` does."""
        if self.num_samples % self._samples_per_shard == 0:
            self._finish_shard()
            self.shards.append(shard_path(self.folder, len(self.shards)))
            self._writer = ShardWriter(self.shards[-1])
        assert self._writer is not None
        self._writer.write(key, parts)
        self.num_samples += 1

    def close(self) -> IndexSummary | None:
        """Finish the last shard and write the index; None if there were no samples."""
        self._finish_shard()
        return index_shards(self.shards, crc=True) if self.shards else None

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self._writer.publish()
        self._writer = None


def shard_path(folder: Path, number: int) -> Path:
    """Return the name of the shard with a number, from 0."""
    return folder / f"{number:06d}.tar"


def refuse_shards(folder: Path) -> None:
    """Check that a folder holds no shards yet.

    Raises:
        UserError: it does.
    """
    if any(folder.glob("*.tar")) or (folder / INDEX_NAME).exists():
        raise UserError(f"{folder} already holds shards: remove them or choose another folder")
