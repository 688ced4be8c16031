"""Whole shards, local or remote, for everything that reads them from front to back or member by member."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clip_train.data.source import find_shards
from clip_train.errors import ClipTrainError, UserError
from clip_train.storage.remote import folder_of, is_remote, size_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clip_train.data.remote.cache import ShardCache

_QUESTIONS = 16  # sizes that are asked for at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A shard that `here` makes a local file."""

    location: str  # path or URL
    cache: ShardCache | None = None  # where a remote one lies while it is read
    bytes: int | None = None  # of a remote one, if its server tells
    folder: Path | None = (
        None  # for a remote one: where it gets its name and meets its index, see data/remote/mirror.py
    )

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.location.partition("?")[0].rpartition("/")[2] if self.cache else Path(self.location).name

    @property
    def path(self) -> Path:
        """Where the shard is, a remote one only inside `here`."""
        if self.cache is None:
            return Path(self.location)
        return self.cache.path(self.location) if self.folder is None else self.folder / self.name

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Give the shard as a local file, downloaded if need be; inside it is not evicted, and what is open stays.

        Errors that are raised inside name the shard by its location.

        Raises:
            UserError: the shard is absent or forbidden, or exceeds the cache.
            IntegrityError: it does not arrive.
        """
        if self.cache is None:
            yield self.path
            return
        with self.cache.hold_file(self.location, size=self.bytes) as cached:
            if self.path != cached:
                self.path.unlink(missing_ok=True)  # of a process that was killed
                self.path.symlink_to(cached)
            try:
                yield self.path
            except ClipTrainError as error:
                raise type(error)(self.named(str(error))) from error
            finally:
                if self.path != cached:
                    self.path.unlink()

    def named(self, message: str) -> str:
        """Return a message about `path` as one about the location."""
        if self.cache is None:
            return message
        message = message.replace(str(self.path), self.location)
        return message.replace(str(self.folder), folder_of(self.location)) if self.folder else message


def find_files(patterns: str | Sequence[str], *, field: str, cache: ShardCache | None) -> list[ShardFile]:
    """Return the shards that patterns name, local or remote, as `find_shards` does.

    Args:
        patterns: as for `data.train`.
        field: what to call the patterns in messages.
        cache: where remote shards are read; None refuses them.

    Raises:
        UserError: nothing matches, or a shard is absent or forbidden.
        IntegrityError: a remote place cannot be reached.
    """
    public_only = cache is not None and cache.public_only
    locations = find_shards(patterns, field=field, public_only=public_only)
    if not is_remote(locations[0]):
        return [ShardFile(location=location) for location in locations]
    if cache is None:
        raise UserError(f"{field}={locations[0]}: shards must be local files here")
    with ThreadPoolExecutor(_QUESTIONS) as pool:
        sizes = list(pool.map(partial(size_of, public_only=public_only), locations))
    return [
        ShardFile(location=location, cache=cache, bytes=size) for location, size in zip(locations, sizes, strict=True)
    ]
