"""What each loader process is doing at the moment, for whoever waits for it.

A worker notes in shared memory what it begins; the trainer reads that when no batch comes. A note costs a microsecond.
"""

from __future__ import annotations

import time
from collections import defaultdict
from enum import IntEnum
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_CELLS = 5  # per worker: what, source, shard, milliseconds of the monotonic clock, retries so far
_MOST_SHOWN = 4


class Doing(IntEnum):
    """What a loader process does."""

    starting = 0
    idle = 1
    reading = 2
    decoding = 3


class Activity:
    """The notes of the loader processes of one rank.

    Args:
        workers: loader processes; 0 if the trainer loads by itself.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # Only processes that are being started can inherit it, which is how loader processes get their dataset.
        self._cells: Any = ForkServerContext().RawArray("q", _CELLS * max(1, workers))

    def note(self, doing: Doing, *, worker: int, source: int = 0, shard: int = 0) -> None:
        """Note in a loader process what it begins; `worker` is its number from 0."""
        first = _CELLS * worker
        cells = self._cells
        cells[first + 1], cells[first + 2], cells[first + 3] = source, shard, time.monotonic_ns() // 1_000_000
        cells[first] = doing

    def latest(self) -> float:
        """Return when a loader process last began something, in seconds of the monotonic clock; 0 before."""
        return max(self._cells[3::_CELLS]) / 1000

    def count_retries(self, number: int, *, worker: int) -> None:
        """Add to the reads that a loader process had to try again."""
        if number:
            self._cells[_CELLS * worker + 4] += number

    @property
    def retries(self) -> int:
        """Reads of all loader processes that were tried again."""
        return sum(self._cells[4::_CELLS])

    def describe(self, shard_name: Callable[[int, int], str]) -> str:
        """Return what the loader processes are doing, such as `4 of 4 workers reading 00012.tar for 61 s`.

        shard_name: the name of a shard by the numbers of its source and its own.
        """
        now = time.monotonic_ns() // 1_000_000
        groups: dict[str, list[int]] = defaultdict(list)  # what -> seconds
        count = max(1, self._workers)
        for worker in range(count):
            doing, source, shard, since = self._cells[_CELLS * worker : _CELLS * worker + 4]
            what = Doing(doing).name
            if doing in (Doing.reading, Doing.decoding):
                what += f" {shard_name(source, shard)}"
            groups[what].append(max(0, now - since) // 1000 if since else 0)
        if not self._workers:
            ((what, (seconds,)),) = groups.items()
            return f"the trainer itself is {what} for {seconds} s"
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        phrases = [
            f"{len(seconds)} of {count} workers {what}" + (f" for {max(seconds)} s" if max(seconds) else "")
            for what, seconds in ordered[:_MOST_SHOWN]
        ]
        return ", ".join(phrases) + (", …" if len(ordered) > _MOST_SHOWN else "")
