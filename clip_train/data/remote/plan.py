"""What the runs of a machine need of their common cache, and how soon: by that every process chooses what to evict."""

from __future__ import annotations

import fcntl
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from clip_train.redact import unsigned

if TYPE_CHECKING:
    from collections.abc import Mapping

UNPLANNED = 1 << 62


def stem_of(url: str) -> str:
    """Return what names a shard in the cache: a hash of its URL, of which a signature is no part."""
    return hashlib.sha256(unsigned(url).encode()).hexdigest()


class Plan:
    """What one run needs of a cache and how soon, for every process that makes room. It counts while its owner lives.

    Args:
        folder: where plans are published.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{uuid4().hex}.json"
        self._path.write_text("{}", encoding="utf-8")
        self._lock = self._path.with_suffix(".lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def publish(self, distances: Mapping[str, int]) -> None:
        """Replace the plan: for each URL the samples until it is needed."""
        # Every second, and worthless after a crash: flushed to the disk, it would wait for the shards that arrive.
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({stem_of(url): distance for url, distance in distances.items()}), encoding="utf-8")
        part.replace(self._path)

    def close(self) -> None:
        """Withdraw the plan."""
        self._path.unlink(missing_ok=True)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()


def published_needs(folder: Path) -> dict[str, int]:
    """Return the nearest need of each planned shard; remove the plans of runs that are gone."""
    needs: dict[str, int] = {}
    for lock in folder.glob("*.lock"):
        plan = lock.with_suffix(".json")
        with suppress(FileNotFoundError), lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                for stem, distance in json.loads(plan.read_text(encoding="utf-8")).items():
                    needs[stem] = min(distance, needs.get(stem, UNPLANNED))
            else:
                plan.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
    return needs
