"""Choices of `data.cache.*`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.errors import UserError

if TYPE_CHECKING:
    from clip_train.data.remote.cache import ShardCache


@dataclass(slots=True, kw_only=True)
class CacheConfig:
    """Where remote shards (`https://`, `s3://` …) lie while they are read."""

    dir: str = "~/.cache/clip-train/shards"
    """Folder on a disk of each machine, shared by all of its processes."""
    max_bytes: int = 200_000_000_000
    """What the folder may hold, in bytes. Shards are evicted when no planned sample lies in them."""
    counts_from_stats: bool = False
    """Without an index beside the shards, believe img2dataset's `NAME_stats.json` instead of downloading every shard
    once to count. Checked when a shard is first read: another number stops the run."""
    public_only: bool = False
    """As `data.public_only`, for an evaluation; that of `data.val` follows it."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise UserError(f"data.cache.max_bytes={self.max_bytes} must be positive")

    def build(self) -> ShardCache:
        """Return the cache, which is made at its first use."""
        from clip_train.data.remote.cache import ShardCache

        folder = Path(self.dir).expanduser().absolute()
        return ShardCache(folder=folder, max_bytes=self.max_bytes, public_only=self.public_only)


def cache_in(folder: Path | None) -> ShardCache:
    """Return the cache in a folder, None for the default one."""
    return (CacheConfig() if folder is None else CacheConfig(dir=str(folder))).build()
