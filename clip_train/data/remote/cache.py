"""A bounded folder on this machine that holds remote shards while they are read.

Any number of processes share it. A shard is downloaded whole, by one process at a time, under a temporary name, checked
and renamed; so a file under its own name is complete. Space is taken before the download begins. Where there is none,
shards that no run has planned go first, then those that are needed last; plans are published by
data/remote/spool.py. A shard that is being opened or downloaded is never evicted, and one that is open stays readable.

    FOLDER/<sha256 of the URL>.tar, .idx      a shard and its records; a signature is no part of the URL
    FOLDER/<sha256 of the URL>.<bytes>.part   a download under way, with the room it takes
    FOLDER/locks/  plans/  listings/          one lock per shard; what runs need; counts of remote folders
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.files import part_of, publish, write_atomically
from clip_train.data.index.files import ShardEntry, idx_path
from clip_train.data.index.walk import IndexOptions, index_shard
from clip_train.data.remote.plan import UNPLANNED, Plan, published_needs, stem_of
from clip_train.errors import IntegrityError, UserError, writing
from clip_train.storage.remote import download, is_remote, read_file, size_of

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Mapping

_FREE_BYTES = 1 << 28  # left to others on the disk
_POLL_SECONDS = 0.1
URGENT = -1  # nearer than any plan


class CacheFull(Exception):
    """There is no room now for a shard that is needed later than those that are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteShard(ShardEntry):
    """A shard behind a URL; `path` is its place in the cache. Without `idx_sha256` only its count is known."""

    url: str
    sha256: str | None = None  # of the tar, where it is known
    records: str | None = None  # where its records stand, a URL or a path; None: a walk makes them here

    @property
    def location(self) -> str:
        """The URL."""
        return self.url

    @property
    def room(self) -> int:
        """Bytes that the shard and its records take in the cache."""
        return self.bytes + self.n * self.record.itemsize

    def read_records(self, *, public_only: bool) -> bytes:
        """Return the records that stand at `records`, if `public_only` at a public address or on this machine.

        Raises:
            IntegrityError: they are gone, or are others than the index says.
        """
        assert self.records is not None
        try:
            if is_remote(self.records):
                content = read_file(self.records, public_only=public_only)
            else:
                content = Path(self.records).read_bytes()
        except OSError:
            content = None
        if content is None or hashlib.sha256(content).hexdigest() != self.idx_sha256:
            what = "is gone" if content is None else "does not match its hash"
            raise IntegrityError(f"{self.records} {what}: index the shards again")
        return content

    def missing_bytes(self) -> int:
        """Return how many bytes of the shard are not here yet; 0 only if it can be read."""
        if self.path.exists() and self.idx_path.exists():
            return 0
        with suppress(FileNotFoundError):
            return max(1, self.bytes - _part_path(self.path, room=self.room).stat().st_size)
        return max(1, self.bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCache:
    """Remote shards as local files.

    Args:
        folder: on a disk of this machine; made if needed.
        max_bytes: what shards and their records may take.
        public_only: connect to public addresses only.
    """

    folder: Path
    max_bytes: int
    public_only: bool = False

    def path(self, url: str) -> Path:
        """Return where a shard is when it is here."""
        return self.folder / f"{stem_of(url)}.tar"

    @contextmanager
    def hold(self, shard: RemoteShard, *, distance: int = URGENT, wait: bool = True) -> Iterator[None]:
        """Keep a shard here while it is opened. Downloads it if it is absent.

        Args:
            shard: what to hold.
            distance: samples until it is needed; it may displace only shards that are needed later.
            wait: for room, if there is none.

        Raises:
            UserError: the shard is absent or forbidden, or exceeds the cache.
            IntegrityError: it does not arrive, is damaged or changed after indexing.
            CacheFull: there is no room and `wait` is false.
        """
        self._make_folders()
        with self._lock(stem_of(shard.url)):
            if not shard.path.exists():
                with self._part(shard.url, room=shard.room, distance=distance, wait=wait) as part:
                    self._download(shard.url, part, size=shard.bytes, sha256=shard.sha256)
                    self._add_records(shard, tar=part)
                    part.replace(shard.path)
            elif not shard.idx_path.exists():  # the records of another run have other captions
                self._add_records(shard, tar=shard.path)
            yield

    @contextmanager
    def hold_file(self, url: str, *, size: int | None) -> Iterator[Path]:
        """Keep a shard here while it is read or opened, without its records; give where it is.

        Args:
            url: of the shard.
            size: bytes it has now, None if unknown. One that is here and has others is downloaded again.

        Raises:
            UserError: the shard is absent or forbidden, or exceeds the cache.
            IntegrityError: it does not arrive.
        """
        self._make_folders()
        path = self.path(url)
        with self._lock(stem_of(url)):
            if size is not None and path.exists() and path.stat().st_size != size:
                for stale in self.folder.glob(f"{stem_of(url)}.*"):
                    stale.unlink(missing_ok=True)
            if not path.exists():
                with self._part(url, room=size or 0, distance=URGENT, wait=True) as part:
                    self._download(url, part, size=size, sha256=None)
                    part.replace(path)
            yield path

    def index(self, url: str, *, captions: tuple[str, ...]) -> tuple[RemoteShard, Counter[str]]:
        """Download and walk a shard of unknown content; return its entry and its incomplete samples by extensions.

        Raises:
            UserError: the shard is absent or forbidden, or exceeds the cache.
            IntegrityError: it does not arrive or is damaged.
        """
        self._make_folders()
        path = self.path(url)
        with self._lock(stem_of(url)):
            if not path.exists():
                size = size_of(url, public_only=self.public_only)
                with self._part(url, room=size or 0, distance=URGENT, wait=True) as part:
                    self._download(url, part, size=size, sha256=None)
                    entry, skipped = self._walk(part, url=url, captions=captions)
                    part.replace(path)
            else:
                entry, skipped = self._walk(path, url=url, captions=captions)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard = RemoteShard(
            path=path, n=entry.n, bytes=entry.bytes, idx_sha256=entry.idx_sha256, captions=captions, url=url,
            sha256=sha256,
        )  # fmt: skip
        return shard, skipped

    def room(self) -> int:
        """Return how many bytes of shards the cache can hold: its bound, or what the disk has left and it holds."""
        self._make_folders()
        return self._limit()

    def plan(self) -> Plan:
        """Return a new plan of this process, empty as yet."""
        self._make_folders()
        return Plan(self.folder / "plans")

    def _download(self, url: str, part: Path, *, size: int | None, sha256: str | None) -> None:
        download(url, part, size=size, sha256=sha256, public_only=self.public_only)

    def _add_records(self, shard: RemoteShard, *, tar: Path) -> None:
        """Put the records of a shard beside it: those of its origin, or what a walk of it finds."""
        if shard.records is not None:
            write_atomically(shard.idx_path, shard.read_records(public_only=self.public_only))
            return
        found, _ = self._walk(tar, url=shard.url, captions=shard.captions)
        if found.n != shard.n or (shard.idx_sha256 and found.idx_sha256 != shard.idx_sha256):
            shard.idx_path.unlink()
            hint = "" if shard.idx_sha256 else "; data.cache.counts_from_stats=false counts them"
            raise IntegrityError(
                f"{shard.url} holds {found.n} pairs of picture and caption, not {shard.n} as counted{hint}"
            )

    def _walk(self, tar: Path, *, url: str, captions: tuple[str, ...]) -> tuple[ShardEntry, Counter[str]]:
        """Walk a shard, complete or under its temporary name, and put its records where they belong."""
        try:
            indexed = index_shard(tar, options=(options := IndexOptions(captions=captions)))
        except IntegrityError as error:
            raise IntegrityError(str(error).replace(str(tar), url)) from error
        publish(part_of(indexed.entry.idx_path, attempt=options.attempt), idx_path(self.path(url), captions=captions))
        return indexed.entry, indexed.incomplete

    @contextmanager
    def _part(self, url: str, *, room: int, distance: int, wait: bool) -> Iterator[Path]:
        """Take room for a shard and return where to write it. Its lock must be held."""
        part = _part_path(self.path(url), room=room)
        if room > self.max_bytes:
            raise UserError(
                f"data.cache.max_bytes={self.max_bytes} must hold a shard at least: {url} takes {room} bytes"
            )
        part.unlink(missing_ok=True)  # of a process that was killed
        while not self._reserve(part, room=room, distance=distance):
            if not wait:
                raise CacheFull
            if room > (limit := self._limit()):  # others have filled the disk: eviction would not help
                raise UserError(
                    f"data.cache.dir={self.folder} has room for {max(0, limit):,} bytes, and {url} takes {room:,}: "
                    "free some, or choose a folder on another disk"
                )
            time.sleep(_POLL_SECONDS)
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, *, room: int, distance: int) -> bool:
        with self._lock("all"):
            contents = self._contents()
            missing = sum(contents.values()) + room - self._limit()
            if missing > 0:
                missing -= self._evict(missing, contents=contents, distance=distance)
            if missing <= 0:
                part.touch()
            return missing <= 0

    def _evict(self, missing: int, *, contents: Mapping[str, int], distance: int) -> int:
        """Remove shards that are needed later than `distance` until `missing` bytes are free; return those freed."""
        needs = published_needs(self.folder / "plans")
        freed = 0
        for stem in sorted(contents, key=lambda stem: (-needs.get(stem, UNPLANNED), stem)):
            if freed >= missing or needs.get(stem, UNPLANNED) <= distance:
                break
            with self._try_lock(stem) as free:
                if free:
                    for path in self.folder.glob(f"{stem}.*"):
                        path.unlink(missing_ok=True)
                    freed += contents[stem]
        return freed

    def _contents(self) -> dict[str, int]:
        """Return the bytes that each shard takes, complete or under way."""
        contents: dict[str, int] = {}
        for entry in os.scandir(self.folder):
            if not entry.is_file():
                continue
            stem, _, rest = entry.name.partition(".")
            reserved = rest.removesuffix(".part")
            try:
                size = int(reserved) if rest.endswith(".part") and reserved.isdigit() else entry.stat().st_size
            except FileNotFoundError:
                continue
            contents[stem] = contents.get(stem, 0) + size
        return contents

    def _limit(self) -> int:
        """Return what the contents may add up to: the bound, or what the disk can still give."""
        disk = os.statvfs(self.folder)
        available = disk.f_bavail * disk.f_frsize - _FREE_BYTES
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                available += path.stat().st_blocks * 512
        return min(self.max_bytes, available)

    def _make_folders(self) -> None:
        with writing(f"data.cache.dir={self.folder}"):
            for name in ("locks", "plans", "listings"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / "locks" / name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        """Take a lock if it is free, and tell whether it was."""
        with (self.folder / "locks" / name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _part_path(path: Path, *, room: int) -> Path:
    return path.with_suffix(f".{room}.part")
